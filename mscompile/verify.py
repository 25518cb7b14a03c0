"""Proof that the compiled model is the dense one under the plan, and how faithful it is under interchange.

`fold_error` is the proof: the dense graph with the plan's do() written in by surgery must equal the compiled file.
`interchange` is the measurement: retained units take the values they have on another input, in both models, and the answers
are compared. Both run with onnxruntime's own rewrites off, so that a difference is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mscompile.certificate import risk_bound
from mscompile.data import Samples
from mscompile.errors import VerificationError
from mscompile.metrics import Metric, default_metric, kl_divergence
from mscompile.operators import IntArray
from mscompile.plan import Plan, SitePlan
from mscompile.runtime import Progress, Session, no_progress
from mscompile.surgery import Do, Patch, Reweighted, feed, patched, probe, replaced

FOLD_TOLERANCE = 1e-4
"""Largest fold error, in standard deviations of the output: float32 rounding through tens of layers stays below it."""

Law = Literal["one-site", "all-sites"]
Feed = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Pair:
    """A dense model, its compiled model and how their channels correspond.

    Attributes
    ----------
    dense, compiled
        The models as protos.
    patches
        Per planned site: the tensor, its rank and channel axis, the same in both models.
    kept
        Per planned site: retained channels in the dense model.
    places
        Per planned site: the compiled channel of each retained one.
    widths
        Per planned site: channels in the compiled model.
    """

    dense: onnx.ModelProto
    compiled: onnx.ModelProto
    patches: tuple[Patch, ...]
    kept: tuple[IntArray, ...]
    places: tuple[IntArray, ...]
    widths: tuple[int, ...]


def make_pair(
    dense: ir.Model, compiled: ir.Model, plan: Plan, ranks: Mapping[str, int], alignment: Mapping[str, IntArray]
) -> Pair:
    """Pair two models up by a plan and the dense channel behind each compiled one."""
    # A retained channel that nothing reads may have gone with the replaced ones; intervening on it would say nothing.
    aligned = [alignment.get(site.tensor, np.arange(site.size, dtype=np.int64)) for site in plan.sites]
    return Pair(
        ir.to_proto(dense),
        ir.to_proto(compiled),
        tuple(Patch(site.tensor, ranks[site.tensor], site.axis) for site in plan.sites),
        tuple(np.intersect1d(site.kept, left) for site, left in zip(plan.sites, aligned, strict=True)),
        tuple(
            np.searchsorted(left, np.intersect1d(site.kept, left)) for site, left in zip(plan.sites, aligned, strict=True)
        ),
        tuple(len(left) for left in aligned),
    )


def fold_error(pair: Pair, plan: Plan, samples: Samples, batch_size: int) -> float:
    """Largest difference between the dense graph under do() and the compiled graph, in standard deviations per output.

    Raises
    ------
    VerificationError
        It exceeds `FOLD_TOLERANCE`, or one side is not finite where the other is.
    """
    interventions = [replacement_of(site, patch) for patch, site in zip(pair.patches, plan.sites, strict=True)]
    reference = Session(replaced(pair.dense, interventions), optimise=False)
    compiled = Session(pair.compiled, optimise=False)
    expected = reference.run_all(samples.batches(batch_size))
    found = compiled.run_all(samples.batches(batch_size))
    worst = 0.0
    for name, wanted in expected.items():
        error = _relative_gap(wanted, found[name])
        if not error <= FOLD_TOLERANCE:
            raise VerificationError(
                "the compiled graph is not the dense graph under the plan",
                where=f"output {name!r}",
                why=f"they differ by {error:.3g} standard deviations; rounding explains at most {FOLD_TOLERANCE:g}",
                hint="please report this as a bug, with the plan file; nothing was written",
            )
        worst = max(worst, error)
    return worst


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
    """Interchange interventions on a pair of models, with matched values: both take the dense model's source values.

    Building one opens the sessions and runs the self-checks. A null patch and a self patch must leave either model's
    outputs bit for bit as they are; where the sites lie on every path from input to output, patching all their channels
    must reproduce the source's outputs.
    """

    def __init__(self, pair: Pair, samples: Samples, *, batch_size: int, metric: Metric | None = None) -> None:
        self.pair, self.batch_size = pair, batch_size
        tensors = [patch.tensor for patch in pair.patches]
        self._dense = Session(probe(pair.dense, tensors), optimise=False)
        self._compiled = Session(probe(pair.compiled, tensors), optimise=False)
        self._dense_patched = Session(patched(pair.dense, pair.patches), optimise=False)
        self._compiled_patched = Session(patched(pair.compiled, pair.patches), optimise=False)
        self.output = _compared_output(pair.dense)
        first = next(samples.batches(min(batch_size, len(samples))))
        self.metric = metric if metric is not None else default_metric(self._dense.run(first, [self.output])[self.output])
        self.full_source_checked = self._self_check(first)

    def _self_check(self, batch: Feed) -> bool:
        for name, plain, session, widths in (
            ("dense", self._dense, self._dense_patched, self._dense_widths(batch)),
            ("compiled", self._compiled, self._compiled_patched, list(self.pair.widths)),
        ):
            values = plain.run(batch)
            count = len(next(iter(batch.values())))
            for check, value in (("null", False), ("self", True)):
                feeds: dict[str, npt.NDArray[Any]] = dict(batch)
                for patch, width in zip(self.pair.patches, widths, strict=True):
                    feeds |= feed(patch, np.full((count, width), value), values[patch.tensor])
                found = session.run(feeds, [self.output])[self.output]
                if not _unchanged(found, values[self.output]):
                    raise VerificationError(
                        f"the {check} patch changes the {name} model",
                        where=f"output {self.output!r}",
                        why="an intervention that changes nothing must leave every output bit as it is",
                        hint="the model may be random or keep state between runs; otherwise please report a bug",
                    )
        if not _cuts_all_paths(self.pair.dense, [p.tensor for p in self.pair.patches], self.output):
            return False
        values = self._dense.run(batch)
        turned = {name: np.ascontiguousarray(array[::-1]) for name, array in batch.items()}
        feeds = dict(turned)
        for patch, width in zip(self.pair.patches, self._dense_widths(batch), strict=True):
            feeds |= feed(patch, np.full((len(values[patch.tensor]), width), fill_value=True), values[patch.tensor])
        found = self._dense_patched.run(feeds, [self.output])[self.output]
        if not _unchanged(found, values[self.output]):
            raise VerificationError(
                "the full-source patch does not reproduce the source",
                where=f"output {self.output!r}",
                why="the sites lie on every path, so that all their values determine the outputs",
                hint="the model may be random or keep state between runs; otherwise please report a bug",
            )
        return True

    def _dense_widths(self, batch: Feed) -> list[int]:
        values = self._dense.run(batch)
        return [values[patch.tensor].shape[patch.axis] for patch in self.pair.patches]

    def run(
        self, samples: Samples, *, law: Law, swap: float, seed: int, delta: float, progress: Progress = no_progress
    ) -> Fidelity:
        """Pair every sample with one other, each in one pair only, and interchange.

        Cost is linear in the trials: three forward passes each.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(samples))
        trials = len(samples) // 2
        base, source = order[:trials], order[trials : 2 * trials]
        losses: list[npt.NDArray[np.float64]] = []
        wanted: list[npt.NDArray[Any]] = []
        found: list[npt.NDArray[Any]] = []
        batches = self._batches(samples, base, source)
        total = math.ceil(trials / self.batch_size)
        for base_feed, source_feed in progress(batches, f"interchange, swap {swap:g}", total):
            dense_out, compiled_out = self._trial(base_feed, source_feed, law, swap, rng)
            losses.append(self.metric.loss(dense_out, compiled_out))
            wanted.append(dense_out)
            found.append(compiled_out)
        loss = np.concatenate(losses) if losses else np.zeros(0)
        total_loss = float(loss.sum())
        y, z = np.concatenate(wanted).astype(np.float64), np.concatenate(found).astype(np.float64)
        return Fidelity(
            law,
            swap,
            delta,
            trials,
            total_loss,
            1.0 - total_loss / max(trials, 1),
            1.0 - risk_bound(total_loss, trials, delta),
            relative_mse(y, z),
            kl_divergence(y, z) if self.metric.classes else None,
        )

    def _batches(self, samples: Samples, base: IntArray, source: IntArray) -> Iterator[tuple[Feed, Feed]]:
        yield from zip(
            samples.take(base).batches(self.batch_size), samples.take(source).batches(self.batch_size), strict=True
        )

    def _trial(
        self, base: Feed, source: Feed, law: Law, swap: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        values = self._dense.run(source, [patch.tensor for patch in self.pair.patches])
        dense_feed: dict[str, npt.NDArray[Any]] = dict(base)
        compiled_feed: dict[str, npt.NDArray[Any]] = dict(base)
        drawn = rng.integers(len(self.pair.patches), size=len(next(iter(base.values()))))
        for number, (patch, kept, places, width) in enumerate(
            zip(self.pair.patches, self.pair.kept, self.pair.places, self.pair.widths, strict=True)
        ):
            value = values[patch.tensor]
            chosen = rng.random((len(value), len(kept))) < swap
            if law == "one-site":
                chosen &= (drawn == number)[:, None]
            mask = np.zeros((len(value), value.shape[patch.axis]), dtype=np.bool_)
            mask[:, kept] = chosen
            dense_feed |= feed(patch, mask, value)
            narrow_mask = np.zeros((len(value), width), dtype=np.bool_)
            narrow_mask[:, places] = chosen
            channels = np.zeros(width, dtype=np.int64)  # a carrier's values are never patched in
            channels[places] = kept
            compiled_feed |= feed(patch, narrow_mask, np.take(value, channels, axis=patch.axis))
        dense_out = self._dense_patched.run(dense_feed, [self.output])[self.output]
        compiled_out = self._compiled_patched.run(compiled_feed, [self.output])[self.output]
        return dense_out, compiled_out

    def plain(self, samples: Samples) -> Mapping[str, float | None]:
        """Agreement and relative logit MSE without intervention, and accuracies where labels are there."""
        dense = self._dense.run_all(samples.batches(self.batch_size), [self.output])[self.output]
        compiled = self._compiled.run_all(samples.batches(self.batch_size), [self.output])[self.output]
        return {
            "agreement": 1.0 - float(self.metric.loss(dense, compiled).mean()),
            "logit_mse_relative": relative_mse(dense.astype(np.float64), compiled.astype(np.float64)),
            "accuracy_dense": self.metric.accuracy(dense, samples.labels),
            "accuracy_compiled": self.metric.accuracy(compiled, samples.labels),
        }


def _unchanged(found: npt.NDArray[Any], plain: npt.NDArray[Any]) -> bool:
    """Whether outputs are bit for bit the same; for 16-bit floats, to a few units in the last place.

    onnxruntime computes those in float32 and rounds at the tensors that an intervention adds to the graph.
    """
    if found.dtype.itemsize > 2 or found.dtype.kind in "iub?":
        return np.array_equal(found, plain, equal_nan=found.dtype.kind == "f")
    a, b = found.astype(np.float64), plain.astype(np.float64)
    digits = 10 if found.dtype == np.float16 else 7
    return bool(
        np.allclose(a, b, rtol=0.0, atol=8 * 2.0**-digits * float(np.nanmax(np.abs(b), initial=0.0)), equal_nan=True)
    )


def relative_mse(wanted: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> float:
    """Mean squared difference over the variance of `wanted` around its mean over samples."""
    spread = float(np.square(wanted - wanted.mean(axis=0)).mean())
    return float(np.square(wanted - found).mean()) / max(spread, np.finfo(np.float64).tiny)


def _compared_output(model: onnx.ModelProto) -> str:
    for output in model.graph.output:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
        if np.dtype(dtype).kind not in "iub?SO":
            return str(output.name)
    return str(model.graph.output[0].name)


def _cuts_all_paths(model: onnx.ModelProto, tensors: Sequence[str], output: str) -> bool:
    """Whether every path from a model input to `output` passes one of `tensors`."""
    inputs = {i.name for i in model.graph.input} - {i.name for i in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output if name}
    waiting, seen = [output], set(tensors)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        if name in inputs:
            return False
        seen.add(name)
        if name in producers:
            node = producers[name]
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                return False  # a subgraph may use any tensor
            waiting += [i for i in node.input if i]
    return True
