"""Choosing which units stay: backward elimination under affine replacement.

Additive scores ignore that replaced units can stand in for each other. Here the unit whose removal costs least, given all
removed before it, goes next; what it did is passed on to the retained ones at once. For a site with covariance Σ, curvature
G and A = Σ + c diag Σ, with c = (1−q)/q for interchange (see `fit_affine`), on the kept set K:

    cost of r = ½ M_rr / (A⁻¹)_rr,     M = [I; B]ᵀ G [I; B],     B the regression of the removed on K under A,

which is the structured form of the optimal brain surgeon. Removing r updates both by

    A⁻¹ ← A⁻¹ − p pᵀ / p_r,  M ← M + b mᵀ + m bᵀ + M_rr b bᵀ,  p, m = columns r of A⁻¹, M,  b = −p / p_r.

One elimination ranks the units for every size at once, in O(channels³) time and a few channels² of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.operators import IntArray
from mscompile.replacements import TINY, interchanged, stabilise
from mscompile.scm import Site
from mscompile.scores import Scores, joint_curvature
from mscompile.statistics import Moments, Statistics
from mscompile.units import even

Array = npt.NDArray[np.float64]

BLOCK_SHARE = 1 / 128
"""Share of the remaining units removed at a time: one by one up to 255 of them, in blocks beyond, where single updates would
be bound by memory."""


@dataclass
class _State:
    """A site on the way: inverse bracket and curvature, rows and columns of removed channels zero, and each channel's unit.

    Removed channels stay in the arrays, which are updated in place by BLAS, until half of them are gone.
    """

    inverse: Array
    curvature: Array
    units: IntArray
    alive: npt.NDArray[np.bool_]

    def costs(self) -> tuple[IntArray, Array]:
        """Units left and half the predicted risk added by removing each."""
        curvature, inverse = np.diagonal(self.curvature)[self.alive], np.diagonal(self.inverse)[self.alive]
        return self.units[self.alive], 0.5 * curvature / np.maximum(inverse, TINY)

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
        self.alive[r] = False
        if 2 * self.alive.sum() < len(self.alive):
            left = np.flatnonzero(self.alive)
            self.inverse, self.curvature = self.inverse[np.ix_(left, left)], self.curvature[np.ix_(left, left)]
            self.units, self.alive = self.units[left], self.alive[left]


def additive_order(sites: Sequence[Site], scores: Scores) -> IntArray:
    """Units of a group in the order they go by the sum of their scores at its sites, least first; what stays is last."""
    units, total = _totals(sites)
    for site in sites:
        np.add.at(total, np.searchsorted(units, site.units), scores.risk[site.tensor])
    return units[np.argsort(total, kind="stable")]


def _totals(sites: Sequence[Site]) -> tuple[IntArray, Array]:
    """Units of a group and a sum for each to start from: infinite for those that must stay."""
    units = np.unique(np.concatenate([site.units for site in sites]))
    fixed = np.concatenate([site.units[~site.free] for site in sites])
    return units, np.where(np.isin(units, fixed), np.inf, 0.0)


def joint_order(sites: Sequence[Site], statistics: Statistics, swap: float) -> IntArray:
    """Units of a group in the order they go by backward elimination; `swap` is that of the affine fit."""
    states = [
        _State(
            _inverse(site, statistics.moments[site.tensor], swap),
            np.array(joint_curvature(site, statistics), order="C"),
            site.units,
            np.ones(site.size, dtype=np.bool_),
        )
        for site in sites
    ]
    left, start = _totals(sites)
    order: list[IntArray] = []
    while (going := int(np.isfinite(start).sum())) > 0 and len(left) > 1:
        total = start.copy()
        for state in states:
            own, cost = state.costs()
            np.add.at(total, np.searchsorted(left, own), cost)
        count = min(max(1, int(len(left) * BLOCK_SHARE)), len(left) - 1, going)
        chosen = np.argsort(total, kind="stable")[:count]
        order.append(left[chosen])
        for state in states:
            state.remove(left[chosen])
        left, start = np.delete(left, chosen), np.delete(start, chosen)
    return np.concatenate([*order, left])


def _inverse(site: Site, moments: Moments, swap: float) -> Array:
    """Inverse of the interchanged covariance, ridge included; channels of different rows cannot stand in for each other."""
    bracket = interchanged(moments.covariance, moments.common, swap)
    if site.rows is not None:
        bracket *= site.rows[:, None] == site.rows
    stabilise(bracket)
    factor = scipy.linalg.cho_factor(bracket, lower=True, overwrite_a=True)
    inverse: Array = np.ascontiguousarray(scipy.linalg.cho_solve(factor, np.eye(len(bracket))))
    return inverse


def retained_units(order: IntArray, count: int, blocks: Sequence[IntArray]) -> IntArray:
    """The `count` units that go last; where rows of a block must stay equally large, the same share of each row, or more.

    Parameters
    ----------
    order
        Units in the order they go.
    blocks
        [rows, units in a row] each; those of other groups are ignored.
    """
    own = [block for block in blocks if np.isin(block, order).all()]
    kept = order[len(order) - count :]
    if not own:
        return np.sort(kept)
    place = {unit: i for i, unit in enumerate(order.tolist())}
    largest = max(own, key=lambda block: block.size)
    quota = max(1, round(count / len(order) * largest.shape[1]))
    chosen = set(kept[~np.isin(kept, largest)].tolist())
    for row in largest.tolist():
        chosen.update(sorted(set(row), key=lambda unit: place[unit])[-quota:])
    return even(np.array(sorted(chosen), dtype=np.int64), own, order.tolist())
