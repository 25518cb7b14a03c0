"""Files of arrays: .npz, .npy and .safetensors, read whole or not at all, and never unpickled."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from mscompile.errors import DataError, MscompileError
from mscompile.intake import room
from mscompile.intake.words import Array, quoted

UNNAMED = "arr_0"  # numpy's name for an array saved without one
EXPANSION = 200  # an archive that grows by more than this, to more than MAP_ABOVE bytes, is taken for a bomb


@contextlib.contextmanager
def reading(where: str, hint: str = "write it again with np.savez") -> Iterator[None]:
    """Turn whatever a parser or foreign code raises into a DataError, with the line where a script failed."""
    try:
        yield
    except (MscompileError, MemoryError):
        raise
    except (Exception, SystemExit) as exc:
        lines = [line for frame, line in traceback.walk_tb(exc.__traceback__) if frame.f_code.co_filename == where]
        place = f"{where}, line {lines[-1]}" if lines else where
        why = f"{type(exc).__name__}: {exc}"[:400]
        raise DataError("the samples cannot be read", where=place, why=why, hint=hint) from exc


def _npy(path: Path) -> dict[str, Array]:
    """Read a .npy file, mapped when large."""
    with path.open("rb") as file:
        _check_header(file, path.stat().st_size)
        file.seek(0)
        if path.stat().st_size <= room.MAP_ABOVE:
            return {UNNAMED: npy.read_array(file, allow_pickle=False)}
    return {UNNAMED: np.asarray(npy.open_memmap(path, mode="r"))}


def _npz(path: Path) -> dict[str, Array]:
    """Read an .npz archive; names, headers and sizes are checked before anything is decompressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(times := Counter(member.filename for member in members)) < len(members):
            raise ValueError(f"{quoted(times.most_common(1)[0][0])} is there more than once")
        for member in members:
            with reading(f"{path}, member {quoted(member.filename)}"):
                name = member.filename
                if not name.endswith(".npy") or name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise ValueError("not the name of an array as np.savez writes it")
                if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                    raise ValueError("not a compression that np.savez_compressed uses")
                with archive.open(member) as file:
                    _check_header(file, member.file_size)
        total = sum(member.file_size for member in members)
        if total > max(room.MAP_ABOVE, EXPANSION * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size} bytes would expand to {total}; if that is meant, do not compress")
        room.check_room(total, str(path))
        arrays = {}
        for member in members:
            with reading(f"{path}, member {quoted(member.filename)}"), archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = npy.read_array(file, allow_pickle=False)
                file.read()  # to the end: the checksum is compared there
        return arrays


def _check_header(file: IO[bytes], size: int) -> None:
    """Check that a .npy stream of `size` bytes is exactly as long as its header says, without reading the rest."""
    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"version {version} of the .npy format is not for plain arrays")
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never read")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"the header declares {dtype} {shape}, but {size - file.tell()} bytes follow")


def _safetensors(path: Path) -> dict[str, Array]:
    """Read a .safetensors file; the library checks that the tensors cover it exactly."""
    from safetensors import safe_open

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name is in the header more than once")
        return found

    room.check_room(path.stat().st_size, str(path))
    with safe_open(path, framework="numpy") as tensors, path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a dict


READERS: dict[str, Callable[[Path], dict[str, Array]]] = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}
