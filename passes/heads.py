"""What parameters do to heads, channel by channel, is done before the heads are split: there each channel has its own place.

``Transpose(Reshape(x)) + b``, b [heads, 1, channels] as of queries that have a bias for each head, becomes
``Transpose(Reshape(x + b'))`` with the elements of b in another order. Element by element the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import infer_shapes
from mscompile.operators import Shape, is_parameter
from mscompile.passes.movement import MOVING, Factor, chain_to, layout_behind
from mscompile.passes.readers import add_parameter, array_of, free_name

ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
REPEATED = 1 << 14
"""Elements up to which a parameter is stored once for each head where all heads shared it."""


@dataclass(frozen=True)
class ApplyBeforeHeads(ir.passes.InPlacePass):
    """Move elementwise operators with a parameter to before the movement that splits the channels they act on."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        shapes: Mapping[str, Shape] | None = None
        modified = False
        for node in list(model.graph):
            if (operand := _moved_channels(node)) is not None:
                shapes = infer_shapes(model) if shapes is None else shapes
                modified |= _apply_before(model.graph, node, operand, shapes)
        return ir.passes.PassResult(model, modified)


def _moved_channels(node: ir.Node) -> int | None:
    """Operand of an elementwise operator that is movement, where the other one is a parameter."""
    if node.op_type not in ELEMENTWISE or node.domain not in ("", "ai.onnx") or node.attributes:
        return None  # attributes said how to broadcast, once
    for operand, value in enumerate(node.inputs):
        other = node.inputs[1 - operand]
        source = None if value is None else value.producer()
        if source is None or source.op_type not in MOVING or source.domain not in ("", "ai.onnx") or other is None:
            continue
        if is_parameter(other) and len(value.uses()) == 1 and not value.is_graph_output():  # type: ignore[union-attr]
            return operand
    return None


def _apply_before(graph: ir.Graph, node: ir.Node, operand: int, shapes: Mapping[str, Shape]) -> bool:
    moved, parameter = node.inputs[operand], node.inputs[1 - operand]
    assert moved is not None
    assert parameter is not None
    chain = chain_to(moved.producer())  # type: ignore[arg-type]
    source = chain[0].inputs[0]
    start = None if source is None else shapes.get(source.name or "")
    target, output = shapes.get(moved.name or ""), shapes.get(node.outputs[0].name or "")
    if source is None or start is None or target is None or output is None or len(output) > len(target):
        return False
    axes = [Factor(dim) for dim in start]
    layout = layout_behind(chain, axes, shapes)
    array = None if layout is None else _before(array_of(parameter), axes, layout)
    if array is None:
        return False
    stored = add_parameter(graph, f"{parameter.name}.moved", array, parameter.dtype)
    inputs = [source, stored] if operand == 0 else [stored, source]
    old, name = node.outputs[0], node.outputs[0].name
    early = ir.Value(name=free_name(graph, f"{name}.before"), shape=ir.Shape(start), type=ir.TensorType(parameter.dtype))  # type: ignore[arg-type]
    graph.insert_before(chain[0], ir.node(node.op_type, inputs, outputs=[early], name=node.name))
    chain[0].replace_input_with(0, early)
    old.name = None
    moved.shape, moved.type = old.shape or moved.shape, old.type or moved.type
    ir.convenience.replace_all_uses_with(old, moved, replace_graph_outputs=True)
    moved.name = name
    graph.remove(node, safe=True)
    return True


def _before(array: np.ndarray, axes: Sequence[Factor], layout: Sequence[Sequence[Factor]]) -> np.ndarray | None:
    """A parameter in the order of the axes before the movement; None where it does not speak of channels that are split."""
    array = array.reshape((1,) * (len(layout) - array.ndim) + array.shape)
    leaves = [leaf for axis in axes for leaf in axis.leaves() if leaf.size != 1]
    spread: list[int] = []
    order: list[Factor] = []
    for size, factors in zip(array.shape, layout, strict=True):
        parts = [leaf for factor in factors for leaf in factor.leaves() if leaf.size != 1]
        order += parts
        counts = [part.size for part in parts if isinstance(part.size, int)]
        if size != 1 and (len(counts) < len(parts) or math.prod(counts) != size):
            return None
        spread += [1] * len(parts) if size == 1 else counts
    if len(order) != len(leaves):
        return None
    by_leaf = np.transpose(array.reshape(spread), [order.index(leaf) for leaf in leaves])
    sizes, shape, split = list(by_leaf.shape), list[int](), False
    for axis in axes:
        parts = [leaf for leaf in axis.leaves() if leaf.size != 1]
        places = [leaves.index(leaf) for leaf in parts]
        varies = any(sizes[place] != 1 for place in places)
        split |= len(parts) > 1 and sizes[places[-1]] != 1
        for place, leaf in zip(places, parts, strict=True):
            if varies and not isinstance(leaf.size, int):
                return None
            sizes[place] = int(leaf.size) if varies else 1  # type: ignore[arg-type]
        shape.append(math.prod(sizes[place] for place in places))
    if not split or math.prod(sizes) > max(array.size, REPEATED):
        return None
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return np.ascontiguousarray(np.broadcast_to(by_leaf, sizes)).reshape(shape[first:])
