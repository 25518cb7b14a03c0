"""What explains a measured fidelity: the retained set, the fold, or the interchange law; and what tau leaves out.

No verdict depends on this. The floor takes means, covariances and curvature of the dense model from the compiler's
statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.audit.claims import stream
from mscompile.audit.report import Blame, Explanation, Unmapped
from mscompile.audit.setup import AuditOptions, Setup
from mscompile.errors import MscompileError
from mscompile.operators import IntArray
from mscompile.runs.workers import LostWorkersError
from mscompile.runtime import Arrays, Progress, no_progress
from mscompile.verification.certificate import risk_bound, risk_floor
from mscompile.verification.interchange import Correspondence, Draws, disjoint_pairs
from mscompile.verification.interventions import Setting
from mscompile.verification.metrics import Difference, Scatter

Array = npt.NDArray[np.float64]

TRIALS = 1000
"""Interchanges that effects are compared on."""
SAMPLES = 1000
"""Samples that the floor's statistics are taken from."""


def explain(setup: Setup, options: AuditOptions, progress: Progress = no_progress) -> Explanation:
    """Compare effects, split the blame, and resample what tau leaves out, all under the first claim's law."""
    law, swap, output = options.laws[0], options.swaps[0], setup.engine.output
    plain_dense, plain_compiled = setup.engine.plain(setup.samples)
    difference, effects, unexplained = Difference(classes=False), Scatter(), 0.0
    for trials in stream(setup, options, law, swap, TRIALS, progress, own=False):
        y, z = trials.dense[output].astype(np.float64), trials.matched[output].astype(np.float64)
        moved, followed = y - plain_dense[output][trials.base], z - plain_compiled[output][trials.base]
        effects.add(moved)
        unexplained += float(np.square(moved - followed).sum())
        difference.add(y, z)
    spread = difference.scatter.total / max(difference.scatter.count, 1)
    return Explanation(
        output=output,
        effect_r2=1.0 - unexplained / effects.total if effects.total > 0 else None,
        blame=_blame(setup, options, difference.relative_mse, spread),
        unmapped=_unmapped(setup, options, plain_dense, progress),
    )


# --- the unmapped test ------------------------------------------------------------------------------------------------


def _unmapped(setup: Setup, options: AuditOptions, plain: Arrays, progress: Progress) -> Unmapped | None:
    """Resample the dense units outside tau from another input; with several sites, of one site a trial."""
    sites = [site for site in setup.tau.sites if len(site.kept) < site.size]
    if not sites:
        return None
    engine, samples, measure = setup.engine, setup.samples, setup.measures[0]
    base, source = disjoint_pairs(len(samples), options.seed + 1)
    base, source = base[:TRIALS], source[:TRIALS]
    places, _ = Draws(options.seed + 1, []).take(0, len(base))
    total = 0.0
    trials = len(base) - len(base) % engine.batch_size or len(base)
    starts = range(0, trials, engine.batch_size)
    for start in progress(starts, "resample units outside tau", len(starts)):
        rows = slice(start, min(start + engine.batch_size, trials))
        values = engine.dense.read(samples.take(source[rows]).inputs, [site.dense.tensor for site in sites])
        drawn = (places[rows] * len(sites)).astype(np.int64)
        settings: dict[str, Setting] = {}
        for number, site in enumerate(sites):
            mask = np.ones((len(drawn), site.size), dtype=np.bool_)
            mask[:, site.kept] = False
            settings[site.dense.tensor] = (mask & (drawn == number)[:, None], values[site.dense.tensor])
        found = engine.dense.run(samples.take(base[rows]).inputs, settings, list(engine.answers))
        total += float(measure.loss({name: plain[name][base[rows]] for name in found}, found).sum())
    return Unmapped(
        trials=trials,
        agreement=1.0 - total / trials,
        agreement_lower=1.0 - risk_bound(total, trials, options.delta),
        agreement_upper=1.0 - risk_floor(total, trials, options.delta),
        delta=options.delta,
    )


