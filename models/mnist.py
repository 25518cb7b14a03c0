"""Strict reader of the MNIST idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from mscompile.errors import DataError

Labelled = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _reject(file: Path, why: str) -> NoReturn:
    raise DataError(
        "cannot read the MNIST data",
        where=str(file),
        why=why,
        hint="fetch the four original idx files again (train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte), gzipped or not",
    )


def _idx(folder: Path, name: str, item: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes whose items have the shape `item`."""
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), folder / name)
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        _reject(file, str(error))
    header = 4 + 4 * (1 + len(item))
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, 1 + len(item))):
        _reject(file, f"it does not begin like an idx file of unsigned bytes in {1 + len(item)} dimensions")
    shape = tuple(np.frombuffer(raw[4:header], ">u4").tolist())
    if shape[0] == 0 or shape[1:] != item:
        _reject(file, f"its header gives the shape {shape}; the items must be of shape {item}, at least one of them")
    if len(raw) - header != math.prod(shape):
        _reject(file, f"its header promises {math.prod(shape)} bytes of data, it holds {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _labelled(folder: Path, part: str) -> Labelled:
    images = _idx(folder, f"{part}-images-idx3-ubyte", (28, 28))
    labels = _idx(folder, f"{part}-labels-idx1-ubyte", ())
    if len(images) != len(labels):
        _reject(folder, f"the part {part} has {len(images)} images and {len(labels)} labels")
    if labels.max() > 9:
        _reject(folder, f"the part {part} has the label {labels.max()}, beyond 9")
    return images, labels


def read(folder: Path) -> tuple[Labelled, Labelled]:
    """Read the training and the test part: images [n, 28, 28] and labels [n], both of unsigned bytes."""
    return _labelled(folder, "train"), _labelled(folder, "t10k")
