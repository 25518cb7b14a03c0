"""Many candidates from one graph: readers take their weights as inputs; a candidate costs no rewriting and no session.

What a candidate does here is what its compiled file does, to rounding: replaced channels are there, and are multiplied by
zeros. It serves to choose; what is chosen is compiled, proved and measured as a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.data import Samples
from mscompile.dense import DenseModel
from mscompile.interchange import Draws, Law, compared_output, disjoint_pairs
from mscompile.interventions import Intervened, Setting
from mscompile.metrics import Metric, default_metric
from mscompile.plan import SitePlan
from mscompile.refits import Target
from mscompile.runtime import Arrays
from mscompile.scm import Reader, Site
from mscompile.surgery import MATRIX, SHIFT, WEIGHT, Patch, tunable
from mscompile.windows import view_of, window_name


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


class Sweep:
    """A dense model opened for candidates that differ in the weights of its readers.

    Parameters
    ----------
    samples
        Whose first batch the choice of the metric is made on, unless one is given.
    """

    def __init__(self, source: DenseModel, samples: Samples, *, batch_size: int, metric: Metric | None = None) -> None:
        proto = ir.to_proto(source.model)
        self.source, self.batch_size = source, batch_size
        self.patches = [Patch(site.tensor, source.ranks[site.tensor], site.axis) for site in source.sites]
        mixed = [patch for site, patch in zip(source.sites, self.patches, strict=True) if not _by_weights(site)]
        names = [
            window_name(reader) for site in source.sites for reader in site.readers if view_of(site, reader) is not None
        ]
        self.dense = Intervened(proto, self.patches)
        self.tuned = Intervened(tunable(proto, names, mixed), self.patches)
        self.output = compared_output(proto)
        self._dense: dict[str, npt.NDArray[Any]] = {}
        self._whole: Arrays = {}
        for site in source.sites:
            self._whole |= _feed(site, None)
        first = next(samples.batches(min(batch_size, len(samples))))
        self.metric = metric or default_metric(self.dense.read(first, [self.output])[self.output])

    def outputs(self, samples: Samples, names: Sequence[str], plans: Sequence[SitePlan] | None = None) -> Arrays:
        """Outputs of a candidate, or of the dense model."""
        model = self.dense if plans is None else self.tuned
        weights = {} if plans is None else self._feed(plans)
        found = [model.read({**batch, **weights}, names) for batch in samples.batches(self.batch_size)]
        return {name: np.concatenate([part[name] for part in found]) for name in names}

    def measure(self, plans: Sequence[SitePlan], samples: Samples, *, law: Law, swap: float, seed: int) -> Point:
        """Interchange under a law over disjoint pairs of samples, as `Interchange` does, and agreement on all of them."""
        weights, kept = self._feed(plans), {plan.tensor: plan.kept for plan in plans}
        patches = [patch for patch in self.patches if patch.tensor in kept]
        sizes = {site.tensor: site.size for site in self.source.sites}
        draws = Draws(seed, [sizes[patch.tensor] for patch in patches])
        base, source = disjoint_pairs(len(samples), seed)
        lost = 0.0
        for start in range(0, len(base), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(base)))
            places, numbers = draws.take(rows.start, rows.stop)
            drawn = (places * len(patches)).astype(np.int64)
            values = self.dense.read(samples.take(source[rows]).inputs, [patch.tensor for patch in patches])
            settings: dict[str, Setting] = {}
            for number, (patch, unit) in enumerate(zip(patches, numbers, strict=True)):
                mask = np.zeros(unit.shape, dtype=np.bool_)
                mask[:, kept[patch.tensor]] = unit[:, kept[patch.tensor]] < swap
                if law == "one-site":
                    mask &= (drawn == number)[:, None]
                settings[patch.tensor] = mask, values[patch.tensor]
            inputs = samples.take(base[rows]).inputs
            dense = self.dense.run(inputs, settings, [self.output])[self.output]
            tuned = self.tuned.run({**inputs, **weights}, settings, [self.output])[self.output]
            lost += float(self.metric.loss(dense, tuned).sum())
        if samples.sha256 not in self._dense:
            self._dense[samples.sha256] = self.outputs(samples, [self.output])[self.output]
        plain = self.outputs(samples, [self.output], plans)[self.output]
        agreement = 1.0 - float(self.metric.loss(self._dense[samples.sha256], plain).mean())
        return Point(len(base), lost, agreement)

    def _feed(self, plans: Sequence[SitePlan]) -> Arrays:
        found = dict(self._whole)
        for plan in plans:
            found |= _feed(self.source.scm.site(plan.tensor), plan)
        return found


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
            return {WEIGHT + name: np.concatenate([dense, np.zeros_like(dense[:, :1])], axis=1)}
        return {WEIGHT + name: dense, SHIFT + name: np.zeros(dense.shape[1 - reader.axis], dense.dtype)}
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
        return {WEIGHT + name: full.transpose(2, 0, 1).reshape(outputs, site.size + 1, *window.kernel).astype(dense.dtype)}
    places = np.argsort(reader.index, kind="stable").reshape(site.size, taps)
    matrix = np.zeros((len(reader.index), outputs))
    matrix[places[plan.kept].ravel()] = columns
    oriented = matrix if reader.axis == 0 else matrix.T
    shift = (response[0] * linear.gain).astype(dense.dtype)
    return {WEIGHT + name: np.ascontiguousarray(oriented.astype(dense.dtype)), SHIFT + name: shift}
