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
from mscompile.planning.plan import Plan, SitePlan
from mscompile.planning.scores import Scores, measured_risk, predictable
from mscompile.runs import shelf
from mscompile.runtime import Arrays, Progress, Session, no_progress
from mscompile.verification.interventions import Intervened
from mscompile.verification.skeletons import Skeleton, skeleton_of
from mscompile.verification.surgery import Patch, feed, float_type, patched, replaced
from mscompile.verification.verify import replacement_of

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
    model: ir.Model,
    plan: Plan,
    ranks: Mapping[str, int],
    outputs: Mapping[str, float],
    samples: Samples,
    batch_size: int,
    opened: Intervened | None = None,
) -> dict[str, float]:
    """Measured risk of each planned site replaced alone, where its prediction is of a measurable risk.

    All that uses the tensor sees the replaced channels, residual sums besides readers: so does the derivative that predicts.
    Costs one run of the dense model over `samples`, and one more per site.

    Parameters
    ----------
    opened
        The dense model, in which the planned sites can be set. Taken for a large one: a session of its own per site, which
        runs what onnxruntime has fused and takes readers' new weights, would take longer to load than to run.
    """
    planned = [site for site in plan.sites if predictable(site.basis)]
    if not planned:
        return {}
    skeleton = skeleton_of(model)
    if opened is not None and skeleton.weight_bytes > shelf.LARGE and not any(site.windows for site in planned):
        return _risks_in_one(opened, planned, outputs, samples, batch_size)
    dense = Session(skeleton).run_all(samples.batches(batch_size), list(outputs))
    risks = {}
    for site in planned:
        do = replacement_of(site, Patch(site.tensor, ranks[site.tensor], site.axis))
        found = Session(replaced(skeleton, [do])).run_all(samples.batches(batch_size), list(outputs))
        risks[site.tensor] = measured_risk(site.basis, dense, found, outputs) / len(samples)
    return risks


def _risks_in_one(
    opened: Intervened, planned: Sequence[SitePlan], outputs: Mapping[str, float], samples: Samples, batch_size: int
) -> dict[str, float]:
    """The same by setting the replaced channels of one site after the other."""
    risks = {site.tensor: 0.0 for site in planned}
    patches = {patch.tensor: patch for patch in opened.patches}
    for batch in samples.batches(batch_size):
        dense = opened.run(batch, {}, list(outputs))
        for site in planned:
            mask = np.ones((1, site.size), dtype=np.bool_)
            mask[0, site.kept] = False
            values = np.zeros(site.size, dtype=np.float32)
            values[site.replaced] = site.constants
            values = values.reshape([-1 if axis == site.axis else 1 for axis in range(patches[site.tensor].rank)])
            if site.affine is not None:
                rows = np.moveaxis(opened.read(batch, [site.tensor])[site.tensor], site.axis, -1).astype(np.float32)
                rows[..., site.replaced] = rows[..., site.kept] @ site.affine.T + site.constants
                values = np.moveaxis(rows, -1, site.axis)
            found = opened.run(batch, {site.tensor: (mask, values)}, list(outputs))
            risks[site.tensor] += measured_risk(site.basis, dense, found, outputs) / len(samples)
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
