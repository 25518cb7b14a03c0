"""Many candidates from one graph: readers take their weights from outside; a candidate costs no rewriting.

What a candidate does here is what its compiled file does, to rounding: replaced channels are there, and are multiplied by
zeros. It serves to choose; what is chosen is compiled, proved and measured as a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.calibration.windows import view_of, window_name
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.network.scm import Reader, Site
from mscompile.planning.plan import SitePlan
from mscompile.planning.refits import Target
from mscompile.runtime import Arrays, Session
from mscompile.verification.interchange import Draws, Law, compared_output, disjoint_pairs
from mscompile.verification.interventions import Intervened, Setting
from mscompile.verification.metrics import Metric, default_metric
from mscompile.verification.skeletons import Skeleton, skeleton_of
from mscompile.verification.surgery import MATRIX, SHIFT, WEIGHT, patched, tunable
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
    """

    def __init__(self, source: DenseModel, samples: Samples, *, batch_size: int, metric: Metric | None = None) -> None:
        skeleton = skeleton_of(source.model)
        self.source, self.batch_size = source, batch_size
        found = patches_of(source.scm)
        self.patches = [found[site.tensor] for site in source.sites]
        mixed = [patch for site, patch in zip(source.sites, self.patches, strict=True) if not _by_weights(site)]
        names = [
            window_name(reader) for site in source.sites for reader in site.readers if view_of(site, reader) is not None
        ]
        # Nothing is compared for equality here: onnxruntime may rewrite.
        self.dense = Intervened(skeleton, self.patches, optimise=True)
        self.output = compared_output(skeleton.proto)
        self._opened: dict[tuple[str, int], list[Opened]] = {}
        self._fed: dict[str, tuple[SitePlan, Arrays]] = {}
        self._whole: Arrays = {}
        for site in source.sites:
            self._whole |= _feed(site, None)
        # Weights that are no inputs let onnxruntime lay convolutions out for speed, worth far more than a session costs.
        self._plain = tunable(skeleton, names, mixed).with_weights(self._whole)
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
        given = dict(self._whole)
        for plan in plans:
            if plan.tensor not in self._fed or self._fed[plan.tensor][0] is not plan:
                self._fed[plan.tensor] = plan, _feed(self.source.scm.site(plan.tensor), plan)
            given |= self._fed[plan.tensor][1]
        return Session(graph.with_graph(graph.proto, given), spin=False)


def _by_weights(site: Site) -> bool:
    """Whether weights of readers say all that a plan does at a site; else its tensor is mixed before they see it."""
    return not site.pairings and all(view_of(site, reader) is not None for reader in site.readers)


def _feed(site: Site, plan: SitePlan | None) -> Arrays:
    """Inputs of `tunable` for one site under a plan; what makes no difference where there is none."""
    found: Arrays = {}
    folded = _by_weights(site)
    given = set() if plan is None else {window.reader for window in plan.windows}
    for reader in site.readers:
        if view_of(site, reader) is not None:
            told = folded or window_name(reader) in given
            found |= _weights(site, reader, plan if told else None)
    if folded:
        return found
    dtype = _array(site.readers[0].weight).dtype if site.readers else np.dtype(np.float32)
    matrix, shift = np.eye(site.size), np.zeros(site.size)
    if plan is not None:
        matrix[:, plan.replaced] = 0.0
        shift[plan.replaced] = plan.constants
        if plan.affine is not None:
            matrix[np.ix_(plan.kept, plan.replaced)] = plan.affine.T
    return found | {MATRIX + site.tensor: matrix.astype(dtype), SHIFT + site.tensor: shift.astype(dtype)}


def _array(value: ir.Value) -> npt.NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _weights(site: Site, reader: Reader, plan: SitePlan | None) -> Arrays:
    """Inputs of `tunable` for one reader under a plan; what it has in the dense model where there is none."""
    window, linear = view_of(site, reader), reader.signature.linear
    assert window is not None
    assert linear is not None
    name, dense = window_name(reader), _array(reader.weight)
    if plan is None:
        if window.kernel:
            return {WEIGHT + name: dense, SHIFT + name: np.zeros_like(dense[:, :1])}
        return {WEIGHT + name: dense, SHIFT + name: np.zeros(dense.shape[1 - reader.axis], dense.dtype)}
    if not window.kernel and all(given.reader != name for given in plan.windows):
        # As below, without leaving the precision of the weight.
        matrix = np.array(np.moveaxis(dense, reader.axis, 0))
        places = np.argsort(reader.index, kind="stable").reshape(site.size, window.taps)
        lost = matrix[places[plan.replaced]]
        matrix[places[plan.replaced]] = 0.0
        if plan.affine is not None:
            matrix[places[plan.kept]] += np.tensordot(plan.affine.T, lost, 1).astype(dense.dtype)
        shift = linear.gain * np.tensordot(plan.constants, lost, 1).sum(axis=0)
        return {
            WEIGHT + name: np.ascontiguousarray(np.moveaxis(matrix, 0, reader.axis)),
            SHIFT + name: shift.astype(dense.dtype),
        }
    target = Target(site, reader, window, plan, np.zeros(site.size))
    weights, taps, retained = target.weights(), window.taps, len(plan.kept)
    columns, response = weights[: retained * taps], weights[retained * taps :]
    outputs = weights.shape[1]
    if window.kernel:
        full = np.zeros((site.size + 1, taps, outputs))
        full[plan.kept] = columns.reshape(retained, taps, outputs)
        if window.marks == taps:
            full[-1] = response
        else:  # without padding ones are everywhere: any tap carries them
            full[-1, 0] = response[0]
        filters = full.transpose(2, 0, 1).reshape(outputs, site.size + 1, *window.kernel).astype(dense.dtype)
        return {WEIGHT + name: filters[:, :-1], SHIFT + name: filters[:, -1:]}
    places = np.argsort(reader.index, kind="stable").reshape(site.size, taps)
    matrix = np.zeros((len(reader.index), outputs))
    matrix[places[plan.kept].ravel()] = columns
    oriented = matrix if reader.axis == 0 else matrix.T
    shift = (response[0] * linear.gain).astype(dense.dtype)
    return {WEIGHT + name: np.ascontiguousarray(oriented.astype(dense.dtype)), SHIFT + name: shift}
