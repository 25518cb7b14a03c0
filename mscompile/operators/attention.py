"""Attention as one operator: softmax(scale · Q Kᵀ + mask) V per head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import OUT, Barrier, Move, NodeView, Operator, Port, Signature, is_parameter
from mscompile.operators.backward import FLOATS, Backward

DOMAIN = "com.microsoft"
VECTOR = 8
"""Channels of a head that onnxruntime's grouped-query attention takes come in multiples of it."""
FILTERED = -10000.0
"""Score of masked places in onnxruntime's operators, unless they say otherwise: its exponential is 0."""


@dataclass(frozen=True)
class Layout:
    """Where an attention operator has its channels.

    Attributes
    ----------
    heads, shared
        Number of heads of the queries, and of keys and values, each of which serves as many heads of queries.
    packed
        Whether operands are [samples, places, heads · channels]; else [samples, heads, places, channels].
    masks
        By operand, the axis of the scores [samples, heads, queries, keys] that each axis of a mask stands for.
    lengths
        Operand that holds how many keys there are, a number per sample, less `beyond`.
    causal
        Whether a query sees no key behind its own place.
    together
        Whether all heads are as wide as each other, in multiples of this.
    """

    heads: int
    shared: int
    packed: bool
    masks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    lengths: int | None = None
    beyond: int = 0
    causal: bool = False
    together: int | None = None

    @property
    def times(self) -> int:
        """Heads of queries that a head of keys serves."""
        return self.heads // self.shared


def _broadcast(node: NodeView, operand: int) -> dict[int, tuple[int, ...]] | None:
    """Axes of the scores that those of a mask stand for, aligned from the right; None where its rank is not known."""
    rank = node.rank(operand)
    if node.value(operand) is None:
        return {}
    return None if rank is None else {operand: tuple(range(4 - rank, 4))}


def _given(node: NodeView, operands: range) -> bool:
    return any(node.value(operand) is not None for operand in operands)


def _returned(node: NodeView, outputs: range) -> bool:
    return any(node.value(~output) is not None for output in outputs)


def standard_layout(node: NodeView) -> Layout | str:
    """The layout of ai.onnx Attention; a reason where it does more than scores, mask, softmax and values."""
    shapes = [node.shape(i) for i in range(3)]
    if any(shape is None for shape in shapes) or len({len(shape) for shape in shapes}) > 1:  # type: ignore[arg-type]
        return "its operands have no known rank"
    if _given(node, range(4, 6)) or _returned(node, range(1, 4)):
        return "keeps keys and values, or returns scores"
    if node.attribute("softcap", 0.0):
        return "caps its scores"
    packed = len(shapes[0]) == 3  # type: ignore[arg-type]
    heads = [int(node.attribute(name, 0)) for name in ("q_num_heads", "kv_num_heads")]
    if not packed:
        heads = [shape[1] for shape in shapes[:2]]  # type: ignore[index, misc]
    if not all(isinstance(count, int) and count > 0 for count in heads) or heads[0] % heads[1]:
        return "has heads of queries that share no whole number of heads of keys"
    masks = _broadcast(node, 3)
    if masks is None:
        return "has a mask of unknown shape"
    lengths = 6 if node.value(6) is not None else None
    return Layout(heads[0], heads[1], packed, masks, lengths, causal=bool(node.attribute("is_causal", 0)))


def fused_layout(node: NodeView) -> Layout | str:
    """The same for onnxruntime's MultiHeadAttention, whose operands are packed."""
    shapes = [node.shape(i) for i in range(3)]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return "has operands that are packed together, or of unknown rank"
    if _given(node, range(6, 10)) or _returned(node, range(1, 4)):
        return "keeps keys and values, or returns scores"
    if node.value(3) is not None:
        return "adds a bias that is computed"
    masks, padding = _broadcast(node, 5), PADDING.get(node.rank(4) or 0, ())
    if masks is None or (node.value(4) is not None and not padding):
        return "has a mask of unknown shape"
    if len(padding) == 1 and not per_sample(node, 4):
        return "has a mask that says more than how many keys there are"
    masks |= {4: padding} if len(padding) > 1 else {}
    heads, causal = int(node.attribute("num_heads", 0)), bool(node.attribute("unidirectional", 0))
    return Layout(heads, heads, True, masks, 4 if len(padding) == 1 else None, causal=causal)


