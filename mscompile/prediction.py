"""Predicted against measured: how well the scores foretell what replacing a unit does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import scipy.stats

from mscompile.data import Samples
from mscompile.metrics import kl_divergence
from mscompile.plan import Plan
from mscompile.runtime import Arrays, Progress, Session, no_progress
from mscompile.scm import Site
from mscompile.scores import DIVERGENCE, SQUARED_OUTPUTS, Scores
from mscompile.surgery import Patch, feed, float_type, patched, replaced
from mscompile.verify import replacement_of

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


def measured_risk(basis: str, dense: Arrays, intervened: Arrays, outputs: Mapping[str, float]) -> float:
    """What a score of that basis predicts, measured, summed over samples: half the squared distance of outputs, or their KL.

    Parameters
    ----------
    outputs
        Weight by name of output.
    """
    total = 0.0
    for output, weight in outputs.items():
        y, z = dense[output].astype(np.float64), intervened[output].astype(np.float64)
        if basis == DIVERGENCE:
            total += weight * kl_divergence(y, z) * float(np.prod(y.shape[:-1]))
        else:
            total += weight * 0.5 * float(np.square(y - z).sum())
    return total


def predictable(basis: str) -> bool:
    """Whether a basis is a risk that can be measured at the outputs."""
    return basis in (SQUARED_OUTPUTS, DIVERGENCE)


def site_risks(
    model: ir.Model,
    plan: Plan,
    ranks: Mapping[str, int],
    outputs: Mapping[str, float],
    samples: Samples,
    batch_size: int,
) -> dict[str, float]:
    """Measured risk of each planned site replaced alone, where its prediction is of a measurable risk.

    Costs one run of the dense model over `samples`, and one more per site.
    """
    planned = [site for site in plan.sites if predictable(site.basis)]
    if not planned:
        return {}
    proto = ir.to_proto(model)
    dense = Session(proto).run_all(samples.batches(batch_size), list(outputs))
    risks = {}
    for site in planned:
        do = replacement_of(site, Patch(site.tensor, ranks[site.tensor], site.axis))
        found = Session(replaced(proto, [do])).run_all(samples.batches(batch_size), list(outputs))
        risks[site.tensor] = measured_risk(site.basis, dense, found, outputs) / len(samples)
    return risks


@dataclass(frozen=True)
class UnitCheck:
    """One unit replaced alone by its constant."""

    channel: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class SiteCheck:
    """Prediction against measurement for a sample of a site's units.

    Attributes
    ----------
    spearman
        Rank correlation of predicted and measured risk; NaN for fewer than two units.
    ratio
        Median of predicted over measured, over units whose measured risk is not zero.
    """

    tensor: str
    basis: str
    units: tuple[UnitCheck, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation."""
        if len(self.units) < 2:
            return float("nan")
        return float(scipy.stats.spearmanr([u.predicted for u in self.units], [u.measured for u in self.units]).statistic)

    @property
    def ratio(self) -> float:
        """Median of predicted over measured."""
        ratios = [u.predicted / u.measured for u in self.units if u.measured > 0]
        return float(np.median(ratios)) if ratios else float("nan")


def check_units(
    model: ir.Model,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    scores: Scores,
    outputs: Mapping[str, float],
    samples: Samples,
    *,
    count: int | None,
    batch_size: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[SiteCheck]:
    """Replace units one at a time by their constants and compare with the scores: one intervened run per unit.

    Parameters
    ----------
    outputs
        Weight by name of the outputs whose change is measured.
    count
        Units drawn per site; all if None.
    """
    proto, rng = ir.to_proto(model), np.random.default_rng(seed)
    dense, checks = Session(proto), []
    for site in progress(sites, "check predictions", len(sites)):
        chosen = np.arange(site.size) if count is None or count >= site.size else rng.choice(site.size, count, replace=False)
        units, basis = np.sort(chosen), scores.basis[site.tensor]
        patch = Patch(site.tensor, ranks[site.tensor], site.axis)
        intervened = Session(patched(proto, [patch]))
        shape = [site.size if axis == site.axis else 1 for axis in range(patch.rank)]
        constants = scores.constants[site.tensor].reshape(shape).astype(float_type(proto))
        risks = np.zeros(len(units))
        for batch in samples.batches(batch_size):  # every unit on a batch before the next one: its outputs alone are held
            expected = dense.run(batch, list(outputs))
            for i, unit in enumerate(units):
                mask = np.zeros((1, site.size), dtype=np.bool_)
                mask[0, unit] = True
                found = intervened.run({**batch, **feed(patch, mask, constants)}, list(outputs))
                risks[i] += measured_risk(basis, expected, found, outputs)
        predicted = scores.risk[site.tensor][units]
        rows = zip(units.tolist(), predicted.tolist(), (risks / len(samples)).tolist(), strict=True)
        checks.append(SiteCheck(site.tensor, basis, tuple(UnitCheck(*row) for row in rows)))
    return checks
