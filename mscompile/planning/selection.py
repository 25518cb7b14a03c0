"""Choosing which units stay: backward elimination under affine replacement.

Additive scores ignore that replaced units can stand in for each other. Here the unit whose removal costs least, given all
removed before it, goes next; what it did is passed on to the retained ones at once. For a site with covariance Σ, curvature
G and H the covariance under interchange (see `fit_affine`), on the kept set K:

    cost of r = ½ M_rr / (H⁻¹)_rr,     M = [I; B]ᵀ G [I; B],     B the regression of the removed on K under H,

which is the structured form of the optimal brain surgeon. Removing r updates both by

    H⁻¹ ← H⁻¹ − p pᵀ / p_r,  M ← M + b mᵀ + m bᵀ + M_rr b bᵀ,  p, m = columns r of H⁻¹, M,  b = −p / p_r.

One elimination ranks the units for every size at once, in O(channels³) time and a few channels² of memory.

These costs add up to E = ½ tr(G_PP (H_PP − H_PK H_KK⁻¹ H_KP)). Under interchange with probability p the removed P are not
swapped: their covariance is Σ, and with those swapped αH, α = (1−p)/q, where samples have nothing in common by position. The
risk is then

    ½ tr(G_PP (Σ_PP − α² H_PK H_KK⁻¹ H_KP))  =  α² E  +  ½ tr(G_PP (Σ_PP − α² H_PP)),

whose second term, what the removed have in common and interchange hides from the kept, is a sum over pairs. It counts where
G is exact, at sites that the outputs themselves read: elsewhere G takes what outputs change by as independent of what the
activation is, and changes at different positions as independent of one another, which what is hidden is not. Its diagonal
counts where it is positive, beyond p = ½: below, it speaks for units of large variance, and gained nothing where measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.calibration.statistics import Statistics
from mscompile.machine import blas_threads
from mscompile.network.scm import Site
from mscompile.network.units import Block, among, even
from mscompile.operators import IntArray
from mscompile.planning.replacements import RIDGE, TINY, interchanged, stabilise
from mscompile.planning.scores import Scores, joint_curvature

Array = npt.NDArray[np.float64]

DEPENDENT = 10 * RIDGE
"""Share of a unit's variance that others may leave unexplained where it counts as a function of them: the ridge leaves twice
its own."""
OBSERVED = 4
"""Observations per channel below which no unit counts as dependent: few enough always are."""
BLOCK_SHARE = 1 / 128
"""Share of the remaining units removed at a time: one by one up to 255 of them, in blocks beyond, where single updates would
be bound by memory."""


@dataclass(frozen=True)
class Elimination:
    """The order in which the units of a group go.

    Attributes
    ----------
    order
        Units, first to go first.
    risk
        [units + 1]: predicted risk after the first so many have gone, from 0 on.
    lossless
        So many of the first units are, on the calibration data, affine functions of the units behind them.
    """

    order: IntArray
    risk: Array
    lossless: int = 0


@dataclass
class _State:
    """A site on the way: inverse and curvature, rows and columns of removed channels zero, and each channel's unit.

    Removed channels stay in the arrays, which are updated in place by BLAS, until half of them are gone.

    Attributes
    ----------
    share
        α², or 1 where G is not exact.
    hidden
        [channels, channels]: G ∘ (Σ − α² H), its diagonal at least zero; None where G is not exact.
    together
        [channels]: its sums over the removed.
    """

    inverse: Array
    curvature: Array
    share: float
    hidden: Array | None
    together: Array
    units: IntArray
    alive: npt.NDArray[np.bool_]

    @classmethod
    def make(cls, site: Site, statistics: Statistics, swap: float) -> _State:
        """Before anything is removed."""
        moments, curvature = statistics.moments[site.tensor], joint_curvature(site, statistics)
        mixed = _within_rows(site, interchanged(moments.covariance, moments.common, swap))
        share, hidden = 1.0, None
        if moments.shared is None and _read_by_outputs(site, statistics):
            share = ((1 - swap) / ((1 - swap) ** 2 + swap**2)) ** 2
            hidden = curvature * (moments.covariance - share * mixed)
            hidden[np.diag_indices_from(hidden)] = np.maximum(np.diagonal(hidden), 0.0)
        inverse, alive = _inverse(mixed), np.ones(site.size, dtype=np.bool_)
        return cls(inverse, np.array(curvature, order="C"), share, hidden, np.zeros(site.size), site.units, alive)

    def costs(self) -> tuple[IntArray, Array]:
        """Units left and the predicted risk added by removing each."""
        curvature, inverse = np.diagonal(self.curvature)[self.alive], np.diagonal(self.inverse)[self.alive]
        added = self.share * curvature / np.maximum(inverse, TINY)
        if self.hidden is not None:
            added += np.diagonal(self.hidden)[self.alive] + 2.0 * self.together[self.alive]
        return self.units[self.alive], 0.5 * added

    def remove(self, units: IntArray) -> None:
        """Remove the channels of `units` and pass what they did on to the others."""
        r = np.flatnonzero(np.isin(self.units, units) & self.alive)
        if not len(r):
            return
        p, m = self.inverse[:, r], self.curvature[:, r]
        b = -scipy.linalg.solve(p[r], p.T, assume_a="pos").T
        carried = m + 0.5 * b @ m[r]
        # Both arrays are symmetric, so that their transposes are the column-major views that BLAS updates in place.
        scipy.linalg.blas.dgemm(1.0, b, p, 1.0, self.inverse.T, trans_b=True, overwrite_c=True)
        scipy.linalg.blas.dgemm(1.0, b, carried, 1.0, self.curvature.T, trans_b=True, overwrite_c=True)
        scipy.linalg.blas.dgemm(1.0, carried, b, 1.0, self.curvature.T, trans_b=True, overwrite_c=True)
        for array in (self.inverse, self.curvature):
            array[r] = array[:, r] = 0.0
        if self.hidden is not None:
            self.together += self.hidden[r].sum(axis=0)
        self.alive[r] = False
        if 2 * self.alive.sum() < len(self.alive):
            left = np.flatnonzero(self.alive)
            both = np.ix_(left, left)
            self.inverse, self.curvature = self.inverse[both], self.curvature[both]
            self.hidden = None if self.hidden is None else self.hidden[both]
            self.together, self.units, self.alive = self.together[left], self.units[left], self.alive[left]


def eliminate_by_score(sites: Sequence[Site], scores: Scores) -> Elimination:
    """Elimination by the sum of each unit's scores at the sites of its group, which are taken to add up."""
    units, total = _totals(sites)
    for site in sites:
        np.add.at(total, np.searchsorted(units, site.units), scores.risk[site.tensor])
    order = np.argsort(total, kind="stable")
    return Elimination(units[order], np.concatenate([[0.0], np.cumsum(np.maximum(total[order], 0.0))]))


