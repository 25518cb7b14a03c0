"""Operators of onnxruntime's own domain, which its optimiser writes in place of standard ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from mscompile.operators.axes import OUT, Barrier, Linear, NodeView, Operator, Port, Signature
from mscompile.operators.backward import Backward, Formula, Reverse, Term, slope
from mscompile.operators.elementwise import gelu, swish, tanh_gelu, unary
from mscompile.operators.positions import layer_normalisation_terms

DOMAIN = "com.microsoft"


def biased_unary(node: NodeView) -> Signature | str:
    """Acts on input 0 plus a vector over its last axis, if one is given."""
    base, rank = unary(node), node.rank(0)
    if isinstance(base, str) or rank is None or node.value(1) is None:
        return base
    return Signature((*base.links[:-1], ((0, rank - 1), (1, 0), (OUT, rank - 1))))


def fused_matmul(node: NodeView) -> Signature | str:
    """``alpha · A B`` with matrices transposed first, as they say; stacks in step."""
    left, right = node.shape(0), node.shape(1)
    if left is None or right is None or min(len(left), len(right)) < 2:
        return "its operands are not matrices of known rank"
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        return "turns its stacks as well"
    a, b, rank = len(left), len(right), max(len(left), len(right))
    row, inner = (a - 1, a - 2) if node.attribute("transA", 0) else (a - 2, a - 1)
    column, outer = (b - 2, b - 1) if node.attribute("transB", 0) else (b - 1, b - 2)
    links: list[tuple[Port, ...]] = [
        ((0, inner), (1, outer)),
        ((0, row), (OUT, rank - 2)),
        ((1, column), (OUT, rank - 1)),
    ]
    for axis in range(rank - 2):
        ports = ((0, axis - rank + a), (1, axis - rank + b))
        links.append((*((i, p) for i, p in ports if p >= 0 and (left, right)[i][p] != 1), (OUT, axis)))
    gain = float(node.attribute("alpha", 1.0))
    weight_last = 1 not in node.live and b == 2
    return Signature(tuple(links), linear=Linear(0, 1, None, gain=gain) if weight_last else None)


def skip_normalisation(node: NodeView) -> Signature | str:
    """Normalises a sum over its last axis; the others pass."""
    rank = node.rank(0)
    if rank is None or node.shape(0) != node.shape(1):
        return "its operands are not of one known shape"
    outs = [OUT] if node.value(~3) is None else [OUT, ~3]
    links = tuple(((0, a), (1, a), *((o, a) for o in outs)) for a in range(rank - 1))
    return Signature(links, mixes="normalises across this axis")


def embedded(node: ir.Node) -> list[ir.Node]:
    """What has the shapes of EmbedLayerNormalization's outputs: rows of the table of words, and a number per sample."""
    words = ir.node("Gather", [node.inputs[2], node.inputs[0]])
    numbers = ir.node("ArgMax", [node.inputs[0]], {"axis": 1, "keepdims": 0})
    return [words, numbers, ir.node("Identity", [words.outputs[0]])]


def fused_macs(node: NodeView) -> int:
    """Each output element takes one row of the left operand."""
    inner = node.shape(0)[-2 if node.attribute("transA", 0) else -1]  # type: ignore[index]
    return math.prod(node.shape(OUT) or ()) * int(inner or 1)  # type: ignore[arg-type]


def _product(node: ir.Node) -> str:
    """The product as an equation; a stored matrix multiplies every matrix of a stack, computed stacks are alike."""
    turned = [name in node.attributes and bool(node.attributes[name].as_int()) for name in ("transA", "transB")]
    left, right = "ji" if turned[0] else "ij", "kj" if turned[1] else "jk"
    stored = node.inputs[1] is not None and node.inputs[1].const_value is not None
    return f"...{left},{right}->...ik" if stored else f"...{left},...{right}->...ik"


# -- reverse --


def biased(b: Backward) -> Term:
    """Input 0 with the bias vector added, if there is one."""
    return b.x if b.view.value(1) is None else b.x + b.of(1)


