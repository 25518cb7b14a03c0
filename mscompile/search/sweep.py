"""Many candidates from one graph, by interchange: see `planning.tuning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.network.layout import FIRST
from mscompile.planning.drafts import Draft, Folding, drafted
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
STREAM_BYTES = 1 << 28
"""What streams hold at most; sites for which there is no more room are run."""
Array = npt.NDArray[Any]


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


class Stream:
    """What readers of a site give in a batch of interchanges, where no candidate changes what the site is on the bases.

    Parameters
    ----------
    bases, sources
        [trials, …, channels]: the site.
    units
        [trials, channels] random numbers.
    dense
        What the dense model gives on the bases, [trials, …, outputs] by reader among it.
    """

    def __init__(self, foldings: Mapping[str, Folding], bases: Array, sources: Array, units: Array, dense: Arrays) -> None:
        self.dense, self._foldings, self._units = {name: dense[name] for name in foldings}, foldings, units
        self._bases, self._sources = bases, sources
        self._law: tuple[object, ...] = ()
        self._readings = {"plain": drafted(foldings, bases, dense)}

    def at(self, count: int, drawn: npt.NDArray[np.bool_], swap: float) -> dict[str, Arrays]:
        """Of the *dense* model and a draft, *tuned*, in trials drawn for this site; of the draft on the bases, *plain*."""
        law = swap, drawn.tobytes()
        if law != self._law:
            mask = (self._units < swap) & drawn[:, None]
            mask = mask.reshape(len(mask), *[1] * (self._bases.ndim - 2), -1)
            swapped = np.where(mask, self._sources, self._bases)
            change = swapped.astype(np.float32) - self._bases
            dense = {name: folding.changed(change, self.dense[name]) for name, folding in self._foldings.items()}
            whole = {name: reading.whole for name, reading in dense.items()}
            tuned = drafted(self._foldings, swapped, whole)
            self._law, self._readings = law, self._readings | {"dense": dense, "tuned": tuned}
        return {model: {name: r.at(count) for name, r in readings.items()} for model, readings in self._readings.items()}


@dataclass(frozen=True)
class Bench:
    """Interchanges of some samples, with all done that no candidate changes.

    Attributes
    ----------
    bases
        As far as the first sites.
    streams
        By site tensor, for each batch.
    dense
        What follows in the dense model, by the sites that are streamed.
    """

    bases: StagedPass
    batches: Sequence[Opened]
    streams: Sequence[Mapping[str, Stream]]
    dense: dict[tuple[str, ...], Ahead]


class Sweep:
    """A dense model opened for candidates that differ in the weights of its readers.

    Parameters
    ----------
    samples
        Whose first batch the choice of the metric is made on, unless one is given.
    tunable
        Of the same source, where there is one.
    foldings
        By site tensor and reader, where readers read rows: what they give under drafts is not run, as far as there is room.
    """

    def __init__(
        self,
        source: DenseModel,
        samples: Samples,
        *,
        batch_size: int,
        metric: Metric | None = None,
        tunable: Tunable | None = None,
        foldings: Mapping[str, Mapping[str, Folding]] = MappingProxyType({}),
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
        streamed = [patch.tensor for patch in self.patches if patch.axis == patch.rank - 1 and patch.layout == FIRST]
        self._foldings = {tensor: foldings[tensor] for tensor in streamed if tensor in foldings}
        self._tunable = tunable or Tunable(source)
        self._dense_weights = self._tunable.weights(())
        self._patched = patched(self._tunable.graph, self.patches)
        first = next(samples.batches(min(batch_size, len(samples))))
        self.metric = metric or default_metric(self.dense.read(first, [self.output])[self.output])

    def measure(self, plans: Sequence[SitePlan | Draft], samples: Samples, *, law: Law, swap: float, seed: int) -> Point:
        """Interchange under a law over disjoint pairs of samples, as `Interchange` does, and agreement on their bases."""
        retained = {plan.tensor: np.zeros(self.source.scm.site(plan.tensor).size, np.bool_) for plan in plans}
        for plan in plans:
            retained[plan.tensor][plan.kept] = True
        places = {patch.tensor: i for i, patch in enumerate(p for p in self.patches if p.tensor in retained)}
        bench = self._bench(samples, seed)
        streamed = tuple(plan.tensor for plan in plans if isinstance(plan, Draft) and plan.tensor in bench.streams[0])
        known = {name: array for tensor in streamed for name, array in bench.streams[0][tensor].dense.items()}
        weights = self._tunable.weights(plan for plan in plans if plan.tensor not in streamed)
        candidate = bench.bases.ahead([self.output], weights, known)
        if streamed not in bench.dense:
            bench.dense[streamed] = bench.bases.ahead([self.output], self._dense_weights, known)
        trials, lost, differ, none = 0, 0.0, 0.0, self.dense.feeds({}, {})
        for number, batch in enumerate(bench.batches):
            drawn, values = (batch.places * len(places)).astype(np.int64), self._values(batch)
            settings: dict[str, Setting] = {}
            read: dict[str, Arrays] = {"dense": {}, "tuned": {}, "plain": {}}
            for tensor, place in places.items():
                here = drawn == place if law == "one-site" else np.ones(len(drawn), np.bool_)
                if tensor in streamed:
                    for model, arrays in bench.streams[number][tensor].at(int(retained[tensor].sum()), here, swap).items():
                        read[model] |= arrays
                else:
                    settings[tensor] = (batch.units[tensor] < swap) & retained[tensor] & here[:, None], values[tensor]
            given = self.dense.feeds({}, settings)
            dense = bench.dense[streamed].run(number, given | read["dense"])[self.output]
            tuned = candidate.run(number, given | read["tuned"])[self.output]
            plain = candidate.run(number, none | read["plain"])[self.output]
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
            sizes = {site.tensor: site.size for site in self.source.sites}
            first = [tensor for tensor in sizes if bases.follows(tensor, self._dense_weights)]
            readers: dict[str, Mapping[str, Folding]] = {}
            found: list[Arrays] = []
            for batch in bases.advance(first, self._dense_weights):
                readers = readers if found else self._streamed(batch, len(base))
                found.append({tensor: batch[tensor] for tensor in readers})
            names = [name for foldings in readers.values() for name in foldings]
            ahead, none = bases.ahead([self.output, *names], self._dense_weights), self.dense.feeds({}, {})
            draws, batches, held, streams = Draws(seed, [*sizes.values()]), [], 0, []
            for number, sources in enumerate(samples.take(source).batches(self.batch_size)):
                start = number * self.batch_size
                places, numbers = draws.take(start, min(start + self.batch_size, len(base)))
                read, units = ahead.run(number, none), dict(zip(sizes, numbers, strict=True))
                opened = Opened(sources, None, units, places, read[self.output])
                values = self._values(opened)
                if held <= HELD_BYTES:
                    opened = replace(opened, values=values)
                    held += sum(array.nbytes for array in values.values())
                batches.append(opened)
                streams.append({t: Stream(f, found[number][t], values[t], units[t], read) for t, f in readers.items()})
            self._benches[key] = Bench(bases, batches, streams, {(): ahead})
        return self._benches[key]

    def _streamed(self, batch: Arrays, trials: int) -> dict[str, Mapping[str, Folding]]:
        """Of the sites in a batch those whose readers are streamed, with their foldings."""
        found, room = {}, STREAM_BYTES / trials
        for tensor in filter(self._foldings.__contains__, batch):
            foldings, row = self._foldings[tensor], batch[tensor][0]
            room -= 8 * sum(row.nbytes * (1 + folding.outputs / row.shape[-1]) for folding in foldings.values())
            if room >= 0:
                found[tensor] = foldings
        return found
