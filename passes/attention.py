"""Attention as one operator, in the form whose channels can be cut: projections apart, biases added, scales stated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import infer_shapes
from mscompile.operators import NodeView, is_parameter
from mscompile.operators.attention import DOMAIN, Projections, projections
from mscompile.passes.readers import add_parameter, array_of, name_outputs

HEADS = {
    ("", "Attention"): "q_num_heads",
    ("ai.onnx", "Attention"): "q_num_heads",
    (DOMAIN, "MultiHeadAttention"): "num_heads",
    (DOMAIN, "GroupQueryAttention"): "num_heads",
}
"""Attention on queries, keys and values, and the attribute that tells the heads where they are packed."""
KEPT = ("unidirectional", "mask_filter_value", "scale")
"""Attributes that mean the same to onnxruntime's Attention and its MultiHeadAttention."""


@dataclass(frozen=True)
class StateScales(ir.passes.InPlacePass):
    """Attention says by what it scales its scores, so that this stays when their width changes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        nodes = [n for n in model.graph if (n.domain, n.op_type) in HEADS and not _stated(n)]
        shapes = infer_shapes(model) if nodes else {}
        modified = False
        for node in nodes:
            query = shapes.get(node.inputs[0].name or "", ()) if node.inputs[0] is not None else ()
            stated = node.attributes.get(HEADS[node.domain, node.op_type]) if len(query) == 3 else None
            heads = 1 if stated is None else stated.as_int()
            if query and isinstance(query[-1], int):
                node.attributes.add(ir.AttrFloat32("scale", (query[-1] // heads) ** -0.5))
                modified = True
        return ir.passes.PassResult(model, modified)


def _stated(node: ir.Node) -> bool:
    """Whether a node says its scale; to onnxruntime's own operators 0 says nothing."""
    scale = node.attributes.get("scale")
    return scale is not None and (node.domain != DOMAIN or scale.as_float() != 0.0)


@dataclass(frozen=True)
class SpellOutAttention(ir.passes.InPlacePass):
    """Projections that attention packs, and biases that it adds to them, are nodes of their own.

    ``Attention(x, W, b, mask)`` of onnxruntime becomes ``MultiHeadAttention(x W_q + b_q, x W_k + b_k, x W_v + b_v, mask)``,
    and a bias of the latter additions before it. The sums of a product come in another order, hence with other rounding;
    nothing else changes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type in ("Attention", "MultiHeadAttention")]
        shapes = infer_shapes(model) if nodes else {}
        modified = False
        for node in nodes:
            view = NodeView(node, shapes, model.graph.opset_imports.get("", 1))
            if node.op_type == "MultiHeadAttention":
                modified |= _add_bias(model.graph, view)
            elif isinstance(found := projections(view), Projections):
                _take_apart(model.graph, node, found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _take_apart(graph: ir.Graph, node: ir.Node, found: Projections) -> None:
    data, weight, bias, mask, _, added = [*node.inputs, *[None] * 6][:6]
    ends = np.cumsum(found.sizes)[:-1]
    weights = np.split(array_of(weight), ends, axis=1)
    biases = [None] * 3 if bias is None else np.split(array_of(bias), ends)
    tape, output = ir.tape.Tape(), node.outputs[0]
    operands: list[ir.Value | None] = []
    for name, matrix, vector in zip("qkv", weights, biases, strict=True):
        stored = add_parameter(graph, f"{output.name}.{name}.weight", np.ascontiguousarray(matrix), weight.dtype)  # type: ignore[union-attr]
        value = tape.op("MatMul", [data, stored])
        if vector is not None:
            shift = add_parameter(graph, f"{output.name}.{name}.bias", vector, bias.dtype)  # type: ignore[union-attr]
            value = tape.op("Add", [value, shift])
        operands.append(value)
    name_outputs(graph, tape.nodes, output.name or "attention")
    attributes = {name: node.attributes[name] for name in KEPT if name in node.attributes}
    attended = ir.Value(name=output.name, shape=output.shape, type=output.type)
    output.name = None
    attention = ir.node(
        "MultiHeadAttention",
        [*operands, None, mask, added],
        {"num_heads": found.heads, **attributes},
        domain=DOMAIN,
        outputs=[attended],
        name=node.name,
    )
    graph.insert_before(node, [*tape.nodes, attention])
    ir.convenience.replace_all_uses_with(output, attended, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _add_bias(graph: ir.Graph, view: NodeView) -> bool:
    """Give operands their shares of a stored bias; where they are packed together it stays."""
    node, bias = view.node, view.value(3)
    widths = [shape[2] if (shape := view.shape(i)) is not None and len(shape) == 3 else None for i in range(3)]
    sizes = [width for width in widths if isinstance(width, int)]
    if bias is None or not is_parameter(bias) or len(sizes) < 3 or sum(sizes) != array_of(bias).size:
        return False
    tape, name = ir.tape.Tape(), node.outputs[0].name
    for operand, vector in enumerate(np.split(array_of(bias), np.cumsum(sizes)[:-1])):
        stored = add_parameter(graph, f"{name}.{'qkv'[operand]}.bias", vector, bias.dtype)
        node.replace_input_with(operand, tape.op("Add", [node.inputs[operand], stored]))
    name_outputs(graph, tape.nodes, name or "attention")
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(3, None)
    return True
