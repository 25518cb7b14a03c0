"""Many candidates from one graph, by interchange: see `planning.tuning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.planning.drafts import Draft
from mscompile.planning.plan import SitePlan
from mscompile.planning.staged import Ahead, StagedPass
from mscompile.planning.tuning import Tunable
from mscompile.runs.work import NOWHERE, Work
from mscompile.runtime import Arrays
from mscompile.verification.interchange import Draws, Law, compared_output, disjoint_pairs
from mscompile.verification.interventions import Intervened, Setting
from mscompile.verification.metrics import Metric, default_metric
from mscompile.verification.skeletons import skeleton_of
from mscompile.verification.surgery import patched
from mscompile.verification.verify import patches_of

HELD_BYTES = 1 << 28
"""Activations of sources that are kept between candidates, a batch more or less; the others are computed again."""


@dataclass(frozen=True)
class Point:
    """A candidate measured: disagreements over `trials` interchanges, and agreement without intervention."""

    trials: int
    disagreements: float
    agreement: float

    @property
    def iia(self) -> float:
        """Share of interchanges after which both models answer the same."""
        return 1.0 - self.disagreements / max(self.trials, 1)


@dataclass(frozen=True)
class Opened:
    """A batch of interchanges before any candidate is known.

    Attributes
    ----------
    sources, values
        Inputs, and what is read of them by site tensor; None where it is read again each time.
    units
        [trials, channels] random numbers by site tensor.
    places
        [trials] random numbers that draw the site.
    plain
        Output of the dense model on the bases.
    """

    sources: Arrays
    values: Arrays | None
    units: Mapping[str, npt.NDArray[np.float32]]
    places: npt.NDArray[np.float64]
    plain: npt.NDArray[Any]


@dataclass(frozen=True)
class Bench:
    """Interchanges of some samples, with all done that no candidate changes.

    Attributes
    ----------
    bases
        As far as the first sites.
    dense
        What follows in the dense model.
    """

    bases: StagedPass
    dense: Ahead
    batches: Sequence[Opened]


class Sweep:
    """A dense model opened for candidates that differ in the weights of its readers.

    Parameters
    ----------
    samples
        Whose first batch the choice of the metric is made on, unless one is given.
    tunable
        Of the same source, where there is one.
    """

    def __init__(
        self,
        source: DenseModel,
        samples: Samples,
        *,
        batch_size: int,
        metric: Metric | None = None,
        tunable: Tunable | None = None,
        work: Work = NOWHERE,
    ) -> None:
        skeleton = skeleton_of(source.model)
        self.source, self.batch_size, self._work = source, batch_size, work
        found = patches_of(source.scm)
        self.patches = [found[site.tensor] for site in source.sites]
        # Nothing is compared for equality here: onnxruntime may rewrite.
        self.dense = Intervened(skeleton, self.patches, optimise=True)
        self.output = compared_output(skeleton.proto)
        self._benches: dict[tuple[str, int], Bench] = {}
        self._tunable = tunable or Tunable(source)
        self._patched = patched(self._tunable.graph, self.patches)
        first = next(samples.batches(min(batch_size, len(samples))))
        self.metric = metric or default_metric(self.dense.read(first, [self.output])[self.output])

    def measure(self, plans: Sequence[SitePlan | Draft], samples: Samples, *, law: Law, swap: float, seed: int) -> Point:
        """Interchange under a law over disjoint pairs of samples, as `Interchange` does, and agreement on their bases."""
        retained = {plan.tensor: np.isin(np.arange(self.source.scm.site(plan.tensor).size), plan.kept) for plan in plans}
        places = {patch.tensor: i for i, patch in enumerate(p for p in self.patches if p.tensor in retained)}
        bench = self._bench(samples, seed)
        candidate = bench.bases.ahead([self.output], self._tunable.weights(plans))
        trials, lost, differ = 0, 0.0, 0.0
        for number, batch in enumerate(bench.batches):
            drawn, values = (batch.places * len(places)).astype(np.int64), self._values(batch)
            settings: dict[str, Setting] = {}
            for tensor, place in places.items():
                mask = (batch.units[tensor] < swap) & retained[tensor]
                if law == "one-site":
                    mask &= (drawn == place)[:, None]
                settings[tensor] = mask, values[tensor]
            given = self.dense.feeds({}, settings)
            dense, tuned = (ahead.run(number, given)[self.output] for ahead in (bench.dense, candidate))
            plain = candidate.run(number, self.dense.feeds({}, {}))[self.output]
            trials += len(batch.places)
            lost += float(self.metric.loss(dense, tuned).sum())
            differ += float(self.metric.loss(batch.plain, plain).sum())
        return Point(trials, lost, 1.0 - differ / max(trials, 1))

    def _values(self, batch: Opened) -> Arrays:
        """The sources' values by site tensor."""
        return self.dense.read(batch.sources, list(batch.units)) if batch.values is None else batch.values

    def _bench(self, samples: Samples, seed: int) -> Bench:
        """What interchanges of `samples` need that no candidate changes."""
        key = samples.sha256, seed
        if key not in self._benches:
            base, source = disjoint_pairs(len(samples), seed)
            bases = StagedPass(self._patched, samples.take(base), self.batch_size, self._work)
            weights, sizes = self._tunable.weights(()), {site.tensor: site.size for site in self.source.sites}
            for _ in bases.advance([tensor for tensor in sizes if bases.follows(tensor, weights)], weights):
                pass
            dense = bases.ahead([self.output], weights)
            draws, batches, held = Draws(seed, [*sizes.values()]), [], 0
            for number, sources in enumerate(samples.take(source).batches(self.batch_size)):
                start = number * self.batch_size
                places, units = draws.take(start, min(start + self.batch_size, len(base)))
                plain = dense.run(number, self.dense.feeds({}, {}))[self.output]
                batch = Opened(sources, None, dict(zip(sizes, units, strict=True)), places, plain)
                if held <= HELD_BYTES:
                    batch = replace(batch, values=self._values(batch))
                    held += sum(array.nbytes for array in self._values(batch).values())
                batches.append(batch)
            self._benches[key] = Bench(bases, dense, batches)
        return self._benches[key]
