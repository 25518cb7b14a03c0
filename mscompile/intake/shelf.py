"""The shelf: large arrays put aside in files without names, and mapped from there.

What is made site by site would add up in memory. A file without a name is gone with the last array on it, however the
process ends.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mscompile.errors import ResourceError
from mscompile.intake.payloads import Bytes

LARGE = 1 << 28
"""Bytes of arrays of one kind, such as weights or statistics, from which they are put aside: less fits beside any model."""
LEAST = 1 << 20
"""Bytes from which an array is put aside; smaller ones would not be worth their pages."""
CHUNK = 1 << 30
"""Bytes of a file, which is sparse: every mapping costs open files, of which a process may have few."""
PAGE = 4096
"""Where arrays begin."""


@dataclass(frozen=True)
class Table:
    """An array in a file, to be written.

    Attributes
    ----------
    array
        What is written so far, to be read only.
    """

    array: npt.NDArray[Any]
    _file: IO[bytes]
    _start: int
    _writing: Callable[[], contextlib.AbstractContextManager[None]]

    def write(self, row: int, rows: npt.NDArray[Any]) -> None:
        """Write rows from one on; the array is of their type.

        Raises
        ------
        ResourceError
            The file cannot be written.
        """
        place = row * math.prod(self.array.shape[1:]) * self.array.itemsize
        with self._writing():
            self._file.seek(self._start + place)
            self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            self._file.flush()


class Shelf:
    """Arrays that are made and dropped together.

    Parameters
    ----------
    folder
        Where the files are; the system's temporary folder if None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._bytes: Bytes = np.zeros(0, dtype=np.uint8)
        self._end = 0

    def put(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array, from a file if it is large, to be read only then.

        Raises
        ------
        ResourceError
            The file cannot be written.
        """
        if array.nbytes < LEAST:
            return array
        table = self.table(array.shape, array.dtype)
        table.write(0, array)
        return table.array

    def table(self, shape: tuple[int, ...], kind: npt.DTypeLike) -> Table:
        """Room for an array that is written by rows."""
        kind = np.dtype(kind)
        size = math.prod(shape) * kind.itemsize
        with self._writing():
            start = self._room(size)
            self._end = start + -(-size // PAGE) * PAGE
        assert self._file is not None
        return Table(self._bytes[start : start + size].view(kind).reshape(shape), self._file, start, self._writing)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                "arrays cannot be put aside",
                where=str(self._folder or tempfile.gettempdir()),
                why=error.strerror or str(error),
                hint="check free space, or name a folder on another disk with --work, or with TMPDIR where nothing is kept",
            ) from error

    def _room(self, size: int) -> int:
        """Where the next array goes, in a new file where the last one is full."""
        if self._end + size > len(self._bytes):
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - until it is full
            length = max(CHUNK, size)
            self._file.truncate(length)
            # onnxruntime maps no files without names by itself: it is given these arrays as others, and copies none.
            self._bytes = np.frombuffer(mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_READ), dtype=np.uint8)
            self._end = 0
        return self._end


class Hand(Shelf):
    """Puts nothing aside."""

    def put(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array as it is."""
        return array


def shelf_for(size: int, folder: Path | None) -> Shelf:
    """Where arrays of so many bytes together are put."""
    return Shelf(folder) if size > LARGE else Hand()
