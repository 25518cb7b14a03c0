"""The shelf: large arrays put aside in files of their own, and mapped from there.

What is made site by site would add up in memory. A file is removed with the last array on it; what a process that was killed
leaves behind, by the next one that puts something aside in the same folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mscompile.errors import ResourceError
from mscompile.intake.mapped import map_file
from mscompile.intake.payloads import Bytes
from mscompile.runs.locks import acquire

LARGE = 1 << 28
"""Bytes of arrays of one kind, such as weights or statistics, from which they are put aside: less fits beside any model."""
LEAST = 1 << 20
"""Bytes from which an array is put aside; smaller ones would not be worth their pages."""
CHUNK = 1 << 30
"""Bytes of a file, which is sparse: every mapping costs open files, of which a process may have few."""
PAGE = 4096
"""Where arrays begin, so that onnxruntime can map them as well."""
PREFIX = ".mscompile-"
"""What names of the files begin with."""


@dataclass(frozen=True)
class Table:
    """An array in a file, to be written.

    Attributes
    ----------
    array
        What is written so far, to be read only.
    """

    array: npt.NDArray[Any]
    _file: BinaryIO
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
        self._file: BinaryIO | None = None
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
            length = max(CHUNK, size)
            self._file, path = _new_file(Path(self._folder or tempfile.gettempdir()))
            try:
                self._file.truncate(length)
                self._bytes, self._end = map_file(self._file.fileno(), length, path, passing=True), 0
            except OSError:
                path.unlink()
                raise
        return self._end


def _new_file(folder: Path) -> tuple[BinaryIO, Path]:
    """A file locked as long as it is open. Others of the folder that no process has locked are removed."""
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if (lock := acquire(left)) is not None:
                left.unlink()
                lock.close()
    while True:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        os.close(handle)
        if (file := acquire(Path(name))) is not None:
            return file.detach(), Path(name)  # type: ignore[attr-defined]


class Hand(Shelf):
    """Puts nothing aside."""

    def put(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array as it is."""
        return array


def shelf_for(size: int, folder: Path | None) -> Shelf:
    """Where arrays of so many bytes together are put."""
    return Shelf(folder) if size > LARGE else Hand()