PADDING: Mapping[int, tuple[int, ...]] = {1: (0,), 2: (0, 3), 3: (0, 2, 3)}
"""Axes of the scores that those of a padding mask stand for, by their number."""


def per_sample(node: NodeView, operand: int) -> bool:
    """Whether a vector is known to hold a number per sample."""
    vector, data = node.shape(operand), node.shape(0)
    return bool(vector and data) and len(vector) == 1 and vector[0] is not None and vector[0] == data[0]  # type: ignore[index, arg-type]


def grouped_layout(node: NodeView) -> Layout | str:
    """The same for onnxruntime's GroupQueryAttention, which sees no future, and whose heads are all equally wide."""
    shapes = [node.shape(i) for i in range(3)]
    if node.attribute("do_rotary", 0):
        return "rotates queries and keys"
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return "has operands that are packed together, or of unknown rank"
    if _given(node, range(3, 5)) or any(value.uses() or value.is_graph_output() for value in node.node.outputs[1:]):
        return "keeps keys and values, or returns scores"
    if _given(node, range(11, 17)) or node.attribute("smooth_softmax", 0) or node.attribute("softcap", 0.0):
        return "caps or normalises more than its scores"
    masks = _broadcast(node, 10)
    if masks is None:
        return "has a mask of unknown shape"
    heads = [int(node.attribute(name, 0)) for name in ("num_heads", "kv_num_heads")]
    if min(heads) < 1 or heads[0] % heads[1]:
        return "has heads of queries that share no whole number of heads of keys"
    return Layout(heads[0], heads[1], True, masks, 5, 1, bool(node.attribute("causal", 1)), VECTOR)


def layout(node: NodeView) -> Layout | str:
    """The layout of whichever operator it is."""
    if node.node.domain != DOMAIN:
        return standard_layout(node)
    return grouped_layout(node) if node.node.op_type == "GroupQueryAttention" else fused_layout(node)


def attention(node: NodeView) -> Signature | str:
    """Channels of values pass; those of queries and keys are contracted with each other, head by head."""
    found = layout(node)
    if isinstance(found, str):
        return found
    if not node.attribute("scale", 0.0):
        return "scales its scores by their width, which is not stated"
    extra: dict[int, list[Port]] = {axis: [] for axis in range(3)}
    for operand, axes in found.masks.items():
        for place, (axis, size) in enumerate(zip(axes, node.shape(operand) or (), strict=True)):
            if axis < 3 and size != 1:
                extra[axis].append((operand, place))
    if found.lengths is not None:
        extra[0].append((found.lengths, 0))
    rows = 1 if found.packed else 2
    last = rows + 1
    links: list[tuple[Port, ...]] = [((0, 0), (1, 0), (2, 0), *extra[0], (OUT, 0)), ((0, last), (1, last))]
    if not found.causal and node.attribute("local_window_size", -1) < 0:  # else what a place sees depends on its number
        links.append(((0, rows), *extra[2], (OUT, rows)))
    moves: tuple[Move, ...] = ()
    repeated: tuple[tuple[Port, int, int], ...] = ()
    served = np.repeat(np.arange(found.shared, dtype=np.int64), found.times)
    if not found.packed and found.times == 1:
        links.append(((0, 1), (1, 1), (2, 1), *extra[1], (OUT, 1)))
    elif not found.packed:
        links.append(((0, 1), *extra[1], (OUT, 1)))
        moves = (Move((1, 1), (OUT, 1), served), Move((2, 1), (OUT, 1), served))
    if not found.packed or found.times == 1:
        links.append(((2, last), (OUT, last)))
    else:
        repeated = (((1, 2), found.shared, found.times),)
        values = node.shape(2)[2]  # type: ignore[index]
        if not isinstance(values, int):
            return "its values have no known width"
        places = np.arange(values, dtype=np.int64).reshape(found.shared, -1)
        moves = (Move((2, 2), (OUT, 2), places[served].ravel()),)
    heads = {0: found.heads, 1: found.shared, 2: found.shared, OUT: found.heads}
    even = tuple(((operand, 2), count) for operand, count in heads.items()) if found.packed else ()
    return Signature(
        tuple(links),
        moves,
        even=even,
        together=found.together,
        repeated=repeated,
        keys=1,
        mixes="attends over this axis",
    )


