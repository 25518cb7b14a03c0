"""Shrinkage: covariances of few observations are brought nearer to their diagonal, by as much as does best on data held out.

An affine fit from n observations of d channels follows their chance correlations unless n is many times d. With Σ shrunk,

    Σ' = Σ / (1 + λ) off the diagonal,

the fit is the one with a ridge of λ times each channel's own variance, and what it leaves unexplained is no longer taken
for nothing: order, fits and predicted risks see the same covariance. λ is that of least risk on samples that took no part,

    ½ tr(G_PP R),    R = Σ_PP − B C − Cᵀ Bᵀ + B A Bᵀ + b bᵀ,

B fitted with λ; Σ, C = Cov(h, a_P), A = Cov(h) and the mean error b of the held-out samples, under interchange
(`mscompile.planning.replacements.fit_affine`), over several shares of the units replaced, those of the smallest scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.statistics import Moments, Statistics
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.network.scm import Site
from mscompile.operators import IntArray
from mscompile.planning.replacements import AFFINE_FITS, fit_affine, interchanged, stabilise
from mscompile.planning.scores import Scores, joint_curvature
from mscompile.planning.selection import dependent_units, eliminate_by_score
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress

Array = npt.NDArray[np.float64]

SCARCE = 10
"""Observations per channel from which nothing is gained: the best λ lowers the risk of least squares by 1 to 2 % there, that
of fits for interchange not at all (`tests/benchmarks/few_samples.py`)."""
FEWEST = 2
"""Samples held out: what different samples have in common takes two."""
REPLACED = (0.25, 0.5, 0.75)
"""Shares of the units replaced, over which risks are compared."""
PAYS = 0.9
"""Share of the risk of λ = 0 above which that stays: what a few samples held out tell apart is coarser."""
SHARES = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
"""Values of λ tried."""


def with_shrinkage(
    source: DenseModel,
    statistics: Statistics,
    scores: Scores,
    held: Samples,
    *,
    replacement: str,
    swap: float,
    batch_size: int,
    run: Run = ALONE,
    progress: Progress = no_progress,
) -> tuple[Statistics, Mapping[str, float]]:
    """Shrink the covariances of sites with fewer than `SCARCE` observations per channel; also λ by site tensor.

    Sites with units that depend on others are left as they are, and so are fits that take few parents.

    Parameters
    ----------
    held
        Samples that took no part in `statistics`. One forward pass over them, where there is such a site.
    """
    if AFFINE_FITS.get(replacement) is not fit_affine or len(held) < FEWEST:
        return statistics, {}
    scarce = [
        site
        for sites in source.groups.values()
        for site in sites
        if statistics.moments[site.tensor].count < SCARCE * site.size and not len(dependent_units(sites, statistics))
    ]
    if not scarce:
        return statistics, {}
    measure = Measure(covariance=True, shared=swap > 0)
    seen = calibrate(source.scm, scarce, held, batch_size=batch_size, measure=measure, run=run, progress=progress).moments
    moments, found = dict(statistics.moments), {}
    for site in scarce:
        order = eliminate_by_score(source.groups[site.group], scores).order
        own, curvature = moments[site.tensor], joint_curvature(site, statistics)
        risks = [
            held_out_risks(site, own, seen[site.tensor], order[int(share * len(order)) :], curvature, swap)
            for share in REPLACED
        ]
        found[site.tensor] = least(np.array(risks))
        moments[site.tensor] = shrunk(own, found[site.tensor])
    return replace(statistics, moments=moments), found


def least(risks: Array) -> float:
    """λ of [fits, len(SHARES)] risks: the one that lowers them most, by the geometric mean; none where that does not pay."""
    tiny = float(np.finfo(np.float32).tiny)
    logs = np.log(np.maximum(risks, tiny))
    gains = (logs - logs[:, :1]).mean(axis=0)
    best = int(gains.argmin())
    return SHARES[best] if gains[best] < np.log(PAYS) else 0.0


def shrunk(moments: Moments, share: float) -> Moments:
    """Moments with covariances nearer to their diagonal; `share` is λ."""
    return replace(moments, scatter=_shrunk(moments.scatter, share), shared=_shrunk(moments.shared, share))


def _shrunk(scatter: Array | None, share: float) -> Array | None:
    if scatter is None or not share:
        return scatter
    found = scatter / (1 + share)
    found[np.diag_indices_from(found)] = np.diagonal(scatter)
    return found


def held_out_risks(
    site: Site, moments: Moments, seen: Moments, kept_units: IntArray, curvature: Array, swap: float
) -> Array:
    """[len(SHARES)]: risk of a site under interchange, fitted with `moments` shrunk, on samples whose moments are `seen`.

    With D the diagonal of the bracket that a fit inverts and Q Λ Qᵀ = D^-½ (bracket) D^-½, every λ has the fit
    B = (cross D^-½ Q) (Λ + λ)⁻¹ (D^-½ Q)ᵀ, so that one decomposition and a few products serve all of them.
    """
    stays = np.isin(site.units, kept_units)
    kept, replaced = np.flatnonzero(stays), np.flatnonzero(~stays)
    if not len(kept) or not len(replaced):
        return np.zeros(len(SHARES))
    bracket, cross, _ = _interchanged(moments, kept, replaced, swap)
    if site.rows is not None:
        bracket *= site.rows[kept, None] == site.rows[kept]
        cross *= site.rows[kept, None] == site.rows[replaced]
    stabilise(bracket)
    scale = 1.0 / np.sqrt(np.diagonal(bracket))
    values, vectors = scipy.linalg.eigh(scale[:, None] * bracket * scale, overwrite_a=True)
    turned = scale[:, None] * vectors
    here, there, spread = _interchanged(seen, kept, replaced, swap, seen.mean - moments.mean)
    weight, along = curvature[np.ix_(replaced, replaced)], turned.T @ cross
    weighted = along @ weight
    # tr(G B C) and tr(G B A Bᵀ), by direction and by pair of directions.
    first = np.einsum("ij,ij->i", weighted, turned.T @ there)
    second = (weighted @ along.T) * (turned.T @ here @ turned)
    left = 1.0 / (values + np.array(SHARES)[:, None])
    risks: Array = np.sum(weight * spread) - 2.0 * left @ first + np.einsum("si,ij,sj->s", left, second, left)
    return 0.5 * risks


def _interchanged(
    moments: Moments, kept: IntArray, replaced: IntArray, swap: float, shift: Array | None = None
) -> tuple[Array, Array, Array]:
    """Second moments under interchange, about the mean less `shift`: of kept channels, with replaced ones, and of these."""
    sigma, common = moments.covariance, moments.common
    bracket = interchanged(sigma, common, swap)[np.ix_(kept, kept)]
    cross = ((1 - swap) * sigma + swap * common)[np.ix_(kept, replaced)]
    spread = sigma[np.ix_(replaced, replaced)]
    if shift is None:
        return bracket, cross, spread
    k, p = shift[kept], shift[replaced]
    return bracket + np.outer(k, k), cross + np.outer(k, p), spread + np.outer(p, p)
