"""What a model costs: parameters, multiply–accumulates, bytes and measured latency. All figures come from here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from mscompile.intake.samples import Samples
from mscompile.network.scm import infer_shapes, parameters
from mscompile.operators import NodeView, declared
from mscompile.operators.backward import FLOATS
from mscompile.runtime import Session

LATENCY_SECONDS = 0.4
"""Time spent measuring a pair of models, beside loading them and a run of each to warm up."""
LATENCY_ROUNDS = 2
"""Sessions of each, in turn."""
LATENCY_RUNS = 5
"""Fewest timed runs of each session."""


class Sizes(BaseModel):
    """Size of one model.

    Attributes
    ----------
    params
        Elements of floating-point initializers.
    macs
        Multiply–accumulates per sample in matrix products and convolutions; None where a shape stays unknown.
    bytes
        Size of the file, external data included.
    latency_ms
        Lower quartile of the times of one batch in onnxruntime at full optimisation; None where it was not measured.
    """

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int | None
    bytes: int
    latency_ms: float | None


def count_parameters(model: ir.Model) -> int:
    """Elements of floating-point initializers."""
    return sum(v.const_value.size for v in parameters(model) if v.const_value is not None and v.const_value.dtype in FLOATS)


def count_macs(model: ir.Model, inputs: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply–accumulates per sample, for inputs of the given shapes with axis 0 the samples."""
    found = node_macs(model, inputs)
    return None if found is None else math.ceil(sum(found.values()) / next(iter(inputs.values()))[0])


def node_macs(model: ir.Model, inputs: Mapping[str, tuple[int, ...]]) -> dict[ir.Node, int] | None:
    """Multiply–accumulates of each node that has any, for inputs of the given shapes; None where a shape stays unknown."""
    shapes = infer_shapes(model, inputs)
    found: dict[ir.Node, int] = {}
    for node in model.graph:
        row = declared(node)
        if row is None or row.macs is None:
            continue
        view = NodeView(node, shapes, 0)
        involved = [view.shape(operand) for operand in (0, 1, ~0)]
        if any(shape is None or not all(isinstance(d, int) for d in shape) for shape in involved):
            return None
        found[node] = row.macs(view)
    return found


def time_of(model: ir.Model, batch: Mapping[str, npt.NDArray[Any]]) -> float:
    """Milliseconds of one batch, see `quickest`."""
    return quickest(times_of(Session(model), batch, LATENCY_SECONDS / 2, LATENCY_RUNS))


def measure_latency(dense: ir.Model, compiled: ir.Model, samples: Samples, batch_size: int) -> tuple[float, float]:
    """Milliseconds per batch of two models, see `quickest`, in turn so that drift of the machine meets both alike.

    There is one session at a time, as where a model is deployed: onnxruntime's idle threads spin, and those of another
    session take the processor from the one that runs, for twice the time on two cores.
    """
    batch = next(samples.batches(batch_size))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(LATENCY_ROUNDS):
        for model, taken in zip((dense, compiled), times, strict=True):
            taken.extend(times_of(Session(model), batch, LATENCY_SECONDS / LATENCY_ROUNDS / 2, LATENCY_RUNS))
    return quickest(times[0]), quickest(times[1])


def times_of(session: Session, batch: Mapping[str, npt.NDArray[Any]], seconds: float, runs: int) -> list[float]:
    """Milliseconds of each of at least so many runs for so long, after one to warm up."""
    session.run(batch)
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < runs:
        start = time.perf_counter()
        session.run(batch)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def quickest(times: Sequence[float]) -> float:
    """Lower quartile: what else runs on the machine only ever adds to a time."""
    return float(np.quantile(times, 0.25))