@dataclass(frozen=True)
class Projections:
    """What onnxruntime's Attention packs: widths of queries, keys and values in its weight, in this order, and its heads."""

    sizes: tuple[int, int, int]
    heads: int


def projections(node: NodeView) -> Projections | str:
    """The parts of onnxruntime's Attention; a reason where it is more than three projections and attention."""
    data, weight, bias, mask = (node.shape(i) for i in range(4))
    heads, stated = int(node.attribute("num_heads", 0)), node.attribute("qkv_hidden_sizes", None)
    if node.attribute("do_rotary", 0):
        return "rotates queries and keys"
    if node.value(4) is not None or node.value(6) is not None or _returned(node, range(1, 2)):
        return "keeps keys and values"
    if data is None or len(data) != 3:
        return "its input has no known rank"
    if 1 in node.live or 2 in node.live or weight is None:
        return "packs projections whose weight or bias is computed"
    width = int(weight[1])  # type: ignore[arg-type]
    sizes = [int(size) for size in stated or [width // 3] * 3]
    if heads < 1 or len(sizes) != 3 or sum(sizes) != width or any(size % heads for size in sizes) or sizes[0] != sizes[1]:
        return "packs projections that its heads do not fill"
    if bias is not None and bias != (width,):
        return "packs projections with a bias of another width"
    if mask is not None and not (len(mask) in (2, 3) or per_sample(node, 3)):
        return "has a mask that says more than which keys there are"
    if node.value(3) is not None and mask is None:
        return "has a mask of unknown shape"
    return Projections((sizes[0], sizes[1], sizes[2]), heads)


def packed_attention(node: NodeView) -> str:
    """Why onnxruntime's Attention was not taken apart into projections and attention."""
    found = projections(node)
    return found if isinstance(found, str) else "packs projections, heads and softmax into one operator"


def width_kept(node: ir.Node) -> int | None:
    """Operand whose shape the output of onnxruntime's Attention has, where its values are as wide as its input."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or not is_parameter(weight):
        return None
    width, out = (int(d) for d in weight.const_value.shape.numpy())  # type: ignore[union-attr]
    stated = node.attributes.get("qkv_hidden_sizes")
    return 0 if width == (stated.as_ints()[2] if stated is not None else out // 3) else None


# -- reverse --


def attention_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """DV = Pᵀ dY, dQ = scale · dS K, dK = scale · dSᵀ Q; dS = P (dP − Σ P dP), dP = dY Vᵀ, P the attention weights."""
    found = layout(b.view)
    if isinstance(found, str):
        return found
    if b.wanted - {0, 1, 2}:
        return "computes its mask"
    if b.view.attribute("local_window_size", -1) > 0:
        return "attends within a window"
    if (found.causal or found.lengths is not None) and b.opset < RANGE:
        return f"masks by places, in an opset before {RANGE}"
    q, g = (_apart(b, value, found.heads, found) for value in (b.input(0), b.gradient))
    k, v = (_apart(b, b.input(operand), found.shared, found) for operand in (1, 2))
    width = b.sizes(0, [b.rank(0) - 1])[0] // (found.heads if found.packed else 1)
    scale = b.scalar(float(b.view.attribute("scale", 0.0) or 1.0 / math.sqrt(width)))
    swap = b.build.swap
    scores = _masked(b, b.op("Mul", b.op("MatMul", q, swap(k, 4)), scale), found)
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


RANGE = 11
"""Opset that Range came with."""


def _masked(b: Backward, scores: ir.Value, found: Layout) -> ir.Value:
    """Scores with what masks add to them, and very low where they hide keys."""
    low = b.scalar(float(b.view.attribute("mask_filter_value", FILTERED)))
    for operand, axes in found.masks.items():
        mask = b.view.value(operand)
        assert mask is not None
        if mask.dtype in FLOATS:
            scores = b.op("Add", scores, _over(b, b.input(operand), axes))
        else:
            seen = mask if mask.dtype == ir.DataType.BOOL else b.op("Cast", mask, to=int(ir.DataType.BOOL))
            scores = b.op("Where", _over(b, seen, axes), scores, low)
    if found.lengths is not None:
        given = b.op("Cast", b.view.value(found.lengths), to=int(ir.DataType.INT64))
        count = b.op("Add", given, b.build.integers(found.beyond))
        scores = b.op("Where", b.op("Less", _places(b, scores, 3), b.build.unsqueeze(count, [1, 2, 3])), scores, low)
    if found.causal:
        queries = b.build.unsqueeze(_places(b, scores, 2), [1])
        scores = b.op("Where", b.op("Less", queries, _places(b, scores, 3)), low, scores)
    return scores


def _places(b: Backward, value: ir.Value, axis: int) -> ir.Value:
    """0, 1, 2, … along an axis."""
    extent = b.op("Gather", b.op("Shape", value), b.build.integers(axis), axis=0)
    return b.op("Range", b.build.integers(0), extent, b.build.integers(1))


def _over(b: Backward, mask: ir.Value, axes: tuple[int, ...]) -> ir.Value:
    """A mask with an axis of size 1 for each axis of the scores that it does not speak of."""
    return b.build.unsqueeze(mask, [axis for axis in range(4) if axis not in axes])


def _apart(b: Backward, value: ir.Value, heads: int, found: Layout) -> ir.Value:
    """[samples, heads, places, channels], those that several heads of queries share repeated for each."""
    if found.packed:
        split = b.op("Reshape", value, b.build.integers([0, 0, heads, -1]))
        value = b.op("Transpose", split, perm=[0, 2, 1, 3])
    if heads == found.heads:
        return value
    return b.op("Gather", value, b.build.integers(np.repeat(np.arange(heads), found.times).tolist()), axis=1)


def _together(b: Backward, value: ir.Value, operand: int, found: Layout) -> ir.Value:
    """The layout of an operand again, heads of queries summed where they share one."""
    if operand > 0 and found.times > 1:
        width = b.sizes(operand, [b.rank(operand) - 1])[0] // (found.shared if found.packed else 1)
        apart = b.op("Reshape", value, b.build.integers([0, found.shared, found.times, -1, width]))
        value = b.build.reduce("ReduceSum", apart, [2], keepdims=False)
    return b.like(b.op("Transpose", value, perm=[0, 2, 1, 3]), operand) if found.packed else value


ROWS = (
    Operator("Attention", attention, reverse=attention_reverse),
    Operator(
        "MultiHeadAttention",
        attention,
        domain=DOMAIN,
        reverse=attention_reverse,
        like=lambda node: "nsa,ntb,ntc->nsc" if len(node.inputs) > 2 and all(node.inputs[:3]) else None,
    ),
    Operator(
        "GroupQueryAttention",
        attention,
        domain=DOMAIN,
        reverse=attention_reverse,
        like=lambda node: 0 if all(node.inputs[:3]) else None,
    ),
    Operator("Attention", Barrier(packed_attention), domain=DOMAIN, like=width_kept),
)
