"""Bounded disagreement of two outputs, and accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special

from mscompile.errors import UsageError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """How two outputs on the same samples are compared.

    Attributes
    ----------
    name
        As reported.
    loss
        (dense, compiled) -> [samples] in [0, 1]: 0 where they agree.
    classes
        Whether the last axis holds class scores.
    """

    name: str
    loss: Callable[[Array, Array], npt.NDArray[np.float64]]
    classes: bool

    def accuracy(self, output: Array, labels: Array | None) -> float | None:
        """Share of labels met, or None without labels that fit."""
        if labels is None or not self.classes or labels.shape != output.shape[:-1]:
            return None
        return float((output.argmax(axis=-1) == labels).mean())

    def misfit(self, shape: Sequence[int], labels: Array | None) -> str | None:
        """What keeps labels from giving an accuracy, or part of it, for outputs of a shape; None where nothing does."""
        if labels is None:
            return None
        if not self.classes:
            return f"no accuracy is measured: the answer, compared by {self.name}, is not taken for classes"
        if labels.shape[1:] != tuple(shape[1:-1]):
            found, wanted = (", ".join(["samples", *map(str, dims)]) for dims in (labels.shape[1:], shape[1:-1]))
            return f"no accuracy is measured: the labels have the shape ({found}), the classes answered ({wanted})"
        outside = int((~np.isin(labels, np.arange(shape[-1]))).sum())
        if outside:
            return f"{outside} of {labels.size} labels are none of the classes 0 to {shape[-1] - 1}: they count as not met"
        return None


def _argmax_loss(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    """Share of answers, over all places of a sample, where the highest score lies elsewhere."""
    differs = dense.argmax(axis=-1) != compiled.argmax(axis=-1)
    loss: npt.NDArray[np.float64] = differs.reshape(len(differs), -1).mean(axis=1)
    return loss


def _distance_loss(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    """Squared distance over squared norm of the dense output, at most 1."""
    a = dense.reshape(len(dense), -1).astype(np.float64)
    b = compiled.reshape(len(compiled), -1).astype(np.float64)
    norm = np.maximum(np.square(a).sum(axis=1), np.finfo(np.float64).tiny)
    loss: npt.NDArray[np.float64] = np.minimum(np.square(a - b).sum(axis=1) / norm, 1.0)
    return loss


def _cosine_loss(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    """Half of one minus the cosine of the angle between the outputs."""
    a = dense.reshape(len(dense), -1).astype(np.float64)
    b = compiled.reshape(len(compiled), -1).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    loss: npt.NDArray[np.float64] = np.clip((1.0 - cosine) / 2.0, 0.0, 1.0)
    return loss


def _equality_loss(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    """Share of entries, over all places of a sample, that differ."""
    loss: npt.NDArray[np.float64] = (dense != compiled).reshape(len(dense), -1).mean(axis=1)
    return loss


def _kl_loss(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    """1 − exp(−KL), mean over places: at least the squared total variation (Bretagnolle and Huber)."""
    places = -np.expm1(-np.maximum(_divergence(dense, compiled), 0.0))
    loss: npt.NDArray[np.float64] = places.reshape(len(dense), -1).mean(axis=1)
    return loss


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("argmax", _argmax_loss, classes=True),
        Metric("kl", _kl_loss, classes=True),
        Metric("distance", _distance_loss, classes=False),
        Metric("cosine", _cosine_loss, classes=False),
        Metric("equality", _equality_loss, classes=False),
    )
}


def choose_metric(chosen: str | Metric | None, default: Metric) -> Metric:
    """A metric by its name, as it is, or from a function ``script.py:function``; `default` for None.

    The function takes the outputs of both models, [samples, …], and returns [samples] losses in [0, 1]. Its name in reports
    carries the digest of the script.

    Raises
    ------
    UsageError
        There is no such metric.
    """
    if chosen is None or isinstance(chosen, Metric):
        return default if chosen is None else chosen
    if chosen in METRICS:
        return METRICS[chosen]
    path, _, function = chosen.partition("#")[0].rpartition(":")
    try:
        content = Path(path).read_bytes()
        found: dict[str, Any] = {"__name__": "mscompile_metric"}
        exec(compile(content, path, "exec"), found)  # noqa: S102  # asked for by path
        return Metric(f"{path}:{function}#{hashlib.sha256(content).hexdigest()[:16]}", found[function], classes=False)
    except Exception as error:
        raise UsageError(
            "there is no such metric",
            where=chosen,
            why=f"{type(error).__name__}: {error}"[:400],
            hint=f"give one of {', '.join(METRICS)}, or script.py:function",
        ) from error


def default_metric(output: Array) -> Metric:
    """Equality of integers; class scores where the last axis has at least two entries; else the distance."""
    if output.dtype.kind in "iub":
        return METRICS["equality"]
    return METRICS["argmax" if output.ndim >= 2 and output.shape[-1] >= 2 else "distance"]


def kl_divergence(dense: Array, compiled: Array) -> float:
    """Mean over samples and places of KL(softmax dense ‖ softmax compiled), in nats."""
    return float(_divergence(dense, compiled).mean())


def _divergence(dense: Array, compiled: Array) -> npt.NDArray[np.float64]:
    log_p = scipy.special.log_softmax(dense.astype(np.float64), axis=-1)
    log_q = scipy.special.log_softmax(compiled.astype(np.float64), axis=-1)
    divergence: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return divergence


def relative_mse(wanted: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> float:
    """Mean squared difference over the variance of `wanted` around its mean over samples."""
    difference = Difference(classes=False)
    difference.add(wanted, found)
    return difference.relative_mse


class Scatter:
    """Σ ‖x − mean of x‖² over samples, summed up batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self._mean: npt.NDArray[np.float64] | float = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Take in [samples, …] values."""
        if not len(values):
            return
        mean, count = values.mean(axis=0), self.count + len(values)
        self.total += float(np.square(values - mean).sum())
        self.total += self.count * len(values) / count * float(np.square(mean - self._mean).sum())
        self._mean = self._mean + (mean - self._mean) * (len(values) / count)
        self.count = count


class Difference:
    """How far outputs lie apart, summed up batch by batch.

    Attributes
    ----------
    squared
        Σ ‖wanted − found‖² over samples.
    scatter
        Of what is wanted.
    """

    def __init__(self, *, classes: bool) -> None:
        self.classes = classes
        self.scatter, self.squared, self._kl = Scatter(), 0.0, 0.0

    def add(self, wanted: Array, found: Array) -> None:
        """Take in [samples, …] outputs."""
        y, z = wanted.astype(np.float64), found.astype(np.float64)
        self.scatter.add(y)
        self.squared += float(np.square(y - z).sum())
        if self.classes and len(y):
            self._kl += kl_divergence(y, z) * len(y)

    @property
    def relative_mse(self) -> float:
        """Squared difference over the scatter of what is wanted around its mean."""
        return self.squared / max(self.scatter.total, float(np.finfo(np.float64).tiny))

    @property
    def kl(self) -> float | None:
        """Mean KL divergence in nats, for class scores."""
        return self._kl / max(self.scatter.count, 1) if self.classes else None
