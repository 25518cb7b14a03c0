"""Samples: inputs that conform to a model, and how they are split."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from mscompile.errors import DataError, UsageError
from mscompile.intake.words import LABELS, Array, quoted


class Reader(Protocol):
    """What onnxruntime calls a CalibrationDataReader: dicts of arrays, then None."""

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next batch, or None at the end."""


@dataclass(frozen=True)
class InputSpec:
    """What the model declares for one graph input; axis 0 counts samples, an int is a fixed dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ["?" if d is None else d if re.fullmatch(r"\w{1,60}", str(d)) else quoted(d) for d in self.shape]
        return f"{quoted(self.name)} {self.dtype} ({', '.join(map(str, sizes))})"


Source: TypeAlias = "str | Path | Samples | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Reader"


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that conform to a model.

    Parameters
    ----------
    inputs
        Input name → array of exactly the declared dtype, native byte order, C-contiguous; axis 0 = samples.
    labels
        One entry per sample along axis 0, or None.
    source
        Where they came from, for the report.
    notes
        What was converted, left out or looks weak: to be shown as warnings.
    shared
        Inputs without a sample axis, such as an initial state: the same array goes with every batch.
    files
        The files they were read from, and what tells whether those are still the same.
    """

    inputs: dict[str, Array]
    labels: Array | None
    source: str
    notes: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    files: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return next(len(x) for name, x in self.inputs.items() if name not in self.shared)

    @cached_property
    def sha256(self) -> str:
        """Hex digest over names, dtypes, shapes and bytes in sorted name order, labels included."""
        digest = hashlib.sha256()
        arrays = self.inputs if self.labels is None else {**self.inputs, LABELS: self.labels}
        for name, x in sorted(arrays.items()):
            digest.update(json.dumps([name, x.dtype.name, x.shape]).encode() + b"\n")
            digest.update(x.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse to go on where the files that were read have changed since.

        Raises
        ------
        DataError
            One has.
        """
        for path, known in self.files.items():
            if identity(path) != known:
                raise DataError(
                    "the data changed during the run",
                    where=str(path),
                    why="the file is not the one that was read",
                    hint="run again when nothing writes to it",
                )

    def take(self, indices: slice | Sequence[int] | Array) -> Samples:
        """Return the samples at `indices` in that order: views for a slice, copies for integers or a mask."""
        at = indices if isinstance(indices, slice) else np.atleast_1d(np.arange(len(self))[indices])
        labels = None if self.labels is None else np.ascontiguousarray(self.labels[at])
        inputs = {name: x if name in self.shared else np.ascontiguousarray(x[at]) for name, x in self.inputs.items()}
        return Samples(inputs, labels, self.source, self.notes, self.shared)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield views of `size` samples in order, the last one possibly shorter."""
        if size < 1:
            raise UsageError("the batch size must be positive", where="batch size", why=f"got {size}", hint="use 1 or more")
        for start in range(0, len(self), size):
            yield {name: x if name in self.shared else x[start : start + size] for name, x in self.inputs.items()}

    def split(self, shares: Sequence[float], seed: int) -> tuple[Samples, ...]:
        """Split at random into disjoint parts; every sample is in exactly one, in its original order.

        Parameters
        ----------
        shares
            Positive relative sizes; (2, 1, 1) puts half of the samples into the first part.
        seed
            The same seed gives the same split.

        Raises
        ------
        UsageError
            A share is not positive and finite.
        DataError
            A part would be empty.
        """
        if not shares or not all(0 < share < math.inf for share in shares):
            raise UsageError(
                "shares of a split must be positive", where="split", why=f"got {shares}", hint="use e.g. (2, 1, 1)"
            )
        ends = [round(len(self) * math.fsum(shares[: i + 1]) / math.fsum(shares)) for i in range(len(shares))]
        if min(np.diff(ends, prepend=0)) < 1:
            why = f"{len(self)} samples in shares {tuple(shares)} leave a part empty"
            raise DataError("too few samples to split", where=self.source, why=why, hint="supply more samples")
        order = np.random.default_rng(seed).permutation(len(self))
        return tuple(self.take(np.sort(part)) for part in np.split(order, ends[:-1]))


def identity(path: Path) -> tuple[int, ...]:
    """As `vetting.identity`; nothing where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
