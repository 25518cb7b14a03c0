"""Proof that the compiled model is the dense one under the plan, and how faithful it is under interchange.

`fold_error` is the proof: the dense graph with the plan's do() written in by surgery must equal the compiled file.
`interchange` is the measurement: retained units take the values they have on another input, in both models, and the answers
are compared. Both run with onnxruntime's own rewrites off, so that a difference is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.errors import VerificationError
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm
from mscompile.operators import IntArray
from mscompile.planning.plan import Plan, SitePlan
from mscompile.runtime import Progress, Session, no_progress
from mscompile.verification.certificate import risk_bound
from mscompile.verification.checks import FOLD_TOLERANCE, check_rows
from mscompile.verification.interchange import Correspondence, Engine, Law, Pair, disjoint_pairs
from mscompile.verification.interventions import Feed
from mscompile.verification.metrics import Difference, Metric, relative_mse
from mscompile.verification.skeletons import skeleton_of
from mscompile.verification.surgery import Do, Patch, Reweighted, replaced

ROUNDINGS = 8.0
"""Roundings in the last bit that the folds may add up to: each of some tens of layers rounds anew, as often up as down."""

__all__ = [
    "FOLD_TOLERANCE",
    "Fidelity",
    "Interchange",
    "Law",
    "Pair",
    "fold_error",
    "make_pair",
    "patches_of",
    "relative_mse",
    "replacement_of",
]


def patches_of(scm: Scm) -> dict[str, Patch]:
    """Where to intervene, by site."""
    return {site.tensor: Patch(site.tensor, len(scm.shapes[site.tensor]), site.axis, site.layout) for site in scm.sites}


def make_pair(scm: Scm, compiled: ir.Model, plan: Plan, alignment: Mapping[str, IntArray]) -> Pair:
    """Pair a dense model and a compiled one up by a plan and the dense channel behind each compiled one."""
    sites, patches = [], patches_of(scm)
    for site in plan.sites:
        patch = patches[site.tensor]
        # A retained channel that nothing reads may have gone with the replaced ones; intervening on it would say nothing.
        left = alignment.get(site.tensor, np.arange(site.size, dtype=np.int64))
        kept = np.intersect1d(site.kept, left)
        sites.append(Correspondence(patch, patch, site.size, len(left), kept, np.searchsorted(left, kept)))
    return Pair(skeleton_of(scm.model), skeleton_of(compiled), tuple(sites))


def fold_error(pair: Pair, plan: Plan, samples: Samples, batch_size: int) -> float:
    """Largest difference between the dense graph under do() and the compiled graph, in standard deviations per output.

    Raises
    ------
    VerificationError
        It exceeds what rounding explains, or one side is not finite where the other is. Rounding explains `FOLD_TOLERANCE`,
        or, in a network that amplifies rounding more than most, `ROUNDINGS` times the last bit of the outputs, or what the
        last bit of every input does to them.
    """
    interventions = [replacement_of(entry, site.dense) for site, entry in zip(pair.sites, plan.sites, strict=True)]
    reference = Session(replaced(pair.dense, interventions), optimise=False)
    compiled = Session(pair.compiled, optimise=False)
    expected = reference.run_all(samples.batches(batch_size))
    found = compiled.run_all(samples.batches(batch_size))
    worst = 0.0
    for name, wanted in expected.items():
        error, explained = _relative_gap(wanted, found[name]), FOLD_TOLERANCE
        if FOLD_TOLERANCE < error < ROUNDINGS:
            nudged = reference.run_all((_nudged(batch) for batch in samples.batches(batch_size)), [name])[name]
            last_bits = _relative_gap(wanted, nudged), _relative_gap(wanted, np.nextafter(wanted, wanted.dtype.type(np.inf)))
            explained = max(FOLD_TOLERANCE, ROUNDINGS * max(last_bits))
        if not error <= explained:
            raise VerificationError(
                "the compiled graph is not the dense graph under the plan",
                where=f"output {name!r}",
                why=f"they differ by {error:.3g} standard deviations; rounding explains at most {explained:.3g}",
                hint="please report this as a bug, with the plan file; nothing was written",
            )
        worst = max(worst, error)
    return worst


def _nudged(batch: Feed) -> dict[str, npt.NDArray[Any]]:
    """Inputs with the last bit of every number in floating point changed, up and down by turns."""

    def nudged(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        turns = np.where(np.arange(array.size).reshape(array.shape) % 2, -np.inf, np.inf)
        nearby: npt.NDArray[Any] = np.nextafter(array, turns.astype(array.dtype))
        return nearby

    return {name: nudged(array) if array.dtype.kind == "f" else array for name, array in batch.items()}


def replacement_of(site: SitePlan, patch: Patch) -> Do:
    """A planned replacement as an intervention."""
    readers = tuple(Reweighted(w.reader, w.places, w.columns, w.response) for w in site.windows)
    return Do(patch, site.kept, site.constants, site.affine, readers)


def _relative_gap(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    if wanted.shape != found.shape:
        return math.inf
    if wanted.dtype.kind in "iub?":
        return 0.0 if np.array_equal(wanted, found) else math.inf
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    gap = float(np.abs(np.where(same, 0.0, a - b)).max())
    return gap / max(float(a[np.isfinite(a)].std()), float(np.finfo(wanted.dtype).tiny))


@dataclass(frozen=True)
class Fidelity:
    """Agreement of two models under one interchange law.

    Attributes
    ----------
    law
        ``one-site``: each trial intervenes at one site, drawn uniformly; ``all-sites``: at all at once, which over many
        sites leaves little of the base.
    swap
        Probability with which each retained unit there is swapped.
    trials, disagreements
        Interchanges run, and the sum of their losses in [0, 1] (for class scores: how often the answers differ).
    iia, iia_lower
        1 − disagreements / trials, and its lower confidence bound at `delta`, valid whenever one looks.
    logit_mse_relative
        Mean squared difference of the outputs over their variance in the dense model.
    kl
        Mean KL divergence in nats, for class scores; else None.
    """

    law: Law
    swap: float
    delta: float
    trials: int
    disagreements: float
    iia: float
    iia_lower: float
    logit_mse_relative: float
    kl: float | None


class Interchange:
    """Interchange on a pair of models, with matched values, measured over disjoint pairs of samples.

    Building one opens the sessions and runs the self-checks, see `Engine`.
    """

    def __init__(self, pair: Pair, samples: Samples, *, batch_size: int, metric: Metric | None = None) -> None:
        self.engine = Engine(pair, samples, batch_size=batch_size, metric=metric)
        for name, model in (("dense", self.engine.dense), ("compiled", self.engine.compiled)):
            check_rows(name, model, self.engine.batch, samples.shared)
        self.pair, self.metric = pair, self.engine.metric
        self.full_source_checked = self.engine.full_source_checked

    def run(
        self, samples: Samples, *, law: Law, swap: float, seed: int, delta: float, progress: Progress = no_progress
    ) -> Fidelity:
        """Pair every sample with one other, each in one pair only, and interchange.

        Cost is linear in the trials: three forward passes each.
        """
        base, source = disjoint_pairs(len(samples), seed)
        batches = self.engine.trials(samples, base, source, law=law, swap=swap, seed=seed)
        losses, difference = 0.0, Difference(classes=self.metric.classes)
        for trials in progress(batches, f"interchange, swap {swap:g}", math.ceil(len(base) / self.engine.batch_size)):
            dense, matched = trials.dense[self.engine.output], trials.matched[self.engine.output]
            losses += float(self.metric.loss(dense, matched).sum())
            difference.add(dense, matched)
        return Fidelity(
            law,
            swap,
            delta,
            len(base),
            losses,
            1.0 - losses / max(len(base), 1),
            1.0 - risk_bound(losses, len(base), delta),
            difference.relative_mse,
            difference.kl,
        )

    def misfit(self, samples: Samples) -> str | None:
        """See `Metric.misfit`."""
        if samples.labels is None:
            return None
        found = self.engine.dense.read(self.engine.batch, [self.engine.output])
        return self.metric.misfit(found[self.engine.output].shape, samples.labels)

    def plain(self, samples: Samples) -> Mapping[str, float | None]:
        """Agreement and relative logit MSE without intervention, and accuracies where labels are there."""
        dense, compiled = (found[self.engine.output] for found in self.engine.plain(samples))
        return {
            "agreement": 1.0 - float(self.metric.loss(dense, compiled).mean()),
            "logit_mse_relative": relative_mse(dense.astype(np.float64), compiled.astype(np.float64)),
            "accuracy_dense": self.metric.accuracy(dense, samples.labels),
            "accuracy_compiled": self.metric.accuracy(compiled, samples.labels),
        }
