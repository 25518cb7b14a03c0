"""Scores: what replacing each unit is predicted to cost, from calibration statistics.

The interventional risk of do(a_j := c) is surrogated to second order from the curvature that the reverse pass measured
(Asiaee 2026, section 3). Where an operator stops the reverse pass, the squared change of the readers' own outputs stands in,
G = Σ_readers W Wᵀ summed over output channels and kernel taps; `Scores.basis` says which, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.calibration.statistics import Curvature, Moments, Scale, Statistics
from mscompile.network.scm import Scm, Site
from mscompile.runtime import Arrays
from mscompile.verification.metrics import kl_divergence

Array = npt.NDArray[np.float64]

TINY = float(np.finfo(np.float32).tiny)
FLAT = 1e-10
"""Share of the largest curvature of a site below which a unit's is numerically zero."""
UNUSABLE = 0.25
"""Share of a site's optimal constants outside the observed range from which none of them is used."""
SQUARED_OUTPUTS = "half the squared change of the outputs"
DIVERGENCE = "KL divergence of the outputs, in nats"
READER_LOCAL = "half the squared change of the readers' outputs"
MEASURABLE = (SQUARED_OUTPUTS, DIVERGENCE, READER_LOCAL)
"""Bases that are risks, which replacements of several units have as well."""


@dataclass(frozen=True)
class Scores:
    """Predicted cost of constant replacement, per site and channel.

    Attributes
    ----------
    objective
        Key of `OBJECTIVES`.
    risk
        [channels] by site tensor; larger is worse to lose.
    constants
        [channels] by site tensor: the constant that the risk is for, in the units of the activation.
    basis
        By site tensor: what the risk estimates.
    warnings
        What the user should know about them.
    """

    objective: str
    risk: Mapping[str, Array]
    constants: Mapping[str, Array]
    basis: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Scores of one site; fields as in `Scores`."""

    risk: Array
    constants: Array
    basis: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A way of scoring, and the curvature it needs from calibration.

    Attributes
    ----------
    score
        (model, site, statistics, seed) -> scores of the site.
    curvature, gradient
        See `Measure`.
    """

    score: Callable[[Scm, Site, Statistics, int], Scored]
    curvature: Literal["identity", "fisher", "none"] = "none"
    gradient: bool = False


def reader_curvature(site: Site) -> Array:
    """G = Σ_readers W Wᵀ, [channels, channels]: squared change of the readers' outputs per unit of activation."""
    total = np.zeros((site.size, site.size))
    for reader in site.readers:
        weight = reader.columns(site.size).reshape(site.size, -1) * reader.signature.linear.gain  # type: ignore[union-attr]
        change = weight @ weight.T
        # Channels of different groups meet outputs of different ones.
        total += change if reader.groups == 1 or site.rows is None else change * (site.rows[:, None] == site.rows)
    for pairing in site.pairings:  # the queries are not measured: their weights say how large they may be
        for slot, index in zip(pairing.slots, pairing.index, strict=True):
            rows = np.moveaxis(_tensor(slot.node, slot.operand).astype(np.float64), slot.axis, 0)
            met = index >= 0
            np.add.at(total, (index[met], index[met]), np.square(rows[met]).reshape(met.sum(), -1).sum(axis=1))
    return total


def optimal_constants(curvature: Curvature, moments: Moments, step: float = 1.0) -> tuple[Array, Array, int]:
    """Constants of least predicted risk, that risk, and how many gave way to the mean.

    The change of the objective under do(a_j := c) is to second order q(c) = ½ c² E[S1²] − c E[S1 S2] + ½ E[S2²] + c E[Σg]
    − E[Σ g a], least at c* = (E[S1 S2] − E[Σg]) / E[S1²] (Asiaee 2026, section 3, with sums over positions in place of
    single ones). Where E[S1²] vanishes, or c* lies outside the range the unit was observed in — the quadratic says nothing
    there — the mean is taken; where that happens to more than a share `UNUSABLE` of the units, the quadratic is not to be
    trusted for the others either, and all take their means. (Label cross-entropy has no curvature at samples that the
    network is sure of; its optimal constants drive the network to chance otherwise.) A `step` below 1 goes only so much of
    the way there from the mean.
    """
    n = curvature.samples
    s11, s12, s22 = curvature.s11 / n, curvature.s12 / n, curvature.s22 / n
    g1, g2 = curvature.g1 / n, curvature.g2 / n
    flat = s11 <= FLAT * max(float(s11.max(initial=0.0)), TINY)
    constants = np.where(flat, moments.mean, (s12 - g1) / np.where(flat, 1.0, s11))
    margin = 1e-6 * (np.abs(moments.low) + np.abs(moments.high))  # float32 rounding of a constant unit's value
    outside = ~flat & ((constants < moments.low - margin) | (constants > moments.high + margin))
    refused = outside.mean() > UNUSABLE
    constants = moments.mean if refused else np.where(outside, moments.mean, constants)
    constants = moments.mean + step * (constants - moments.mean)
    risk = 0.5 * constants**2 * s11 - constants * s12 + 0.5 * s22 + constants * g1 - g2
    return constants, risk, len(outside) if refused else int(outside.sum())


