"""Scores: what replacing each unit is predicted to cost, from calibration statistics.

The risk of replacing the units P of a site is surrogated by ½ tr(G_PP R_PP), R the covariance of the replacement error
and G the curvature of the squared error behind the site (Asiaee 2026, section 3). Here G is that of the readers' own
outputs, G = Σ_readers W Wᵀ summed over output channels and kernel taps. Where the readers produce the logits this is the
interventional risk in logit-mse itself; elsewhere it is its reader-local surrogate, and `Scores.basis` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.operators import Signature, is_parameter
from mscompile.scm import Reader, Scm, Site
from mscompile.statistics import Statistics

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Predicted cost of constant replacement, per site and channel.

    Attributes
    ----------
    objective
        Key of `OBJECTIVES`.
    risk
        [channels] by site tensor; larger is worse to lose. In squared logits for ``logit-mse``, without unit for others.
    basis
        By site tensor: what the number is an estimate of.
    """

    objective: str
    risk: Mapping[str, Array]
    basis: Mapping[str, str]


def weight_rows(reader: Reader) -> Array:
    """[columns, rest]: the reader's weight in float64, contracted axis first, the other axes flattened."""
    tensor = reader.weight.const_value
    assert tensor is not None
    weight = np.moveaxis(tensor.numpy().astype(np.float64), reader.axis, 0)
    return weight.reshape(len(weight), -1) * reader.signature.linear.gain  # type: ignore[union-attr]


def by_channel(reader: Reader, rows: Array, size: int) -> Array:
    """[channels, places · rest]: the weight rows of each of the site's channels side by side."""
    order = np.argsort(reader.index, kind="stable")
    return rows[order].reshape(size, -1)


def curvature(site: Site) -> Array:
    """G = Σ_readers W Wᵀ, [channels, channels]: squared change of the readers' outputs per unit of activation."""
    total = np.zeros((site.size, site.size))
    for reader in site.readers:
        weight = by_channel(reader, weight_rows(reader), site.size)
        total += weight @ weight.T
    return total


def produces_logits(scm: Scm, reader: Reader) -> bool:
    """Whether the reader's output, up to an added parameter, is a model output."""
    value = reader.node.outputs[0]
    while not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1:
            return False
        node = uses[0].node
        found = scm.signatures.get(node)
        others = [v for v in node.inputs if v is not None and v is not value]
        if not isinstance(found, Signature) or not found.additive or not all(is_parameter(v) for v in others):
            return False
        value = node.outputs[0]
    return not value.uses()


def _logit_mse(scm: Scm, site: Site, statistics: Statistics, seed: int) -> tuple[Array, str]:
    del seed
    risk = 0.5 * np.diagonal(curvature(site)) * statistics.moments[site.tensor].variance
    exact = all(produces_logits(scm, reader) for reader in site.readers)
    return risk, "squared logits" if exact else "squared change of the readers' outputs"


def _variance(scm: Scm, site: Site, statistics: Statistics, seed: int) -> tuple[Array, str]:
    del scm, seed
    return statistics.moments[site.tensor].variance, "variance of the unit"


def _magnitude(scm: Scm, site: Site, statistics: Statistics, seed: int) -> tuple[Array, str]:
    del statistics, seed
    squares: dict[int, float] = {}
    for creator in scm.creators_of(site.units):
        for slot in creator.slots:
            tensor = _tensor(creator.node, slot.operand)
            if tensor.ndim < 2:
                continue
            rows = np.moveaxis(tensor.astype(np.float64), slot.axis, 0).reshape(len(slot.units), -1)
            for unit, square in zip(slot.units.tolist(), np.square(rows).sum(1).tolist(), strict=True):
                squares[unit] = squares.get(unit, 0.0) + square
    return np.sqrt([squares[unit] for unit in site.units.tolist()]), "norm of the incoming weights"


def _random(scm: Scm, site: Site, statistics: Statistics, seed: int) -> tuple[Array, str]:
    del scm, statistics
    return np.random.default_rng([seed, site.group]).random(site.size), "random numbers"


def _tensor(node: ir.Node, operand: int) -> npt.NDArray[np.generic]:
    value = node.inputs[operand]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


OBJECTIVES: Mapping[str, Callable[[Scm, Site, Statistics, int], tuple[Array, str]]] = {
    "logit-mse": _logit_mse,
    "variance": _variance,
    "magnitude": _magnitude,
    "random": _random,
}


def score(scm: Scm, sites: Sequence[Site], statistics: Statistics, objective: str, *, seed: int = 0) -> Scores:
    """Score every channel of `sites` under one of `OBJECTIVES`."""
    found = {site.tensor: OBJECTIVES[objective](scm, site, statistics, seed) for site in sites}
    return Scores(
        objective,
        {tensor: risk for tensor, (risk, _) in found.items()},
        {tensor: basis for tensor, (_, basis) in found.items()},
    )
