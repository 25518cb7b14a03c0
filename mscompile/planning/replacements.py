"""Fitting replacements: the affine map that stands in for a unit's mechanism. Constants come with the scores.

All fits are closed forms of a site's mean μ and covariance Σ, for retained channels K and replaced channels P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.calibration.statistics import Moments
from mscompile.machine import blas_threads
from mscompile.operators import IntArray
from mscompile.runs.shelf import Shelf

Array = npt.NDArray[np.float64]

RIDGE = 1e-6
"""Share of its own variance added to each retained channel's, so that dependent channels do no harm.

Float32 sums carry a relative error of about 1e-7; directions of smaller variance are noise. A share of its own, so that
rescaling a unit changes nothing.
"""
ROUNDING = float(np.finfo(np.float32).eps)
"""Relative error of a sum of products in float32."""
FLOOR = 1e-12
"""Share of the mean variance added besides, for channels that do not vary at all."""
TINY = float(np.finfo(np.float32).tiny)
PARENTS = 8
"""Retained parents of a replaced unit in the sparse fit, as in Asiaee 2026."""


@dataclass(frozen=True)
class Fit:
    """``a_P := constants + matrix · a_K``.

    Attributes
    ----------
    constants
        [replaced], in the units of the activation.
    matrix
        [replaced, retained]; None for constant replacement.
    """

    constants: Array
    matrix: Array | None

    def error_moment(self, moments: Moments, kept: IntArray, replaced: IntArray) -> Array:
        """[replaced, replaced]: second moment of replacement minus activation on the calibration data.

        Without covariance in `moments`, errors of different channels are taken as uncorrelated.
        """
        if self.matrix is None:
            bias = self.constants - moments.mean[replaced]
            spread = np.diag(moments.variance) if moments.scatter is None else moments.covariance
            return spread[np.ix_(replaced, replaced)] + np.outer(bias, bias)
        sigma = moments.covariance
        bias = self.constants + self.matrix @ moments.mean[kept] - moments.mean[replaced]
        cross = self.matrix @ sigma[np.ix_(kept, replaced)]
        residual = sigma[np.ix_(replaced, replaced)] - cross - cross.T
        return residual + self.matrix @ sigma[np.ix_(kept, kept)] @ self.matrix.T + np.outer(bias, bias)


def fit_affine(moments: Moments, kept: IntArray, replaced: IntArray, swap: float) -> Fit:
    """Affine map of all retained channels, of least squared error under interchange with swap probability p.

    With V = Σ − X, X the covariance between different samples at the same position, which a swapped unit keeps,

        ``B = ((1−p) V_PK + X_PK) [q V_KK + (1−q) diag V_KK + X_KK]⁻¹``,  ``q = (1−p)² + p²``,

    and ``μ_P − B μ_K``. p = 0 is least squares, and without positions p = 1 is the constant.
    """
    sigma, common = moments.covariance, moments.common
    bracket = interchanged(sigma, common, swap)[np.ix_(kept, kept)]
    stabilise(bracket)
    cross = ((1 - swap) * sigma + swap * common)[np.ix_(kept, replaced)]
    matrix = scipy.linalg.solve(bracket, cross, assume_a="pos").T
    return Fit(moments.mean[replaced] - matrix @ moments.mean[kept], matrix)


@dataclass(frozen=True)
class Factor:
    """What `fit_affine` inverts, factored along an order: fits on the last channels of it are half a solution away.

    The bracket of retained channels is a leading block of the whole one, those that go last first, and so is its factor.

    Attributes
    ----------
    order
        Channels, last to go first.
    lower
        Cholesky factor L in that order.
    half
        L⁻¹ times the cross-covariance ``(1−p) V + X`` of `fit_affine`, both axes in that order; above the diagonal alone
        where samples have nothing in common.
    """

    moments: Moments
    swap: float
    order: IntArray
    lower: Array
    half: Array

    @classmethod
    def make(cls, moments: Moments, swap: float, order: IntArray) -> Factor | None:
        """None where the bracket is not positive definite to rounding."""
        sigma, common, places = moments.covariance, moments.common, np.ix_(order, order)
        bracket = interchanged(sigma, common, swap)[places]
        stabilise(bracket)
        try:
            with blas_threads(len(bracket)):
                lower = scipy.linalg.cholesky(bracket.T, lower=True, overwrite_a=True)  # symmetric; as LAPACK lays it out
                if moments.shared is None:  # off the diagonal, where it is read, the cross-covariance is α times the bracket
                    return cls(moments, swap, order, lower, nested_share(swap) * lower.T)
                cross = ((1 - swap) * sigma + swap * common)[places]
                return cls(moments, swap, order, lower, scipy.linalg.solve_triangular(lower, cross, lower=True))
        except scipy.linalg.LinAlgError:
            return None

    @cached_property
    def upper(self) -> Array:
        """L⁻ᵀ."""
        with blas_threads(len(self.lower)):
            return np.asarray(scipy.linalg.lapack.dtrtri(self.lower, lower=True)[0].T)

    def on(self, shelf: Shelf) -> Factor:
        """The same with its matrices on a shelf."""
        return replace(self, lower=shelf.put(self.lower), half=shelf.put(self.half))

    def fits(self, kept: IntArray, swap: float) -> bool:
        """Whether the retained channels are the last ones, and the swap probability is that of the factor."""
        return swap == self.swap and np.array_equal(np.sort(self.order[: len(kept)]), kept)

    def fit(self, kept: IntArray, replaced: IntArray) -> Fit:
        """As `fit_affine`, up to the floor of the ridge."""
        k = len(kept)
        matrix = scipy.linalg.solve_triangular(self.lower[:k, :k], self.half[:k, k:], lower=True, trans="T")
        matrix = matrix[np.ix_(np.argsort(self.order[:k]), np.argsort(self.order[k:]))]
        return Fit(self.moments.mean[replaced] - self.moments.mean[kept] @ matrix, matrix.T)


def nested_share(swap: float) -> float:
    """α, by which the cross-covariance of `fit_affine` is off the diagonal a multiple of the bracket where X = 0."""
    return (1 - swap) / ((1 - swap) ** 2 + swap**2)


def fit_by_row(
    fit: Callable[[Moments, IntArray, IntArray, float], Fit],
    moments: Moments,
    kept: IntArray,
    replaced: IntArray,
    swap: float,
    rows: IntArray,
) -> Fit:
    """The same fit where a replaced channel may be a function of the retained channels of its own row only."""
    constants, matrix = np.empty(len(replaced)), np.zeros((len(replaced), len(kept)))
    for row in np.unique(rows[replaced]):
        to, away = np.flatnonzero(rows[kept] == row), np.flatnonzero(rows[replaced] == row)
        if not len(to):
            constants[away] = moments.mean[replaced[away]]
            continue
        part = fit(moments, kept[to], replaced[away], swap)
        constants[away] = part.constants
        if part.matrix is not None:
            matrix[np.ix_(away, to)] = part.matrix
    return Fit(constants, matrix)


def stabilise(bracket: Array) -> None:
    """Add the ridge to a covariance, in place, so that it is positive definite whatever rounding made of it.

    Sums of n channels are known to `ROUNDING` of their standard deviations, entry by entry, which moves an eigenvalue of the
    correlations by n times as much at most; no direction that varies less than that is told from noise.
    """
    diagonal = np.diagonal(bracket)
    ridge = max(RIDGE, ROUNDING * len(bracket))
    bracket[np.diag_indices_from(bracket)] = diagonal * (1 + ridge) + FLOOR * max(float(diagonal.mean()), TINY)


def interchanged(sigma: Array, common: Array, swap: float) -> Array:
    """[channels, channels]: covariance of the channels after each is swapped with probability `swap`."""
    both = (1 - swap) ** 2 + swap**2
    mixed = both * sigma + (1 - both) * common
    mixed[np.diag_indices_from(mixed)] = np.diagonal(sigma)
    return mixed


def fit_parents(moments: Moments, kept: IntArray, replaced: IntArray, swap: float) -> Fit:
    """Least squares on the `PARENTS` most correlated retained channels of each replaced one (Asiaee 2026, section 4)."""
    del swap
    sigma = moments.covariance
    scale = np.sqrt(np.maximum(moments.variance, TINY))
    strength = np.abs(sigma[np.ix_(replaced, kept)]) / scale[kept]
    matrix = np.zeros((len(replaced), len(kept)))
    count = min(PARENTS, len(kept))
    for row, channel in enumerate(replaced.tolist()):
        parents = np.sort(np.argsort(-strength[row], kind="stable")[:count])
        chosen = kept[parents]
        within = sigma[np.ix_(chosen, chosen)]
        stabilise(within)
        matrix[row, parents] = scipy.linalg.solve(within, sigma[chosen, channel], assume_a="pos")
    return Fit(moments.mean[replaced] - matrix @ moments.mean[kept], matrix)


CONSTANT = "constant"
WINDOWED = "affine"
"""The affine replacement that also fits readers by their windows, where they have any."""
AFFINE_FITS: Mapping[str, Callable[[Moments, IntArray, IntArray, float], Fit]] = {
    WINDOWED: fit_affine,
    "affine-pointwise": fit_affine,
    "affine-parents": fit_parents,
}
REPLACEMENTS = (*AFFINE_FITS, CONSTANT)
