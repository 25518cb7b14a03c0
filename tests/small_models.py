"""Small models and data for the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FEATURES = 6


def mlp(
    sizes: Sequence[int] = (FEATURES, 16, 8, 3),
    *,
    batch: int | str | None = "N",
    opset: int = 18,
    ir: int = 8,
    dtype: Any = np.float32,
    seed: int = 0,
    extra: Iterable[onnx.NodeProto] = (),
    outputs: Iterable[onnx.ValueInfoProto] = (),
    annotated: bool = True,
) -> onnx.ModelProto:
    """Gemm and Relu layers from ``x`` to ``y``; site i is ``h{i}``, its weights ``w{i}`` and ``b{i}``.

    `extra` nodes and `outputs` go behind; `annotated` models state the shapes of all their tensors.
    """
    rng = np.random.default_rng(seed)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, weights, x, last = [], [], "x", len(sizes) - 2
    for i, (wide, narrow) in enumerate(pairwise(sizes)):
        weights.append(numpy_helper.from_array((rng.standard_normal((wide, narrow)) / wide**0.5).astype(dtype), f"w{i}"))
        weights.append(numpy_helper.from_array((rng.standard_normal(narrow) / 8).astype(dtype), f"b{i}"))
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], ["y" if i == last else f"p{i}"], name=f"fc{i}"))
        if i < last:
            nodes.append(helper.make_node("Relu", [f"p{i}"], [f"h{i}"], name=f"relu{i}"))
        x = f"h{i}"
    ends = [helper.make_tensor_value_info(n, kind, [batch, s]) for n, s in (("x", sizes[0]), ("y", sizes[-1]))]
    graph = helper.make_graph([*nodes, *extra], "mlp", [ends[0]], [ends[1], *outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    return onnx.shape_inference.infer_shapes(model) if annotated else model


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A copy of an initializer's array."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def set_weight(model: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    """Store another array under the name of an initializer."""
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(array, name))
    return model


def with_dead_units(count: int = 3) -> onnx.ModelProto:
    """A model in which nothing reads the first `count` units of ``h0``."""
    model = mlp()
    w = weight(model, "w1")
    w[:count] = 0
    return set_weight(model, "w1", w)


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """The model with tensors renamed, wherever they are used."""
    for node in model.graph.node:
        for ports in (node.input, node.output):
            ports[:] = [names.get(name, name) for name in ports]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = names.get(value.name, value.name)
    return model


def samples(count: int = 400, *, features: int = FEATURES, dtype: Any = np.float32, seed: int = 1) -> np.ndarray:
    """Inputs for `mlp`."""
    return np.random.default_rng(seed).standard_normal((count, features)).astype(dtype)