def _totals(sites: Sequence[Site]) -> tuple[IntArray, Array]:
    """Units of a group and a sum for each to start from: infinite for those that must stay."""
    units = np.unique(np.concatenate([site.units for site in sites]))
    fixed = np.concatenate([site.units[~site.free] for site in sites])
    return units, np.where(np.isin(units, fixed), np.inf, 0.0)


def dependent_units(sites: Sequence[Site], statistics: Statistics) -> IntArray:
    """Units of a group that are affine functions of its other units at every site and position, first to go first.

    A unit counts where what the others leave unexplained of it is at most `DEPENDENT` of its variance at all sites; it goes,
    and the rest is looked at again, so that of two copies one stays.
    """
    moments = [statistics.moments[site.tensor] for site in sites]
    if any(m.count < OBSERVED * site.size for m, site in zip(moments, sites, strict=True)):
        return np.zeros(0, dtype=np.int64)
    left, start = _totals(sites)
    inverses = [_inverse(_within_rows(site, m.covariance)) for site, m in zip(sites, moments, strict=True)]
    alive = [np.ones(site.size, dtype=np.bool_) for site in sites]
    found: list[int] = []
    while len(left) > 1:
        unexplained = start.copy()
        for site, m, inverse, here in zip(sites, moments, inverses, alive, strict=True):
            share = 1.0 / (np.maximum(np.diagonal(inverse), TINY) * np.maximum(m.variance, TINY))
            np.maximum.at(unexplained, np.searchsorted(left, site.units[here]), share[here])
        least = int(unexplained.argmin())
        if not unexplained[least] <= DEPENDENT:
            break
        found.append(int(left[least]))
        for site, inverse, here in zip(sites, inverses, alive, strict=True):
            for r in np.flatnonzero((site.units == left[least]) & here):
                p = inverse[:, r].copy()
                scipy.linalg.blas.dger(-1.0 / p[r], p, p, a=inverse.T, overwrite_a=True)
                here[r] = False
        left, start = np.delete(left, least), np.delete(start, least)
    return np.array(found, dtype=np.int64)


