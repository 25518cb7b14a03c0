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


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("argmax", _argmax_loss, classes=True),
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


def kl_divergence(dense: npt.NDArray[np.float64], compiled: npt.NDArray[np.float64]) -> float:
    """Mean over samples and places of KL(softmax dense ‖ softmax compiled), in nats."""
    log_p = scipy.special.log_softmax(dense, axis=-1)
    log_q = scipy.special.log_softmax(compiled, axis=-1)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
