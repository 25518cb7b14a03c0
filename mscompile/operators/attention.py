"""Attention as one operator: softmax(scale · Q Kᵀ + mask) V per head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mscompile.operators.axes import OUT, NodeView, Operator, Port, Signature
from mscompile.operators.backward import Backward


@dataclass(frozen=True)
class Layout:
    """Where an attention operator has its channels.

    Attributes
    ----------
    heads
        Number of heads.
    packed
        Whether operands are [samples, places, heads · channels]; else [samples, heads, places, channels].
    """

    heads: int
    packed: bool


def layout(node: NodeView) -> Layout | str:
    """The layout of ai.onnx Attention; a reason where it does more than scores, mask, softmax and values."""
    shapes = [node.shape(i) for i in range(3)]
    if any(shape is None for shape in shapes) or len({len(shape) for shape in shapes}) > 1:  # type: ignore[arg-type]
        return "its operands have no known rank"
    if any(node.value(i) is not None for i in range(4, 7)) or any(node.value(~i) is not None for i in range(1, 4)):
        return "keeps keys and values, or returns scores"
    if node.attribute("softcap", 0.0) or node.attribute("is_causal", 0):
        return "caps its scores, or masks the future by itself"
    packed = len(shapes[0]) == 3  # type: ignore[arg-type]
    heads = [int(node.attribute(name, 0)) for name in ("q_num_heads", "kv_num_heads")]
    if not packed:
        heads = [shape[1] for shape in shapes[:2]]  # type: ignore[index, misc]
    if not isinstance(heads[0], int) or heads[0] < 1 or heads[0] != heads[1]:
        return "has fewer heads for keys than for queries"
    return Layout(heads[0], packed)


def fused_layout(node: NodeView) -> Layout | str:
    """The same for onnxruntime's MultiHeadAttention, whose operands are packed."""
    shapes = [node.shape(i) for i in range(3)]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return "has operands that are packed together, or of unknown rank"
    if any(node.value(i) is not None for i in range(3, 10)) or any(node.value(~i) is not None for i in range(1, 4)):
        return "adds biases or masks, or keeps keys and values"
    if node.attribute("unidirectional", 0):
        return "masks the future by itself"
    return Layout(int(node.attribute("num_heads", 0)), packed=True)


def attention(node: NodeView) -> Signature | str:
    """Channels of values pass; those of queries and keys are contracted with each other, head by head."""
    found = layout(node) if node.node.domain in ("", "ai.onnx") else fused_layout(node)
    if isinstance(found, str):
        return found
    if not node.attribute("scale", 0.0):
        return "scales its scores by their width, which is not stated"
    mask = node.shape(3) if node.value(3) is not None else ()
    if mask is None:
        return "has a mask of unknown shape"
    masked: dict[int, tuple[Port, ...]] = {  # by axis of the scores: samples, heads, places of the query
        axis: ((3, place),) for axis in range(3) if (place := len(mask) - 4 + axis) >= 0 and mask[place] != 1
    }
    extra = {axis: masked.get(axis, ()) for axis in range(3)}
    batch: tuple[Port, ...] = ((0, 0), (1, 0), (2, 0), *extra[0], (OUT, 0))
    rows = 1 if found.packed else 2
    links: list[tuple[Port, ...]] = [batch, ((0, rows), *extra[2], (OUT, rows))]
    if not found.packed:
        links.append(((0, 1), (1, 1), (2, 1), *extra[1], (OUT, 1)))
    last = rows + 1
    links += [((0, last), (1, last)), ((2, last), (OUT, last))]
    even = tuple((port, found.heads) for port in ((0, 2), (1, 2), (2, 2), (OUT, 2))) if found.packed else ()
    return Signature(tuple(links), even=even, keys=1, mixes="attends over this axis")


def attention_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """DV = Pᵀ dY, dQ = scale · dS K, dK = scale · dSᵀ Q; dS = P (dP − Σ P dP), dP = dY Vᵀ, P the attention weights."""
    found = layout(b.view) if b.view.node.domain in ("", "ai.onnx") else fused_layout(b.view)
    if isinstance(found, str):
        return found
    if b.wanted - {0, 1, 2}:
        return "computes its mask"
    q, k, v, g = (_apart(b, value, found) for value in (b.input(0), b.input(1), b.input(2), b.gradient))
    mask = b.view.value(3)
    if mask is not None and (mask.dtype is None or mask.dtype == ir.DataType.BOOL):
        return "has a mask of truth values"
    width = b.sizes(0, [b.rank(0) - 1])[0] // (found.heads if found.packed else 1)
    scale = b.scalar(float(b.view.attribute("scale", 0.0) or 1.0 / math.sqrt(width)))
    swap = b.build.swap
    scores = b.op("Mul", b.op("MatMul", q, swap(k, 4)), scale)
    if mask is not None:
        scores = b.op("Add", scores, b.input(3))
    weights = b.op("Softmax", scores, axis=-1 if b.opset >= 13 else 3)
    slope = b.op("MatMul", g, swap(v, 4))
    along = b.build.reduce("ReduceSum", b.op("Mul", weights, slope), [3])
    change = b.op("Mul", b.op("Mul", weights, b.op("Sub", slope, along)), scale)
    parts = {
        0: lambda: b.op("MatMul", change, k),
        1: lambda: b.op("MatMul", swap(change, 4), q),
        2: lambda: b.op("MatMul", swap(weights, 4), g),
    }
    return {operand: _together(b, parts[operand](), operand, found) for operand in b.wanted}


def _apart(b: Backward, value: ir.Value, found: Layout) -> ir.Value:
    """[samples, heads, places, channels]."""
    if not found.packed:
        return value
    split = b.op("Reshape", value, b.build.integers([0, 0, found.heads, -1]))
    return b.op("Transpose", split, perm=[0, 2, 1, 3])


def _together(b: Backward, value: ir.Value, operand: int, found: Layout) -> ir.Value:
    """The layout of an operand again."""
    return b.like(b.op("Transpose", value, perm=[0, 2, 1, 3]), operand) if found.packed else value


ROWS = (
    Operator("Attention", attention, reverse=attention_reverse),
    Operator(
        "MultiHeadAttention",
        attention,
        domain="com.microsoft",
        reverse=attention_reverse,
        like=lambda node: "nsa,ntb,ntc->nsc" if len(node.inputs) > 2 and all(node.inputs[:3]) else None,
    ),
)
