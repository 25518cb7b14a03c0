"""JSON documents that others may have written."""

from __future__ import annotations

import json
from typing import Any


def parse(content: bytes | str) -> Any:
    """Return what a JSON document says.

    Raises
    ------
    ValueError
        It is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