def only_data(formula: Formula) -> Reverse:
    """Rule of an operator whose other operands are parameters."""
    return lambda b: slope(formula)(b) if b.wanted == {0} else "computes its bias"


def fused_matmul_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """As of a matrix product of the turned operands, turned back."""
    refused = fused_matmul(b.view)
    if isinstance(refused, str):
        return refused
    ranks = b.rank(0), b.rank(1)
    turned = [bool(b.view.attribute(name, 0)) for name in ("transA", "transB")]
    left, right = (b.build.swap(b.input(i), ranks[i]) if turn else b.input(i) for i, turn in enumerate(turned))
    gradient = (b.g * float(b.view.attribute("alpha", 1.0))).value
    found = {}
    for operand in b.wanted:
        if ranks[operand] < b.rank(OUT) or b.shape(operand)[:-2] != b.shape(OUT)[:-2]:
            return "repeats a stack of matrices"
        factors = (gradient, b.build.swap(right, ranks[1])) if operand == 0 else (b.build.swap(left, ranks[0]), gradient)
        product = b.op("MatMul", *factors)
        found[operand] = b.build.swap(product, ranks[operand]) if turned[operand] else product
    return found


def skip_layer_normalisation_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Layer normalisation of a sum, which may be an output itself."""
    if b.wanted - {0, 1}:
        return "computes its parameters"
    if b.view.shape(0) is None or b.view.shape(0) != b.view.shape(1):
        return "broadcasts, or has operands of unknown shape"
    total = b.x + b.of(1)
    if b.view.value(4) is not None:
        total = total + b.of(4)
    normalised, *statistics, summed = (*b.gradients, None, None, None)[:4]
    if any(gradient is not None for gradient in statistics):
        return "has a gradient at its statistics"
    parts = [] if summed is None else [summed]
    if normalised is not None:
        g, rank = Term(b, normalised), b.rank(0)
        parts.append(layer_normalisation_terms(b, g, total, b.of(2), b.view.attribute("epsilon", 1e-12), rank - 1).value)
    gradient = b.op("Add", *parts) if len(parts) > 1 else parts[0]
    return dict.fromkeys(b.wanted, gradient)


def no_tables(b: Backward) -> Mapping[int, ir.Value] | str:
    """Nothing for what is embedded, which is numbers of words."""
    return "computes its tables" if b.wanted else {}


_PACKED = "packs projections, heads and softmax into one operator"
_ATTENTION = "PackedAttention PackedMultiHeadAttention DecoderMaskedMultiHeadAttention"
_OTHER = "RotaryEmbedding SkipSimplifiedLayerNormalization SimplifiedLayerNormalization"

ROWS = (
    Operator("Gelu", unary, domain=DOMAIN, reverse=slope(lambda b: gelu(b.x)), like=0),
    Operator("BiasGelu", biased_unary, domain=DOMAIN, reverse=only_data(lambda b: gelu(biased(b))), like=0),
    Operator("FastGelu", biased_unary, domain=DOMAIN, reverse=only_data(lambda b: tanh_gelu(biased(b))), like=0),
    Operator(
        "QuickGelu", unary, domain=DOMAIN, reverse=slope(lambda b: swish(b.x, b.y, b.view.attribute("alpha", 1.702))), like=0
    ),
    Operator("FusedMatMul", fused_matmul, domain=DOMAIN, macs=fused_macs, reverse=fused_matmul_reverse, like=_product),
    Operator("SkipLayerNormalization", skip_normalisation, domain=DOMAIN, reverse=skip_layer_normalisation_reverse, like=0),
    Operator(
        "EmbedLayerNormalization", Barrier("normalises across this axis"), domain=DOMAIN, reverse=no_tables, like=embedded
    ),
    *(Operator(name, Barrier(_PACKED), domain=DOMAIN) for name in _ATTENTION.split()),
    *(Operator(name, Barrier(f"has no declaration (domain {DOMAIN})"), domain=DOMAIN, like=0) for name in _OTHER.split()),
)
