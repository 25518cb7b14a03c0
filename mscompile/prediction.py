"""Predicted against measured: how well the scores foretell what replacing a unit does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import scipy.stats

from mscompile.data import Samples
from mscompile.metrics import kl_divergence
from mscompile.plan import Plan
from mscompile.runtime import Progress, Session, no_progress
from mscompile.scm import Site
from mscompile.scores import DIVERGENCE, SQUARED_OUTPUTS, Scores
from mscompile.surgery import Patch, feed, float_type, patched, replaced
from mscompile.verify import replacement_of

Array = npt.NDArray[np.float64]


def measured_risk(basis: str, dense: npt.NDArray[np.generic], intervened: npt.NDArray[np.generic]) -> float:
    """What a score of that basis predicts, measured: half the squared distance of the outputs, or their KL divergence."""
    y, z = dense.astype(np.float64), intervened.astype(np.float64)
    if basis == DIVERGENCE:
        return kl_divergence(y, z) * float(np.prod(y.shape[1:-1]))
    return 0.5 * float(np.square(y - z).reshape(len(y), -1).sum(axis=1).mean())


def predictable(basis: str) -> bool:
    """Whether a basis is a risk that can be measured at the outputs."""
    return basis in (SQUARED_OUTPUTS, DIVERGENCE)


def site_risks(
    model: ir.Model, plan: Plan, ranks: Mapping[str, int], output: str, samples: Samples, batch_size: int
) -> dict[str, float]:
    """Measured risk of each planned site replaced alone, where its prediction is of a measurable risk.

    Costs one run of the dense model over `samples`, and one more per site.
    """
    planned = [site for site in plan.sites if predictable(site.basis)]
    if not planned:
        return {}
    proto = ir.to_proto(model)
    dense = Session(proto).run_all(samples.batches(batch_size), [output])[output]
    risks = {}
    for site in planned:
        do = replacement_of(site, Patch(site.tensor, ranks[site.tensor], site.axis))
        found = Session(replaced(proto, [do])).run_all(samples.batches(batch_size), [output])[output]
        risks[site.tensor] = measured_risk(site.basis, dense, found)
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
    output: str,
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
    count
        Units drawn per site; all if None.
    """
    proto = ir.to_proto(model)
    dense = Session(proto).run_all(samples.batches(batch_size), [output])[output]
    rng = np.random.default_rng(seed)
    checks = []
    for site in progress(sites, "check predictions", len(sites)):
        chosen = np.arange(site.size) if count is None or count >= site.size else rng.choice(site.size, count, replace=False)
        risks = _measure(proto, site, ranks[site.tensor], scores, np.sort(chosen), dense, output, samples, batch_size)
        units = tuple(
            UnitCheck(int(c), float(scores.risk[site.tensor][c]), r) for c, r in zip(np.sort(chosen), risks, strict=True)
        )
        checks.append(SiteCheck(site.tensor, scores.basis[site.tensor], units))
    return checks


def _measure(
    proto: onnx.ModelProto,
    site: Site,
    rank: int,
    scores: Scores,
    channels: npt.NDArray[np.int64],
    dense: npt.NDArray[np.generic],
    output: str,
    samples: Samples,
    batch_size: int,
) -> Iterator[float]:
    patch = Patch(site.tensor, rank, site.axis)
    session = Session(patched(proto, [patch]))
    shape = [site.size if axis == site.axis else 1 for axis in range(rank)]
    constants = scores.constants[site.tensor].reshape(shape).astype(float_type(proto))
    for channel in channels:
        mask = np.zeros((1, site.size), dtype=np.bool_)
        mask[0, channel] = True
        intervention = feed(patch, mask, constants)
        found = session.run_all(({**batch, **intervention} for batch in samples.batches(batch_size)), [output])[output]
        yield measured_risk(scores.basis[site.tensor], dense, found)
