"""Which outputs are compared, by which metric, and what a trial's loss is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from mscompile.audit.report import ComparedOutput
from mscompile.errors import UnsupportedError, UsageError
from mscompile.runtime import Arrays
from mscompile.verification.metrics import Metric, choose_metric, default_metric


@dataclass(frozen=True)
class Output:
    """An output of both models, and how it is compared; `weight` is relative to the largest."""

    dense: str
    compiled: str
    weight: float
    metrics: tuple[Metric, ...]

    @property
    def report(self) -> ComparedOutput:
        """For the certificate."""
        return ComparedOutput(
            dense=self.dense, compiled=self.compiled, weight=self.weight, metrics=[metric.name for metric in self.metrics]
        )


@dataclass(frozen=True)
class Measure:
    """What one claim counts: the loss of an output by a metric, or the largest weighted loss of several.

    Attributes
    ----------
    parts
        Output, metric and weight in (0, 1].
    """

    parts: tuple[tuple[str, Metric, float], ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs it looks at."""
        return tuple(output for output, _, _ in self.parts)

    @property
    def metric(self) -> str:
        """Name of the metric; of several outputs, of each."""
        if len(self.parts) == 1:
            return self.parts[0][1].name
        return ", ".join(f"{output}: {metric.name}" for output, metric, _ in self.parts)

    @property
    def first(self) -> Metric:
        """Metric of the first output."""
        return self.parts[0][1]

    def loss(self, dense: Arrays, compiled: Arrays) -> npt.NDArray[np.float64]:
        """[samples] in [0, 1]."""
        return largest(self.by_output(dense, compiled).values())

    def by_output(self, dense: Arrays, compiled: Arrays) -> dict[str, npt.NDArray[np.float64]]:
        """[samples] in [0, 1] for each output."""
        return {o: weight * checked(metric, dense[o], compiled[o]) for o, metric, weight in self.parts}


def largest(losses: Iterable[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """[samples] largest of several losses."""
    found: npt.NDArray[np.float64] = np.max(np.stack(list(losses)), axis=0)
    return found


def checked(metric: Metric, dense: npt.NDArray[np.generic], compiled: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Losses of a metric, which may be a user's own.

    Raises
    ------
    UsageError
        They are not numbers in [0, 1], one a sample: the certificate would not hold.
    """
    loss = np.asarray(metric.loss(dense, compiled), dtype=np.float64)
    if loss.shape != (len(dense),) or not ((loss >= 0.0) & (loss <= 1.0)).all():
        raise UsageError(
            "the metric cannot be used",
            where=metric.name,
            why=f"of {len(dense)} losses in [0, 1] it gave shape {loss.shape}, the largest {loss.max(initial=-np.inf):g}",
            hint="return one number per sample, 0 where the outputs agree",
        )
    return loss


def measures_of(outputs: Sequence[Output]) -> tuple[Measure, ...]:
    """What is claimed: of several outputs first all together, by the first metric of each, then each by itself."""
    together = Measure(tuple((o.dense, o.metrics[0], o.weight) for o in outputs))
    each = [Measure(((o.dense, metric, 1.0),)) for o in outputs for metric in o.metrics]
    return (together, *each) if len(outputs) > 1 else tuple(each)


def choose_outputs(
    named: Mapping[str, float] | None,
    metrics: Sequence[str | Metric | None],
    dense: onnx.ModelProto,
    compiled: onnx.ModelProto,
    values: tuple[Arrays, Arrays],
    count: int,
    *,
    free: bool,
) -> tuple[tuple[Output, ...], list[str]]:
    """Pair the outputs up: those that are named, or all that give one result per sample in both models.

    Parameters
    ----------
    named
        Weight by name.
    metrics
        For every output, or ``OUTPUT=METRIC`` for one; None chooses by the values.
    values
        All outputs of either model on the same `count` samples.
    free
        Whether the models take any number of samples.

    Returns
    -------
    tuple
        The outputs, and what to say of those left out.

    Raises
    ------
    UsageError
        A named output cannot be compared.
    UnsupportedError
        None can.
    """
    answers = _answers(dense, compiled)
    reasons = {
        output.name: _misfit(output, answers.get(output.name), values, count, free=free) for output in dense.graph.output
    }
    for name, weight in (named or {}).items():
        why = reasons.get(name, "the dense model has no such output") if 0.0 < weight < math.inf else "weights are positive"
        if why is not None:
            known = ", ".join(output for output, reason in reasons.items() if reason is None)
            raise UsageError(
                "this output cannot be compared",
                where=f"--output {name}",
                why=why,
                hint=f"name one of: {known}" if known else "no output of these models can be compared",
            )
    chosen = dict(named) if named else {name: 1.0 for name, why in reasons.items() if why is None}
    if not chosen:
        raise UnsupportedError(
            "no output can be compared",
            where="outputs of the two models",
            why="; ".join(f"{name!r}: {why}" for name, why in reasons.items())[:400],
            hint="export both models with an output of one result per sample, of the same name",
        )
    heaviest = max(chosen.values())
    outputs = tuple(
        Output(name, answers[name], weight / heaviest, _metrics_of(name, metrics, reasons, values[0][name]))
        for name, weight in chosen.items()
    )
    notes = [f"output {name!r} is not compared: {why}" for name, why in reasons.items() if why is not None and not named]
    return outputs, notes


def _answers(dense: onnx.ModelProto, compiled: onnx.ModelProto) -> dict[str, str]:
    """The compiled model's output for each of the dense one's: by name or, where no name is the same, by place."""
    ours, theirs = ([output.name for output in model.graph.output] for model in (dense, compiled))
    same = {name: name for name in ours if name in theirs}
    return same or dict(zip(ours, theirs, strict=False))


def _misfit(
    output: onnx.ValueInfoProto, answer: str | None, values: tuple[Arrays, Arrays], count: int, *, free: bool
) -> str | None:
    """Why an output cannot be compared."""
    if answer is None:
        return "the compiled model has none of that name"
    a, b = values[0].get(output.name), values[1].get(answer)
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or {a.dtype.kind, b.dtype.kind} & set("OSU"):
        return "it is no tensor of numbers"
    declared = output.type.tensor_type.shape.dim
    one = free and bool(declared) and declared[0].HasField("dim_value")  # of a fixed number, whatever the samples
    if a.shape[:1] != (count,) or b.shape[:1] != (count,) or one:
        return f"it is not one result per sample, but of shape {list(a.shape)} for {count} samples"
    return None if a.shape == b.shape else f"its shapes differ: {list(a.shape[1:])} and {list(b.shape[1:])} per sample"


def _metrics_of(
    name: str, metrics: Sequence[str | Metric | None], outputs: Iterable[str], values: npt.NDArray[np.generic]
) -> tuple[Metric, ...]:
    """The metrics given for an output or, where none is given for it alone, for all."""
    own: list[str | Metric | None] = []
    common: list[str | Metric | None] = []
    for metric in metrics:
        target, text = _split(metric, outputs)
        (common if target is None else own if target == name else []).append(text)
    return tuple(choose_metric(metric, default_metric(values)) for metric in own or common or [None])


def _split(metric: str | Metric | None, outputs: Iterable[str]) -> tuple[str | None, str | Metric | None]:
    """``OUTPUT=METRIC``, where there is such an output."""
    if isinstance(metric, str):
        for name in outputs:
            if metric.startswith(f"{name}="):
                return name, metric.removeprefix(f"{name}=")
    return None, metric