def _curved(scm: Scm, site: Site, statistics: Statistics, seed: int, *, unit: str) -> Scored:
    """Interventional risk where the reverse pass reached the site, its reader-local surrogate elsewhere."""
    del scm, seed
    moments = statistics.moments[site.tensor]
    curvature = statistics.curvature.get(site.tensor)
    if curvature is None:
        risk = 0.5 * np.diagonal(reader_curvature(site)) * moments.variance
        reason = statistics.refused.get(site.tensor, "no output depends on it")
        return Scored(risk, moments.mean, f"{READER_LOCAL}: {reason}")
    scale = statistics.scales.get(site.tensor, Scale())
    constants, risk, outside = optimal_constants(curvature, moments, scale.step)
    warning = (
        f"site {site.tensor!r}: the mean replaces the optimal constant of {outside} of {site.size} units; optima lie "
        "outside the range observed, where the quadratic says nothing"
    )
    return Scored(scale.factor * risk, constants, unit, (warning,) if outside and scale.step else ())


def _curvature_times_variance(scm: Scm, site: Site, statistics: Statistics, seed: int) -> Scored:
    moments, curvature = statistics.moments[site.tensor], statistics.curvature.get(site.tensor)
    if curvature is None:
        return _curved(scm, site, statistics, seed, unit="")
    return Scored(0.5 * curvature.s11 / curvature.samples * moments.variance, moments.mean, "curvature times variance")


def _variance(scm: Scm, site: Site, statistics: Statistics, seed: int) -> Scored:
    del scm, seed
    moments = statistics.moments[site.tensor]
    return Scored(moments.variance, moments.mean, "variance of the unit")


def _magnitude(scm: Scm, site: Site, statistics: Statistics, seed: int) -> Scored:
    del seed
    squares: dict[int, float] = {}
    for creator in scm.creators_of(site.units):
        for slot in creator.slots:
            tensor = _tensor(creator.node, slot.operand)
            if tensor.ndim < 2:
                continue
            rows = np.moveaxis(tensor.astype(np.float64), slot.axis, 0).reshape(len(slot.units), -1)
            for unit, square in zip(slot.units.tolist(), np.square(rows).sum(1).tolist(), strict=True):
                squares[unit] = squares.get(unit, 0.0) + square
    norms = np.sqrt([squares.get(unit, 0.0) for unit in site.units.tolist()])
    return Scored(norms, statistics.moments[site.tensor].mean, "norm of the incoming weights")


def _random(scm: Scm, site: Site, statistics: Statistics, seed: int) -> Scored:
    del scm
    numbers = np.random.default_rng([seed, site.group]).random(site.size)
    return Scored(numbers, statistics.moments[site.tensor].mean, "random numbers")


def _tensor(node: ir.Node, operand: int) -> npt.NDArray[np.generic]:
    value = node.inputs[operand]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


OBJECTIVES: Mapping[str, Objective] = {
    "logit-mse": Objective(partial(_curved, unit=SQUARED_OUTPUTS), "identity"),
    "kl": Objective(partial(_curved, unit=DIVERGENCE), "fisher"),
    "cross-entropy": Objective(partial(_curved, unit="cross-entropy with the labels"), "fisher", gradient=True),
    "cwvar": Objective(_curvature_times_variance, "identity"),
    "variance": Objective(_variance),
    "magnitude": Objective(_magnitude),
    "random": Objective(_random),
}


def score(scm: Scm, sites: Sequence[Site], statistics: Statistics, objective: str, *, seed: int = 0) -> Scores:
    """Score every channel of `sites` under one of `OBJECTIVES`."""
    found = {site.tensor: OBJECTIVES[objective].score(scm, site, statistics, seed) for site in sites}
    return Scores(
        objective,
        {tensor: scored.risk for tensor, scored in found.items()},
        {tensor: scored.constants for tensor, scored in found.items()},
        {tensor: scored.basis for tensor, scored in found.items()},
        tuple(warning for scored in found.values() for warning in scored.warnings),
    )


def joint_curvature(site: Site, statistics: Statistics) -> Array:
    """G with ½ tr(G_PP R_PP) the predicted risk of replacements whose error has covariance R, [channels, channels].

    Σ_positions E[λ λᵀ] per sample where the reverse pass reached the site, taking errors at different positions as
    independent; the readers' own W Wᵀ elsewhere.
    """
    curvature = statistics.curvature.get(site.tensor)
    if curvature is None or curvature.second is None:
        return reader_curvature(site)
    return curvature.second / curvature.samples


def measured_risk(basis: str, dense: Arrays, intervened: Arrays, outputs: Mapping[str, float]) -> float:
    """What a score of that basis predicts, measured, summed over samples: half the squared distance of outputs, or their KL.

    Parameters
    ----------
    outputs
        Weight by name of output.
    """
    total = 0.0
    for output, weight in outputs.items():
        y, z = dense[output].astype(np.float64), intervened[output].astype(np.float64)
        if basis == DIVERGENCE:
            total += weight * kl_divergence(y, z) * float(np.prod(y.shape[:-1]))
        else:
            total += weight * 0.5 * float(np.square(y - z).sum())
    return total


def predictable(basis: str) -> bool:
    """Whether a basis is a risk that can be measured at the outputs."""
    return basis in (SQUARED_OUTPUTS, DIVERGENCE)
