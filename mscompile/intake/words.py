"""Names, shapes and lists as messages print them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
LABELS = ""  # the key of labels beside the inputs: ONNX allows no input without a name


def quoted(name: str | int, width: int = 60) -> str:
    """Return a name as it may be printed: quoted, escaped, cut to `width`."""
    return text if len(text := repr(name)) <= width else text[: width - 1] + "…"


def titled(name: str) -> str:
    """Return what messages call an array."""
    return "the labels" if name == LABELS else quoted(name)


def form(x: Array) -> str:
    """Return the dtype and shape of an array."""
    return f"{str(x.dtype)[:40]} ({', '.join(map(str, x.shape))})"


def brief(items: Iterable[str]) -> str:
    """Return the first few of `items`."""
    words = list(items)
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
