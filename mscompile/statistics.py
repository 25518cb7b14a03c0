"""Calibration: one streaming pass of onnxruntime that leaves with sums, never with activations.

Nodes appended to a copy of the graph reduce each site's activations to its channel sums and outer products; those are
accumulated here in float64. Statistics of disjoint data add up: ``a + b`` is what one pass over both would have given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from mscompile.data import Samples
from mscompile.runtime import Progress, Session, no_progress
from mscompile.scm import Scm, Site

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """First and second moments of a site's channels, positions pooled.

    Attributes
    ----------
    count
        Observations: samples times positions.
    mean
        [channels], in the units of the activation.
    scatter
        [channels, channels]: sum of outer products of deviations from the mean.
    low, high
        [channels]: range observed.
    """

    count: int
    mean: Array
    scatter: Array
    low: Array
    high: Array

    @property
    def covariance(self) -> Array:
        """[channels, channels], normalised by the count."""
        return self.scatter / self.count

    @property
    def variance(self) -> Array:
        """[channels]."""
        return np.diagonal(self.scatter) / self.count

    def __add__(self, other: Moments) -> Moments:
        """Moments over the union of two disjoint sets of observations (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


@dataclass(frozen=True)
class Statistics:
    """What calibration found.

    Attributes
    ----------
    moments
        By site tensor.
    samples
        Samples seen.
    data_sha256
        Digests of the data sets seen, in order.
    onnxruntime
        Version that ran.
    """

    moments: Mapping[str, Moments]
    samples: int
    data_sha256: tuple[str, ...]
    onnxruntime: str

    def __add__(self, other: Statistics) -> Statistics:
        if self.moments.keys() != other.moments.keys():
            raise ValueError("statistics of different sites do not add up")
        return Statistics(
            {tensor: self.moments[tensor] + other.moments[tensor] for tensor in self.moments},
            self.samples + other.samples,
            self.data_sha256 + other.data_sha256,
            self.onnxruntime,
        )


def calibrate(
    scm: Scm, sites: Sequence[Site], samples: Samples, *, batch_size: int, progress: Progress = no_progress
) -> Statistics:
    """Collect the moments of `sites` over `samples` in one pass.

    Memory does not grow with the number of samples; a site of C channels takes C² float64.
    """
    session = Session(instrumented(scm, sites))
    centres = {site.tensor: np.zeros(site.size, dtype=np.float32) for site in sites}
    totals: dict[str, Moments] = {}
    batches = math.ceil(len(samples) / batch_size)
    for number, batch in enumerate(progress(samples.batches(batch_size), "calibrate", batches)):
        if number == 0:  # centre near the mean, or float32 sums would lose the variance of channels far from zero
            found = session.run({**batch, **_feeds(centres)})
            for site in sites:
                count = max(int(found[_name(site, "count")]), 1)
                centres[site.tensor] = (found[_name(site, "sum")] / count).astype(np.float32)
        found = session.run({**batch, **_feeds(centres)})
        for site in sites:
            moments = _moments(site, found, centres[site.tensor])
            totals[site.tensor] = totals[site.tensor] + moments if site.tensor in totals else moments
    return Statistics(totals, len(samples), (samples.sha256,), ort.__version__)


_QUANTITIES = ("count", "sum", "products", "low", "high")


def _name(site: Site, quantity: str) -> str:
    return f"mscompile.{quantity}:{site.tensor}"


def _feeds(centres: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
    return {f"mscompile.centre:{tensor}": centre for tensor, centre in centres.items()}


def _moments(site: Site, found: Mapping[str, npt.NDArray[np.float32]], centre: npt.NDArray[np.float32]) -> Moments:
    count = int(found[_name(site, "count")])
    offset = found[_name(site, "sum")].astype(np.float64) / count
    scatter = found[_name(site, "products")].astype(np.float64) - count * np.outer(offset, offset)
    return Moments(
        count,
        centre.astype(np.float64) + offset,
        scatter,
        found[_name(site, "low")].astype(np.float64),
        found[_name(site, "high")].astype(np.float64),
    )


def instrumented(scm: Scm, sites: Sequence[Site]) -> ir.Model:
    """Copy of the graph whose outputs are the channel sums of each site.

    Per site: the number of observations, Σ (a − m), Σ (a − m)(a − m)ᵀ, min a and max a, all float32, for a centre m that
    is a new graph input.
    """
    model = scm.model.clone()
    graph = model.graph
    values = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.clear()
    tape = ir.tape.Tape(graph)
    opset = graph.opset_imports.get("", 1)
    for site in sites:
        tensor = values[site.tensor]
        rank = len(scm.shapes[site.tensor])
        centre = ir.Value(name=f"mscompile.centre:{site.tensor}", shape=ir.Shape([site.size]))
        centre.dtype = ir.DataType.FLOAT
        graph.inputs.append(centre)
        rows = tensor
        if site.axis != rank - 1:
            order = [a for a in range(rank) if a != site.axis] + [site.axis]
            rows = tape.op("Transpose", [rows], {"perm": order})
        rows = tape.op("Reshape", [rows, _constant(tape, [-1, site.size])])
        rows = tape.op("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        centred = tape.op("Sub", [rows, centre])
        count = tape.op("Gather", [tape.op("Shape", [rows]), _constant(tape, 0)], {"axis": 0})
        found = {
            "count": (count, ir.DataType.INT64),
            "sum": (_reduce(tape, "ReduceSum", centred, opset, since=13), ir.DataType.FLOAT),
            "products": (
                tape.op("MatMul", [tape.op("Transpose", [centred], {"perm": [1, 0]}), centred]),
                ir.DataType.FLOAT,
            ),
            "low": (_reduce(tape, "ReduceMin", rows, opset, since=18), ir.DataType.FLOAT),
            "high": (_reduce(tape, "ReduceMax", rows, opset, since=18), ir.DataType.FLOAT),
        }
        for quantity in _QUANTITIES:
            value, dtype = found[quantity]
            value.name, value.dtype = _name(site, quantity), dtype
            graph.outputs.append(value)
    return model


def _constant(tape: ir.tape.Tape, value: int | list[int]) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(value, dtype=np.int64), name=f"mscompile.constant.{len(tape.initializers)}"))


def _reduce(tape: ir.tape.Tape, operator: str, rows: ir.Value, opset: int, *, since: int) -> ir.Value:
    """Reduce over axis 0; from opset `since` on the axes are an operand."""
    if opset >= since:
        return tape.op(operator, [rows, _constant(tape, [0])], {"keepdims": 0})
    return tape.op(operator, [rows], {"axes": [0], "keepdims": 0})
