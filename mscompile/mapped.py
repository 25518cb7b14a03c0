"""Arrays that lie in files: mapped, not read, and known by their place there, so that onnxruntime can map them as well.

Weights in external files are views of one mapping per file. What is computed and outgrows `IN_MEMORY` goes to files of its
own in a temporary folder (`TMPDIR`), which is removed at the end.
"""

from __future__ import annotations

import atexit
import bisect
import itertools
import mmap
import os
import resource
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mscompile.errors import ResourceError
from mscompile.payloads import Bytes

IN_MEMORY = 1 << 30
"""Bytes of computed arrays that stay in memory, all together; later ones are mapped from files."""
WORTH_A_FILE = 1 << 20
"""Bytes below which an array stays in memory in any case."""
OPEN_FILES = Path("/proc/self/fd")
"""Where the system names open files, whatever their paths lead to by now; elsewhere they go by their paths."""

AnyArray = TypeVar("AnyArray", bound=npt.NDArray[Any])


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


def map_file(handle: int, size: int, path: Path) -> Bytes:
    """All bytes of an open regular file, mapped for reading; it stays open as long as an array lies on them."""
    if not size:
        return np.zeros(0, dtype=np.uint8)
    own = os.dup(handle)
    named = str(OPEN_FILES / str(own)) if OPEN_FILES.is_dir() else str(path)
    return _mappings.add(mmap.mmap(own, size, access=mmap.ACCESS_READ), named, lambda: os.close(own))


def place_of(array: npt.NDArray[Any]) -> Place | None:
    """Where an array lies as it is, in a file; None where that is in memory, in another order, or between its elements."""
    start = _address(array)
    if not (array.flags.c_contiguous and array.flags.aligned and array.nbytes):
        return None
    return _mappings.find(start, start + array.nbytes)


# --- what is computed -------------------------------------------------------------------------------------------------


class _Held:
    """Bytes of arrays that are kept in memory, as long as they are alive."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, array: npt.NDArray[Any]) -> bool:
        """Whether an array may stay, which is then counted."""
        if self.bytes + array.nbytes > IN_MEMORY:
            return False
        self.bytes += array.nbytes
        weakref.finalize(array, self._give, array.nbytes).atexit = False
        return True

    def _give(self, size: int) -> None:
        self.bytes -= size


_held = _Held()
_numbers = itertools.count()


@cache
def _folder(process: int) -> Path:
    """The folder of this process. Each array in it keeps a file open, so that as many may be open as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard != resource.RLIM_INFINITY else (soft, hard))
    folder = Path(tempfile.mkdtemp(prefix=f"mscompile.{process}."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def spooled(array: AnyArray) -> AnyArray:
    """The same array, read-only and mapped from a file where what is kept in memory is enough already.

    Raises
    ------
    ResourceError
        The disk is full.
    """
    turned = array.flags.f_contiguous and not array.flags.c_contiguous
    plain: npt.NDArray[Any] = array.T if turned else array
    if array.nbytes < WORTH_A_FILE or place_of(plain) is not None or _held.take(array):
        return array
    plain = np.ascontiguousarray(plain)
    path = _folder(os.getpid()) / str(next(_numbers))
    try:
        with path.open("w+b") as file:
            file.write(plain.reshape(-1).view(np.uint8).data)
            file.flush()
            region = mmap.mmap(file.fileno(), plain.nbytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ResourceError(
            "the disk is full or slow",
            where=str(path.parent),
            why=error.strerror or str(error),
            hint="set TMPDIR to a folder with more space",
        ) from error
    whole = _mappings.add(region, str(path), lambda: path.unlink(missing_ok=True))
    found = whole.view(plain.dtype).reshape(plain.shape)
    return found.T if turned else found  # type: ignore[return-value]