def eliminate_jointly(sites: Sequence[Site], statistics: Statistics, swap: float) -> Elimination:
    """Backward elimination of the units of a group; `swap` is that of the affine fit.

    Units that depend on the others go first: least squares folds them without loss.
    """
    with blas_threads(max(site.size for site in sites)):
        order, steps, lossless = _steps(sites, statistics, swap)
    # Effects of units that go together may cancel, and steps be negative: the risk of a size is the largest so far.
    risk = np.maximum.accumulate(np.concatenate([[0.0], np.cumsum(np.concatenate(steps))]))
    return Elimination(np.concatenate(order), risk, lossless)


def _steps(sites: Sequence[Site], statistics: Statistics, swap: float) -> tuple[list[IntArray], list[Array], int]:
    """Units by step, the last ones those that stay; what each of them adds; and how many go without loss."""
    states = [_State.make(site, statistics, swap) for site in sites]
    left, start = _totals(sites)
    order: list[IntArray] = []
    steps: list[Array] = []
    dependent = dependent_units(sites, statistics).tolist()
    lossless = len(dependent)
    while (going := int(np.isfinite(start).sum())) > 0 and len(left) > 1:
        total = start.copy()
        for state in states:
            own, cost = state.costs()
            np.add.at(total, np.searchsorted(left, own), cost)
        count = min(max(1, int(len(left) * BLOCK_SHARE)), len(left) - 1, going)
        chosen = np.flatnonzero(left == dependent.pop(0)) if dependent else np.argsort(total, kind="stable")[:count]
        order.append(left[chosen])
        steps.append(total[chosen])
        for state in states:
            state.remove(left[chosen])
        left, start = np.delete(left, chosen), np.delete(start, chosen)
    # One unit stays always, and some must: losing them is out of the question.
    steps.append(np.full(len(left), np.inf))
    return [*order, left], steps, lossless


def _read_by_outputs(site: Site, statistics: Statistics) -> bool:
    """Whether all that is read of a site goes into the outputs that are scored, and nowhere else first."""
    read = [reader.node.outputs[0].name in statistics.outputs for reader in site.readers]
    return bool(read) and all(read) and not site.pairings


def _within_rows(site: Site, covariance: Array) -> Array:
    """The same where channels of different rows, which cannot stand in for each other, are uncorrelated."""
    return covariance if site.rows is None else covariance * (site.rows[:, None] == site.rows)


def _inverse(covariance: Array) -> Array:
    """Inverse of a covariance, ridge included; the covariance is used up."""
    stabilise(covariance)
    factor = scipy.linalg.cho_factor(covariance, lower=True, overwrite_a=True)
    inverse: Array = np.ascontiguousarray(scipy.linalg.cho_solve(factor, np.eye(len(covariance))))
    return inverse


