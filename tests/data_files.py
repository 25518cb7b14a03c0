"""Data as users have it: small arrays, in every kind of file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper

from mscompile.errors import DataError, MscompileError
from mscompile.intake.data import read
from mscompile.intake.samples import InputSpec, Samples

BF16 = np.dtype(ml_dtypes.bfloat16)
X = np.arange(15, dtype=np.float32).reshape(5, 3) / 8
IDS = np.arange(10, dtype=np.int64).reshape(5, 2)
Y = np.array([0, 1, 2, 1, 0])


def spec(name: str = "x", dtype: Any = np.float32, shape: tuple[Any, ...] = ("N", 3)) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ONE = [spec()]
TWO = [spec(), spec("ids", np.int64, ("N", 2))]


def as_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy_bytes(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def as_zip(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def as_sets(parent: Path, *sets: dict[str, np.ndarray[Any, Any]]) -> Path:
    for i, arrays in enumerate(sets):
        (parent / f"test_data_set_{i}").mkdir(parents=True)
        for j, (name, x) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(x, name)
            (parent / f"test_data_set_{i}" / f"input_{j}.pb").write_bytes(tensor.SerializeToString())
    return parent


def refused(src: Any, specs: list[InputSpec] = ONE, error: type[MscompileError] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read(src, specs, **options)
    assert type(caught.value) is error
    assert all([caught.value.what, caught.value.where, caught.value.why, caught.value.hint])
    return str(caught.value)


def conforms(samples: Samples, specs: list[InputSpec]) -> bool:
    return list(samples.inputs) == [s.name for s in specs] and all(
        x.dtype == s.dtype and x.dtype.isnative and x.flags.c_contiguous and len(x) == len(samples)
        for s, x in zip(specs, samples.inputs.values(), strict=True)
    )
