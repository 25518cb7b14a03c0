"""Anchors: real interventions on a few units per site, which tell how far the second order holds there.

The quadratic of a score is exact where the network behind the site is affine. Where it bends, its least point may be no
better than the mean (a ReLU that is off lets no gradient through: raising a unit there looks free, though it switches
the ReLU on), and its value is off by a factor that the units of a site have in common. Both are measured: anchors are
replaced one at a time, by their means and by their optima, over samples that the quadratic is taken from once more.
Where the optima gain less than half of what was predicted, all constants of the site are means; predictions are
multiplied by measured over predicted risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.prediction import unit_risks
from mscompile.calibration.statistics import Array, Scale, Statistics
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, Site
from mscompile.operators import IntArray
from mscompile.planning.scores import OBJECTIVES, predictable
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, Session, no_progress
from mscompile.verification.skeletons import skeleton_of

SAMPLES = 128
"""Samples that anchors are measured on, at most. Predictions are taken from the same ones, so that their spread cancels."""
TRUSTED = 0.5
"""Share of the predicted gain of optima over means that must be there for the optima to be used."""
MATTERS = 0.1
"""Gain, as a share of the risk, below which it is not asked for: measuring it would take more samples."""


@dataclass(frozen=True)
class Anchors:
    """How many anchors, and where they are drawn from."""

    count: int
    seed: int

    def of(self, site: Site) -> IntArray:
        """Channels of a site; never more than a quarter, so that most are left to check predictions on."""
        order = np.random.default_rng([self.seed, site.size]).permutation(site.size)
        return np.sort(order[: min(self.count, -(-site.size // 4))])


def with_scales(
    scm: Scm,
    sites: Sequence[Site],
    statistics: Statistics,
    objective: str,
    samples: Samples,
    anchors: Anchors,
    *,
    measure: Measure,
    batch_size: int,
    run: Run = ALONE,
    progress: Progress = no_progress,
) -> Statistics:
    """The statistics with the scale of each site whose scores are risks at the outputs.

    Costs another calibration over at most `SAMPLES` samples, and two intervened runs over them per anchor.
    """
    score, few = OBJECTIVES[objective].score, samples.take(slice(SAMPLES))
    if not anchors.count or measure.curvature == "none" or measure.gradient or objective == "cwvar":
        return statistics
    lean = replace(measure, covariance=False, shared=False, windows=False, second=False)
    again = calibrate(scm, sites, few, batch_size=batch_size, measure=lean, run=run)
    skeleton, scales = skeleton_of(scm.model), {}
    dense = Session(skeleton)
    for site in progress(sites, "measure a few units", len(sites)):
        best, mean = (score(scm, site, replace(again, scales={site.tensor: Scale(1.0, step)}), 0) for step in (1.0, 0.0))
        if not predictable(best.basis):
            continue
        units, rank = anchors.of(site), len(scm.shapes[site.tensor])
        constants = [best.constants, mean.constants]
        found = unit_risks(skeleton, dense, site, rank, constants, units, best.basis, measure.outputs, few, batch_size)
        predicted = best.risk[units], mean.risk[units]
        gain, there = (float(at_mean.sum() - at_best.sum()) for at_best, at_mean in (predicted, found))
        step = 0.0 if gain > MATTERS * float(predicted[1].sum()) and there < TRUSTED * gain else 1.0
        rule = 0 if step else 1
        scales[site.tensor] = Scale(_factor(predicted[rule], found[rule]), step)
    return replace(statistics, scales=scales)


def _factor(predicted: Array, measured: Array) -> float:
    """Geometric mean of measured over predicted, where both are positive; 1 where nothing is."""
    good = (predicted > 0) & (measured > 0)
    return float(np.exp(np.mean(np.log(measured[good] / predicted[good])))) if good.any() else 1.0
