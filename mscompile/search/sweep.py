"""Many candidates from one graph, by interchange: see `planning.tuning`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.planning.plan import SitePlan
from mscompile.planning.tuning import Tunable
from mscompile.runtime import Arrays, Session
from mscompile.verification.interchange import Draws, Law, compared_output, disjoint_pairs
from mscompile.verification.interventions import Intervened, Setting
from mscompile.verification.metrics import Metric, default_metric
from mscompile.verification.skeletons import Skeleton, skeleton_of
from mscompile.verification.surgery import patched
from mscompile.verification.verify import patches_of

HELD_BYTES = 1 << 28
"""Activations kept between candidates, at most; more are computed again."""


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
    inputs
        The bases.
    values
        The sources' values by site tensor.
    units
        [trials, channels] random numbers by site tensor.
    places
        [trials] random numbers that draw the site.
    plain
        Output of the dense model on the bases.
    """

    inputs: Arrays
    values: Arrays
    units: Mapping[str, npt.NDArray[np.float32]]
    places: npt.NDArray[np.float64]
    plain: npt.NDArray[Any]


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
    ) -> None:
        skeleton = skeleton_of(source.model)
        self.source, self.batch_size = source, batch_size
        found = patches_of(source.scm)
        self.patches = [found[site.tensor] for site in source.sites]
        # Nothing is compared for equality here: onnxruntime may rewrite.
        self.dense = Intervened(skeleton, self.patches, optimise=True)
        self.output = compared_output(skeleton.proto)
        self._opened: dict[tuple[str, int], list[Opened]] = {}
        self._tunable = tunable or Tunable(source)
        self._plain = self._tunable.graph
        self._patched = patched(self._plain, self.patches)
        first = next(samples.batches(min(batch_size, len(samples))))
        self.metric = metric or default_metric(self.dense.read(first, [self.output])[self.output])

    def outputs(self, samples: Samples, names: Sequence[str], plans: Sequence[SitePlan] | None = None) -> Arrays:
        """Outputs of a candidate, or of the dense model."""
        model = self.dense.read if plans is None else self._session(self._plain, plans).run
        found = [model(batch, names) for batch in samples.batches(self.batch_size)]
        return {name: np.concatenate([part[name] for part in found]) for name in names}

    def measure(self, plans: Sequence[SitePlan], samples: Samples, *, law: Law, swap: float, seed: int) -> Point:
        """Interchange under a law over disjoint pairs of samples, as `Interchange` does, and agreement on their bases."""
        kept = {plan.tensor: plan.kept for plan in plans}
        candidate = self._session(self._patched, plans)
        places = {patch.tensor: i for i, patch in enumerate(p for p in self.patches if p.tensor in kept)}
        trials, lost, differ = 0, 0.0, 0.0
        for batch in self._open(samples, seed):
            drawn = (batch.places * len(places)).astype(np.int64)
            settings: dict[str, Setting] = {}
            for tensor, place in places.items():
                unit = batch.units[tensor]
                mask = np.zeros(unit.shape, dtype=np.bool_)
                mask[:, kept[tensor]] = unit[:, kept[tensor]] < swap
                if law == "one-site":
                    mask &= (drawn == place)[:, None]
                settings[tensor] = mask, batch.values[tensor]
            feeds = self.dense.feeds(batch.inputs, settings)
            dense = self.dense.run(batch.inputs, settings, [self.output])[self.output]
            tuned = candidate.run(feeds, [self.output])[self.output]
            plain = candidate.run(self.dense.feeds(batch.inputs, {}), [self.output])[self.output]
            trials += len(batch.places)
            lost += float(self.metric.loss(dense, tuned).sum())
            differ += float(self.metric.loss(batch.plain, plain).sum())
        return Point(trials, lost, 1.0 - differ / max(trials, 1))

    def _open(self, samples: Samples, seed: int) -> Iterator[Opened]:
        """What interchanges of `samples` need that no candidate changes; kept while it is small."""
        key = samples.sha256, seed
        if key in self._opened:
            yield from self._opened[key]
            return
        base, source = disjoint_pairs(len(samples), seed)
        tensors = [patch.tensor for patch in self.patches]
        sizes = {site.tensor: site.size for site in self.source.sites}
        draws, found, held = Draws(seed, [sizes[tensor] for tensor in tensors]), [], 0
        for start in range(0, len(base), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(base)))
            places, units = draws.take(rows.start, rows.stop)
            inputs = samples.take(base[rows]).inputs
            values = self.dense.read(samples.take(source[rows]).inputs, tensors)
            plain = self.dense.read(inputs, [self.output])[self.output]
            batch = Opened(inputs, values, dict(zip(tensors, units, strict=True)), places, plain)
            held += sum(array.nbytes for array in (*inputs.values(), *values.values()))
            if held <= HELD_BYTES:
                found.append(batch)
            yield batch
        if held <= HELD_BYTES:
            self._opened[key] = found

    def _session(self, graph: Skeleton, plans: Sequence[SitePlan]) -> Session:
        """A graph with the weights of a candidate."""
        return Session(graph.with_graph(graph.proto, self._tunable.weights(plans)), spin=False)
