"""JSON documents that others may have written."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

SHOWN = 3
"""Places of a document that are named where it is not as it should be."""


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


def faults(error: ValidationError) -> str:
    """Where a document is not as it should be, and why."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()[:SHOWN])
