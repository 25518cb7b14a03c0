"""Where a tensor holds the samples: on which axis, and which positions count on the same one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.operators import Dim, Shape


@dataclass(frozen=True)
class Layout:
    """An axis ``before · samples · behind`` long.

    Attributes
    ----------
    axis
        The axis.
    before, behind
        Numbers of positions that count on it more slowly and faster than the samples do; one of them may be None, which is
        not known before the tensor's size is.
    """

    axis: int = 0
    before: int | None = 1
    behind: int | None = None

    @property
    def first(self) -> bool:
        """Whether the rows of each sample lie together, and in the order of the samples."""
        return self.axis == 0 and self.before == 1

    @property
    def alone(self) -> bool:
        """Whether the samples have an axis of their own."""
        return self.before == self.behind == 1

    def of(self, shape: Sequence[Dim], samples: int) -> Layout:
        """The same for a tensor of that shape, every number known.

        Raises
        ------
        ValueError
            The tensor is not so large.
        """
        size, known = shape[self.axis], (self.before or 1) * (self.behind or 1)
        rest, left = divmod(size, samples * known) if isinstance(size, int) else (0, 1)
        if left or (rest != 1 and None not in (self.before, self.behind)):
            raise ValueError(f"{samples} samples do not give {size} places on axis {self.axis}")
        return replace(self, before=self.before or rest, behind=self.behind or rest)

    # -- of a tensor whose size is known: samples in front, [samples, …], and positions on axes of their own --

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions before and behind the samples, where there are any."""
        return tuple(n for n in (self.before,) if n not in (1, None)), tuple(n for n in (self.behind,) if n not in (1, None))

    @property
    def place(self) -> int:
        """Axis of the samples once their axis is split."""
        return self.axis + len(self.parts[0])

    def split(self, shape: Sequence[Dim], samples: Dim) -> tuple[Dim, ...]:
        """The shape with that axis split."""
        before, behind = self.parts
        return (*shape[: self.axis], *before, samples, *behind, *shape[self.axis + 1 :])

    def split_axis(self, axis: int) -> int:
        """Where another axis of the tensor is then."""
        return axis if axis < self.axis else axis + sum(map(len, self.parts))

    def channel(self, axis: int) -> int:
        """Where it is with the samples in front."""
        return axis + 1 if axis < self.axis else self.split_axis(axis)

    def front(self, array: npt.NDArray[Any], samples: int) -> npt.NDArray[Any]:
        """A view of an array with the samples in front."""
        known = self.of(array.shape, samples)
        apart = array.reshape(known.split(array.shape, samples))  # type: ignore[arg-type]
        return np.moveaxis(apart, known.place, 0)

    def back(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The reverse of `front`, where every number is known."""
        apart = np.moveaxis(array, 0, self.place)
        end = self.axis + 1 + sum(map(len, self.parts))
        merged = math.prod(apart.shape[self.axis : end])
        return apart.reshape(*apart.shape[: self.axis], merged, *apart.shape[end:])

    def rows(self, per_sample: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
        """[size, …]: what is given per sample, at all places of an axis that is `size` long."""
        before, behind = self.before, self.behind
        rest = max(size // (len(per_sample) * (before or 1) * (behind or 1)), 1)
        repeated = np.repeat(per_sample, behind or rest, axis=0)
        return np.tile(repeated, (before or rest, *[1] * (per_sample.ndim - 1)))


FIRST = Layout(behind=1)
"""Samples on an axis of their own, the first."""
ROWS = Layout()
"""Samples on the first axis, with as many rows for each as there are."""


def reshaped(layout: Layout, source: Shape, target: Shape) -> Layout | None:
    """Where the samples are once a tensor has another shape, its elements in the same order; None where that cannot be told.

    As many elements come before and behind those of one sample, at every place, as before.
    """
    outer = _product(layout.before, source[: layout.axis])
    inner = _product(layout.behind, source[layout.axis + 1 :])
    if outer is not None:
        axis, passed = 0, 1
        while axis < len(target) - 1 and isinstance(size := target[axis], int) and (passed * size <= outer or size == 1):
            passed, axis = passed * size, axis + 1
        rest = target[axis + 1 :]
        unsure = not isinstance(target[axis], int) and any(not isinstance(d, int) for d in rest)
        same = layout.alone and target[axis] is not None and target[axis] == source[layout.axis]
        if outer % passed or (unsure and passed < outer and not same):
            return None
        behind = _quotient(inner, rest)
        return Layout(axis, outer // passed, 1 if behind is None and same else behind)
    if inner is not None:
        axis, passed = len(target) - 1, 1
        while axis > 0 and isinstance(size := target[axis], int) and passed * size <= inner:
            passed, axis = passed * size, axis - 1
        unsure = any(not isinstance(d, int) for d in target[:axis]) and not isinstance(target[axis], int)
        if inner % passed or (unsure and passed < inner):
            return None
        return Layout(axis, None, inner // passed)
    places = [axis for axis, size in enumerate(target) if size is not None and size == source[layout.axis]]
    return Layout(places[0], 1, 1) if layout.alone and len(places) == 1 and not isinstance(target[places[0]], int) else None


def _product(factor: int | None, dims: Sequence[Dim]) -> int | None:
    numbers = [factor, *dims]
    return math.prod(numbers) if all(isinstance(n, int) for n in numbers) else None  # type: ignore[arg-type]


def _quotient(whole: int | None, dims: Sequence[Dim]) -> int | None:
    by = _product(1, dims)
    return None if whole is None or not by or whole % by else whole // by
