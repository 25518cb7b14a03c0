"""Predicted against measured: how well the scores foretell what replacing a unit does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import scipy.stats

from mscompile.calibration.statistics import Array, Statistics
from mscompile.intake.samples import Samples
from mscompile.network.scm import Site
from mscompile.operators import IntArray
from mscompile.pages.drawing import Series, scatter
from mscompile.planning.plan import Plan
from mscompile.planning.probe import Probe
from mscompile.planning.scores import Scores, measured_risk, predictable
from mscompile.planning.tuning import Tunable
from mscompile.runs.work import NOWHERE, Work
from mscompile.runtime import Arrays, Progress, Session, no_progress
from mscompile.verification.skeletons import Skeleton, skeleton_of
from mscompile.verification.surgery import Patch, feed, float_type, patched

UNEQUAL = 10.0
"""Ratio of variances of outputs from which the larger decides alone what is kept."""


def imbalance(model: ir.Model, outputs: Mapping[str, float], batch: Arrays) -> tuple[str, ...]:
    """What the user should know of outputs that are scored together on scales far apart."""
    if len(outputs) < 2:
        return ()
    found = Session(model).run(batch, list(outputs))
    spreads = {name: weight * float(found[name].astype(np.float64).var(axis=0).sum()) for name, weight in outputs.items()}
    least, most = min(spreads, key=spreads.__getitem__), max(spreads, key=spreads.__getitem__)
    if spreads[most] <= UNEQUAL * spreads[least] or spreads[least] == 0:
        return ()
    ratio = spreads[most] / spreads[least]
    remedy = " ".join(f"--output {name}={w * spreads[most] / (spreads[name] or np.inf):.3g}" for name, w in outputs.items())
    return (f"output {most!r} varies {ratio:.3g} times as much as {least!r} and decides what is kept; to balance: {remedy}",)


def site_risks(
    tunable: Tunable,
    plan: Plan,
    outputs: Mapping[str, float],
    samples: Samples,
    batch_size: int,
    work: Work = NOWHERE,
) -> dict[str, float]:
    """Measured risk of each planned site replaced alone, where its prediction is of a measurable risk.

    Costs one run of the dense model over `samples`, and for each site one of what lies behind it.
    """
    planned = [site for site in plan.sites if predictable(site.basis)]
    if not planned:
        return {}
    probe, risks = Probe(tunable, outputs, samples, batch_size, work), {}
    for site in planned:
        probe.advance(site.tensor)
        risks[site.tensor] = probe.risk([site], site.basis)
    return risks


@dataclass(frozen=True)
class UnitCheck:
    """One unit replaced alone by its constant."""

    channel: int
    predicted: float
    measured: float
    variance: float


@dataclass(frozen=True)
class SiteCheck:
    """Prediction against measurement for a sample of a site's units.

    Attributes
    ----------
    spearman, of_variance
        Rank correlation of predicted and measured risk, and of the unit's variance and that; NaN for fewer than two units.
    ratio
        Median of predicted over measured, over units whose measured risk is not zero.
    """

    tensor: str
    basis: str
    units: tuple[UnitCheck, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation."""
        return _rank_correlation([u.predicted for u in self.units], [u.measured for u in self.units])

    @property
    def of_variance(self) -> float:
        """Rank correlation of the variance."""
        return _rank_correlation([u.variance for u in self.units], [u.measured for u in self.units])

    @property
    def ratio(self) -> float:
        """Median of predicted over measured."""
        ratios = [u.predicted / u.measured for u in self.units if u.measured > 0]
        return float(np.median(ratios)) if ratios else float("nan")


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    return float(scipy.stats.spearmanr(x, y).statistic) if len(x) > 1 else float("nan")


def check_units(
    model: ir.Model,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    scores: Scores,
    statistics: Statistics,
    outputs: Mapping[str, float],
    samples: Samples,
    *,
    count: int | None,
    batch_size: int,
    seed: int = 0,
    exclude: Mapping[str, IntArray] | None = None,
    progress: Progress = no_progress,
) -> list[SiteCheck]:
    """Replace units one at a time by their constants and compare with the scores: one intervened run per unit.

    Parameters
    ----------
    outputs
        Weight by name of the outputs whose change is measured.
    count
        Units drawn per site; all if None.
    exclude
        Units by site that are not drawn: those that the predictions were scaled on.
    """
    skeleton, rng = skeleton_of(model), np.random.default_rng(seed)
    dense, checks, exclude = Session(skeleton), [], exclude or {}
    for site in progress(sites, "check predictions", len(sites)):
        free = np.setdiff1d(np.arange(site.size), exclude.get(site.tensor, []))
        units = free if count is None or count >= len(free) else np.sort(rng.choice(free, count, replace=False))
        basis, constants = scores.basis[site.tensor], [scores.constants[site.tensor]]
        rank = ranks[site.tensor]
        (measured,) = unit_risks(skeleton, dense, site, rank, constants, units, basis, outputs, samples, batch_size)
        predicted, variance = scores.risk[site.tensor][units], statistics.moments[site.tensor].variance[units]
        rows = zip(units.tolist(), predicted.tolist(), measured.tolist(), variance.tolist(), strict=True)
        checks.append(SiteCheck(site.tensor, basis, tuple(UnitCheck(*row) for row in rows)))
    return checks


def unit_risks(
    model: Skeleton,
    dense: Session,
    site: Site,
    rank: int,
    constants: Sequence[Array],
    units: IntArray,
    basis: str,
    outputs: Mapping[str, float],
    samples: Samples,
    batch_size: int,
) -> Array:
    """[rules, units]: measured risk of replacing each unit alone by its constant under each rule, one run each."""
    patch = Patch(site.tensor, rank, site.axis)
    intervened = Session(patched(model, [patch]))
    shape = [site.size if axis == site.axis else 1 for axis in range(rank)]
    values = [rule.reshape(shape).astype(float_type(model)) for rule in constants]
    risks = np.zeros((len(constants), len(units)))
    for batch in samples.batches(batch_size):  # every unit on a batch before the next one: its outputs alone are held
        expected = dense.run(batch, list(outputs))
        for i, unit in enumerate(units):
            mask = np.zeros((1, site.size), dtype=np.bool_)
            mask[0, unit] = True
            for k, value in enumerate(values):
                found = intervened.run({**batch, **feed(patch, mask, value)}, list(outputs))
                risks[k, i] += measured_risk(basis, expected, found, outputs)
    return risks / len(samples)


def plot_checks(checks: Sequence[SiteCheck]) -> str:
    """Predicted against measured risk of single units as an SVG, sites where both are risks at the outputs."""
    series = [
        Series(
            check.tensor,
            [unit.predicted for unit in check.units],
            [unit.measured for unit in check.units],
            labels=[f"{check.tensor} {unit.channel}" for unit in check.units],
        )
        for check in checks
        if predictable(check.basis)
    ]
    described = "; ".join(f"{c.tensor}: rank correlation {c.spearman:.3f}" for c in checks if predictable(c.basis))
    names = list(dict.fromkeys(check.basis for check in checks if predictable(check.basis)))
    return scatter(
        series,
        title="Predicted against measured risk of single units",
        description=f"{'; '.join(names) or 'no site has a risk at the outputs'}. {described}",
        x="predicted risk",
        y="measured risk",
        log_x=True,
        log_y=True,
        identity=True,
    )