# --- the floor --------------------------------------------------------------------------------------------------------


def _blame(setup: Setup, options: AuditOptions, measured: float, spread: float) -> Blame:
    """Split the measured difference; `spread` is the mean squared deviation of the dense outputs."""
    unknown = Blame(measured=measured, floor=None, set=None, law=None, fold=None, note="")
    try:
        floors = site_floors(setup, (0.0, options.swaps[0]))
    except LostWorkersError:
        raise
    except MscompileError as error:
        floors = error.what
    if isinstance(floors, str):
        return unknown.model_copy(update={"note": f"no floor: {floors}"})
    at_rest = float(floors[:, 0].sum()) / spread
    moved = floors[:, 1] - floors[:, 0]
    # One site is patched in each trial, or all of them; the others stand as they are without interchange.
    law = float(moved.mean() if options.laws[0] == "one-site" else moved.sum()) / spread
    return Blame(
        measured=measured,
        floor=at_rest + law,
        set=at_rest,
        law=law,
        fold=measured - at_rest - law,
        note="",
    )


def site_floors(setup: Setup, swaps: tuple[float, ...]) -> Array | str:
    """[sites, swaps] least expected squared change of the outputs that an affine fold of the retained units can have.

    tr( G (Σ_PP − C A⁻¹ Cᵀ) ), with C and A the covariances of the interventional fit and G the outputs' curvature; a reason
    where the compiler has no statistics of a site.
    """
    from mscompile.calibration.calibration import calibrate
    from mscompile.network.dense import open_dense
    from mscompile.options import Options
    from mscompile.planning.preparation import what_to_measure
    from mscompile.planning.scores import joint_curvature

    dense = open_dense(setup.dense.path)
    known = {site.tensor: site for site in dense.scm.sites}
    mapped = [site for site in setup.tau.sites if len(site.kept) < site.size]
    if not mapped:
        return np.zeros((1, len(swaps)))
    strange = [s.dense.tensor for s in mapped if s.dense.tensor not in known or known[s.dense.tensor].size != s.size]
    if strange:
        return f"the compiler knows no site {strange[0]}"
    measure = what_to_measure(dense, Options(replacement="affine-pointwise", swap=0.5, output={setup.engine.output: 1.0}))
    chosen = [known[site.dense.tensor] for site in mapped]
    samples = setup.samples.take(slice(SAMPLES - SAMPLES % setup.engine.batch_size or setup.engine.batch_size))
    # How many passes a memory limit allows is not to show in what is found.
    size, run = setup.engine.batch_size, replace(setup.run, memory=None)
    statistics = calibrate(dense.scm, chosen, samples, batch_size=size, measure=measure, run=run)
    if statistics.refused:
        return next(iter(statistics.refused.values()))
    return np.array(
        [
            [_floor(joint_curvature(k, statistics), statistics.moments[k.tensor], site, swap) for swap in swaps]
            for k, site in zip(chosen, mapped, strict=True)
        ]
    )


def _floor(curvature: Array, moments: Any, site: Correspondence, swap: float) -> float:
    sigma, common = moments.covariance, moments.common
    kept: IntArray = site.kept
    away = np.setdiff1d(np.arange(site.size), kept)
    both = (1 - swap) ** 2 + swap**2
    bracket = (both * sigma + (1 - both) * common)[np.ix_(kept, kept)]
    diagonal = np.diagonal(sigma)[kept]
    bracket[np.diag_indices_from(bracket)] = diagonal * (1 + 1e-6) + 1e-12 * max(float(diagonal.mean()), 1e-30)
    cross = ((1 - swap) * sigma + swap * common)[np.ix_(kept, away)]
    left = sigma[np.ix_(away, away)] - cross.T @ scipy.linalg.solve(bracket, cross, assume_a="pos")
    return float(np.sum(curvature[np.ix_(away, away)] * left))