def retained_units(
    order: IntArray, count: int, blocks: Sequence[Block], frozen: Collection[int], sites: Sequence[Site] = ()
) -> IntArray:
    """The `count` units that go last; where rows of a block must stay equally large, the same share of each row, or more.

    Parameters
    ----------
    order
        Units in the order they go.
    blocks
        Those of other groups are ignored.
    frozen
        Units and heads that must stay.
    sites
        Each keeps at least one unit.
    """
    units, last = order.tolist(), order[len(order) - count :]
    stay = np.array([*filter(frozen.__contains__, units)], dtype=np.int64)
    members = frozenset(units) if blocks else frozenset()
    own = [block for block in blocks if block.inside(members)]
    if not own:
        return _with_each(sites, np.union1d(stay, last) if len(stay) else np.sort(last), [], units, ())
    place = {unit: i for i, unit in enumerate(units)}
    shared, rest = [stay], order
    for block in _apart(own):
        rows = [sorted(set(row), key=lambda unit: place[unit]) for row in block.units.tolist()]
        quota = max(1, round(count / len(order) * max(len(row) for row in rows)))
        shared += [np.array(row[-quota:], dtype=np.int64) for row in rows]
        rest = rest[~np.isin(rest, block.units)]
    kept = np.unique(np.concatenate(shared))
    kept = np.union1d(kept, rest[len(rest) - min(max(0, count - len(kept)), len(rest)) :])
    return _with_each(sites, kept, own, place, empty_heads(own, kept, frozen))


def _with_each(
    sites: Sequence[Site], kept: IntArray, blocks: Sequence[Block], order: Iterable[int], gone: Collection[int]
) -> IntArray:
    """As `even`; and of each site at least one unit."""
    bare = [Block(site.units[None], np.array([-1])) for site in sites if not among(site.units, kept).any()]
    return even(kept, [*blocks, *bare], order, gone) if blocks or bare else kept


def without_carriers(left: IntArray, order: IntArray, blocks: Sequence[Block], sites: Sequence[Site]) -> IntArray:
    """Those of the units left that are retained, where others carry constants to the border of readers that pad.

    One makes way for each carrier, the first that may go: of all the units of a reader that pads, or of each of its groups;
    where rows must stay equally large, one of every row.
    """
    padding = [reader for site in sites for reader in site.readers if reader.border]
    if not padding:
        return left
    fixed, members = np.concatenate([site.units[~site.free] for site in sites]), {*order.tolist()}
    going = order[np.isin(order, left) & ~np.isin(order, fixed)].tolist()
    own = [block for block in blocks if block.inside(members)]
    met = {unit for site in sites if site.border for unit in site.units.tolist()}
    rows = [set(row) for block in _apart(own) if met & {*block.units.ravel().tolist()} for row in block.units.tolist()]
    rows += [set(part.tolist()) for reader in padding for part in reader.units.reshape(reader.groups, -1)]
    gone: set[int] = set()
    for row in rows:
        if not gone & row:
            gone.update([next((unit for unit in going if unit in row), -1)])
    return np.setdiff1d(left, list(gone))


def _apart(blocks: Sequence[Block]) -> Iterator[Block]:
    """Of all blocks that share units the largest, and of these the one with most rows; no row is one unit alone."""
    left = [block for block in blocks if max(len(set(row)) for row in block.units.tolist()) > 1]
    while left:
        largest = max(left, key=lambda block: (block.units.size, len(block.units)))
        yield largest
        left = [block for block in left if not np.isin(block.units, largest.units).any()]


def empty_heads(blocks: Sequence[Block], kept: IntArray, frozen: Collection[int]) -> set[int]:
    """Heads that may go and hold no unit of `kept`."""
    left = {*kept.tolist()}
    full = {h for b in blocks for h, row in zip(b.heads.tolist(), b.rows, strict=True) if not left.isdisjoint(row)}
    return {h for b in blocks for h in b.heads.tolist()} - full - {-1, *frozen}


def retained_heads(order: IntArray, count: int, blocks: Sequence[Block], frozen: Collection[int]) -> IntArray | None:
    """As many units, or a few more, in whole heads: those that go last on average. None where no heads can go."""
    members = {*order.tolist()}
    own = [block for block in blocks if (block.heads >= 0).all() and block.inside(members)]
    if not own or not np.isin(order, own[0].units).all() or set(own[0].heads.tolist()) & set(frozen):
        return None
    place = np.empty(int(order.max()) + 1)
    place[order] = np.arange(len(order))
    heads = np.unique(own[0].heads)
    rank = [float(place[own[0].units[own[0].heads == head]].mean()) for head in heads]
    stay = max(1, math.ceil(count / len(order) * len(heads)))
    if stay == len(heads):
        return None
    chosen = heads[np.argsort(rank, kind="stable")[-stay:]]
    return np.unique(own[0].units[np.isin(own[0].heads, chosen)])
