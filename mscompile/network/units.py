"""Units: classes of channel indices that live and die together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.sparse

from mscompile.operators import IntArray

Axes = tuple[int, ...]
"""Axes of a tensor that an array of units lies along: ``units[i, j]`` is the unit at index i of the first, j of the next.

Along the last axis as many units may stay in one row as in any other, not the same ones. Rows stay, but where each of them
is one unit.
"""
Labels = Mapping[Axes, IntArray]


@dataclass
class Classes:
    """Integers in classes; the least of a class stands for it. Which are one is found at the end, in linear time."""

    count: int = 0
    pairs: list[IntArray] = field(default_factory=list)

    def fresh(self, count: int) -> IntArray:
        """New integers, each in a class of its own."""
        first = self.count
        self.count += count
        return np.arange(first, self.count, dtype=np.int64)

    def unite(self, a: IntArray, b: IntArray) -> None:
        """Merge the classes of a and b, entry by entry."""
        self.pairs.append(np.stack([a.ravel(), b.ravel()]))

    def unite_along(self, units: IntArray, axis: int) -> IntArray:
        """Merge all units along one axis of an array; gives the array without it."""
        first = np.take(units, [0], axis=axis)
        self.unite(np.broadcast_to(first, units.shape), units)
        one: IntArray = first.squeeze(axis)
        return one

    def onto(self, units: IntArray, axis: int) -> IntArray:
        """Merge along every axis but one; gives the units along that one."""
        return self.unite_along(np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1), 1)

    def roots(self) -> IntArray:
        """The integer that stands for each one's class."""
        ends = np.concatenate([np.empty((2, 0), dtype=np.int64), *self.pairs], axis=1)
        links = scipy.sparse.coo_array((np.ones(ends.shape[1], dtype=np.bool_), ends), shape=(self.count, self.count))
        number = scipy.sparse.csgraph.connected_components(links, directed=False)[1]
        found: IntArray = np.unique(number, return_index=True)[1][number]
        return found


def among(units: IntArray, some: IntArray) -> npt.NDArray[np.bool_]:
    """Which units are among `some`: `np.isin` of numbers from 0, which takes several times as long for a few hundred."""
    table = np.zeros(max(units.max(initial=0), some.max(initial=0)) + 1, np.bool_)
    table[some] = True
    return table[units]


def width(labels: Labels, axis: int, dead: IntArray) -> int | None:
    """Channels left on an axis when `dead` units have gone; None where the axis carries no units."""
    for axes, units in labels.items():
        if axis in axes:
            alive, place = ~among(units, dead), axes.index(axis)
            if place == len(axes) - 1:
                return int(alive.sum(axis=-1).max())
            return int(np.moveaxis(alive, place, 0).reshape(units.shape[place], -1).any(axis=1).sum())
    return None


def alive(labels: Labels, axis: int, dead: IntArray) -> npt.NDArray[np.bool_] | None:
    """Which channels are left on an axis, in the first row that is; None where the axis carries no units."""
    for axes, units in labels.items():
        if axis in axes:
            place, left = axes.index(axis), ~among(units, dead)
            if place < len(axes) - 1:
                return np.asarray(np.moveaxis(left, place, 0).reshape(units.shape[place], -1).any(axis=1))
            rows: npt.NDArray[np.bool_] = left.reshape(-1, units.shape[-1])
            return np.asarray(rows[int(rows.any(axis=1).argmax())])
    return None


def along(labels: Labels, axis: int) -> IntArray | None:
    """Units along an axis, of the first row where there are several; None where it carries none."""
    for axes, units in labels.items():
        if axis in axes:
            last = np.moveaxis(units, axes.index(axis), -1)
            row: IntArray = last.reshape(-1, last.shape[-1])[0]
            return row
    return None


@dataclass(frozen=True)
class Block:
    """Rows of units, as many of which must stay in every row.

    Attributes
    ----------
    units
        [rows, units in a row].
    heads
        [rows]: the head that each row belongs to, which may go as a whole; −1 where rows must stay.
    multiple
        What is left in a row is a multiple of it.
    """

    units: IntArray
    heads: IntArray
    multiple: int = 1

    @cached_property
    def rows(self) -> tuple[Counter[int], ...]:
        """Units of each row, and how often they stand there."""
        return tuple(Counter(row) for row in self.units.tolist())

    def inside(self, members: Set[int]) -> bool:
        """Whether all units are among `members`."""
        return all(row.keys() <= members for row in self.rows)


def even(kept: IntArray, blocks: Sequence[Block], order: Iterable[int], gone: Collection[int] = ()) -> IntArray:
    """The least set of units that holds `kept` and leaves as many in every row of each block.

    Parameters
    ----------
    order
        Units, those to be added last first.
    gone
        Heads whose rows are left as they are.
    """
    chosen = set(kept.tolist())
    rank = {unit: place for place, unit in enumerate(order)}
    changed = True
    while changed:
        changed = False
        for block in blocks:
            rows = [row for row, head in zip(block.rows, block.heads.tolist(), strict=True) if head not in gone]
            most = max([1, *(_left(row, chosen) for row in rows)])
            most += -most % block.multiple
            for row in rows:
                if (count := _left(row, chosen)) < most:
                    changed = True
                    for unit in sorted((u for u in row if u not in chosen), key=lambda u: -rank.get(u, -1)):
                        if count < most:
                            chosen.add(unit)
                            count += row[unit]
    return np.array(sorted(chosen), dtype=np.int64)


def _left(row: Counter[int], chosen: Set[int]) -> int:
    return sum(map(row.__getitem__, row.keys() & chosen))


def components(arrays: Iterable[IntArray], count: int) -> IntArray:
    """Connected components of units that share an array, numbered by their first unit."""
    sets = Classes(count)
    for units in arrays:
        flat = units.ravel()
        sets.unite(np.full_like(flat, flat[0]), flat)
    return sets.roots()
