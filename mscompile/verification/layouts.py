"""Where tensors hold the samples, found by experiment: of any model, whoever made it, nothing else is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from mscompile.network.layout import ROWS, Layout
from mscompile.runtime import Arrays
from mscompile.verification.interventions import Feed
from mscompile.verification.surgery import Patch

Array = npt.NDArray[np.generic]


def observed(
    read: Callable[[Feed], Arrays], batch: Feed, values: Arrays, patches: Iterable[Patch], shared: frozenset[str]
) -> dict[str, Layout]:
    """Layout by tensor: that under which every second sample is where it was when the others become one of them.

    It costs no run where shapes leave no choice, else two. Where nothing fits, what is most common stands.

    Parameters
    ----------
    read
        Runs the model.
    values
        What it gives for the batch.
    shared
        Inputs that go with every sample.
    """
    count = len(next(array for name, array in batch.items() if name not in shared))
    possible = {patch.tensor: list(_layouts(values[patch.tensor].shape, patch.axis, count)) for patch in patches}
    found = {tensor: layouts[0] if layouts else ROWS for tensor, layouts in possible.items()}
    if count == 1 or all(len(layouts) < 2 for layouts in possible.values()):
        return found
    halves = [np.arange(count) % 2 == half for half in (0, 1)]
    changed = [read(_only(batch, same, shared)) for same in halves]
    for tensor, layouts in possible.items():
        seen = [(same, half[tensor]) for same, half in zip(halves, changed, strict=True)]
        fitting = (one for one in layouts if all(_stays(one, values[tensor], half, same) for same, half in seen))
        found[tensor] = next(fitting, found[tensor])
    return found


def _layouts(shape: tuple[int, ...], channels: int, count: int) -> Iterator[Layout]:
    """Layouts that a shape allows, the most common ones first."""
    for axis, size in enumerate(shape):
        if axis != channels and size % count == 0:
            places = size // count
            yield from (Layout(axis, n, places // n) for n in range(1, places + 1) if places % n == 0)


def _only(batch: Feed, same: npt.NDArray[np.bool_], shared: frozenset[str]) -> Mapping[str, Array]:
    """The batch with the first of some samples in place of all others."""
    rows = np.where(same, np.arange(len(same)), np.flatnonzero(same)[0])
    return {name: array if name in shared else np.ascontiguousarray(array[rows]) for name, array in batch.items()}


def _stays(layout: Layout, before: Array, after: Array, same: npt.NDArray[np.bool_]) -> bool:
    here, there = (layout.front(array, len(same))[same] for array in (before, after))
    return np.array_equal(here, there, equal_nan=before.dtype.kind == "f")
