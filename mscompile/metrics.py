"""Bounded disagreement of two outputs, and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special

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


class Difference:
    """How far outputs lie apart, summed up batch by batch.

    Attributes
    ----------
    count
        Samples seen.
    squared
        Σ ‖wanted − found‖² over samples.
    """

    def __init__(self, *, classes: bool) -> None:
        self.classes = classes
        self.count, self.entries, self.squared = 0, 1, 0.0
        self._kl, self._scatter = 0.0, 0.0
        self._mean: npt.NDArray[np.float64] | None = None

    def add(self, wanted: Array, found: Array) -> None:
        """Take in [samples, …] outputs."""
        y, z = wanted.astype(np.float64), found.astype(np.float64)
        if not len(y):
            return
        self.squared += float(np.square(y - z).sum())
        if self.classes:
            self._kl += kl_divergence(y, z) * len(y)
        mean = y.mean(axis=0)
        self._scatter += float(np.square(y - mean).sum())  # around the batch's mean, then moved to that of all
        if self._mean is None:
            self._mean, self.entries = mean, max(mean.size, 1)
        else:
            total = self.count + len(y)
            self._scatter += self.count * len(y) / total * float(np.square(mean - self._mean).sum())
            self._mean = self._mean + (mean - self._mean) * (len(y) / total)
        self.count += len(y)

    @property
    def relative_mse(self) -> float:
        """Squared difference over the scatter of what is wanted around its mean."""
        return self.squared / max(self._scatter, float(np.finfo(np.float64).tiny) * self.entries * max(self.count, 1))

    @property
    def kl(self) -> float | None:
        """Mean KL divergence in nats, for class scores."""
        return self._kl / max(self.count, 1) if self.classes else None
