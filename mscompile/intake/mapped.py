"""Arrays that lie in files: mapped, not read, and known by their place there, so that onnxruntime can map them as well.

Weights in external files are views of one mapping per file; what `mscompile.runs.shelf` puts aside lies in others.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.intake.payloads import Bytes

OPEN_FILES = Path("/proc/self/fd")
"""Where the system names open files, whatever their paths lead to by now; elsewhere they go by their paths."""


@dataclass(frozen=True)
class Place:
    """Where an array lies: a path and a first byte."""

    path: str
    offset: int


class _Mappings:
    """Mappings that are alive, by their addresses."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._starts: list[int] = []
        self._known: dict[int, tuple[int, str]] = {}

    def add(self, region: mmap.mmap, path: str, release: Callable[[], None]) -> Bytes:
        """All bytes of a region of the file at `path`; `release` is called when no array lies on them any more."""
        whole: Bytes = np.frombuffer(region, dtype=np.uint8)
        start = _address(whole)
        with self._lock:
            bisect.insort(self._starts, start)
            self._known[start] = start + whole.nbytes, path
        weakref.finalize(region, self._remove, start, release)
        return whole

    def _remove(self, start: int, release: Callable[[], None]) -> None:
        with self._lock:
            self._starts.remove(start)
            del self._known[start]
        release()

    def find(self, start: int, end: int) -> Place | None:
        """The file that a range of addresses lies in."""
        with self._lock:
            at = bisect.bisect_right(self._starts, start) - 1
            first = self._starts[at] if at >= 0 else 0
            last, path = self._known.get(first, (0, ""))
        return Place(path, start - first) if end <= last else None


_mappings = _Mappings()


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def map_file(handle: int, size: int, path: Path, *, passing: bool = False) -> Bytes:
    """All bytes of an open regular file, mapped for reading; it stays open as long as an array lies on them.

    A file that is `passing` is removed then.
    """
    if not size:
        return np.zeros(0, dtype=np.uint8)
    own = os.dup(handle)
    named = str(OPEN_FILES / str(own)) if OPEN_FILES.is_dir() else str(path)

    def release() -> None:
        os.close(own)
        if passing:
            path.unlink(missing_ok=True)

    return _mappings.add(mmap.mmap(own, size, access=mmap.ACCESS_READ), named, release)


def place_of(array: npt.NDArray[Any]) -> Place | None:
    """Where an array lies as it is, in a file; None where that is in memory, in another order, or between its elements."""
    start = _address(array)
    if not (array.flags.c_contiguous and array.flags.aligned and array.nbytes):
        return None
    return _mappings.find(start, start + array.nbytes)
