"""Operators that contract channels with a weight: matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from mscompile.operators.axes import OUT, Linear, NodeView, Operator, Port, Signature
from mscompile.operators.backward import Backward


def gemm(node: NodeView) -> Signature | str:
    """``alpha · A B + beta · C`` with optional transposes."""
    k, n = (1, 0) if node.attribute("transB", 0) else (0, 1)
    a_k, a_m = (0, 1) if node.attribute("transA", 0) else (1, 0)
    alpha, beta = float(node.attribute("alpha", 1.0)), float(node.attribute("beta", 1.0))
    bias = node.shape(2)
    rows: tuple[Port, ...] = ((0, a_m), (OUT, 0))
    created: tuple[Port, ...] = ((1, n), (OUT, 1))
    if node.value(2) is not None:
        if bias is None:
            return "its bias has no known shape"
        if bias and bias[-1] != 1:
            created = ((1, n), (2, len(bias) - 1), (OUT, 1))
        if len(bias) == 2 and bias[0] != 1:
            rows = ((0, a_m), (2, 0), (OUT, 0))
    vector = node.value(2) is None or (bias is not None and bias[-1:] not in ((), (1,)) and set(bias[:-1]) <= {1})
    foldable = vector and (beta != 0 or node.value(2) is None)
    linear = Linear(0, 1, 2 if foldable else None, gain=alpha, bias_gain=beta)
    return Signature((((0, a_k), (1, k)), rows, created), linear=linear)


def matmul(node: NodeView) -> Signature | str:
    """Matrix product with numpy's rules for stacks of matrices."""
    left, right = node.rank(0), node.rank(1)
    if left is None or right is None or left < 2 or right < 2:
        return "its operands are not matrices of known rank"
    rank = max(left, right)
    links: list[tuple[Port, ...]] = [
        ((0, left - 1), (1, right - 2)),
        ((0, left - 2), (OUT, rank - 2)),
        ((1, right - 1), (OUT, rank - 1)),
    ]
    for axis in range(rank - 2):
        ports = ((0, axis - rank + left), (1, axis - rank + right))
        links.append((*((i, a) for i, a in ports if a >= 0 and node.shape(i)[a] != 1), (OUT, axis)))  # type: ignore[index]
    weight_first = 0 not in node.live and left == 2
    weight_last = 1 not in node.live and right == 2
    linear = Linear(1, 0, None) if weight_first else Linear(0, 1, None) if weight_last else None
    return Signature(tuple(links), linear=linear)


def conv(node: NodeView) -> Signature | str:
    """Convolution of any rank; a depthwise one passes channels, an ordinary one contracts them."""
    weight, group = node.shape(1), int(node.attribute("group", 1))
    if weight is None or not all(isinstance(d, int) for d in weight):
        return "its weight has no static shape"
    border = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    created: tuple[Port, ...] = ((1, 0), (OUT, 1)) if node.value(2) is None else ((1, 0), (2, 0), (OUT, 1))
    batch: tuple[Port, ...] = ((0, 0), (OUT, 0))
    if group == 1:
        return Signature((batch, ((0, 1), (1, 1)), created), linear=Linear(0, 1, 2, border), mixes="convolves this axis")
    if node.shape(0) is not None and weight[0] == group == node.shape(0)[1]:  # type: ignore[index]
        through = ((0, 1), *created)
        return Signature((batch, through), steady=not border, counts=(("group", 1),), mixes="convolves this axis")
    return f"is a convolution in {group} groups"


def conv_transpose(node: NodeView) -> Signature | str:
    """Transposed convolution: the weight is stored [in, out, ...]. A constant is uneven even without padding."""
    if int(node.attribute("group", 1)) != 1:
        return "is a transposed convolution in groups"
    created: tuple[Port, ...] = ((1, 1), (OUT, 1)) if node.value(2) is None else ((1, 1), (2, 0), (OUT, 1))
    linear = Linear(0, 1, 2, border=True)
    return Signature((((0, 0), (OUT, 0)), ((0, 1), (1, 0)), created), linear=linear, mixes="convolves this axis")


def _output_volume(node: NodeView) -> int:
    return math.prod(node.shape(OUT) or ())  # type: ignore[arg-type]


def _filter_volume(node: NodeView) -> int:
    return math.prod((node.shape(1) or ())[1:])  # type: ignore[arg-type]


def conv_macs(node: NodeView) -> int:
    """Each output element takes one filter."""
    return _output_volume(node) * _filter_volume(node)


def conv_transpose_macs(node: NodeView) -> int:
    """Each input element is spread by one filter."""
    return math.prod(node.shape(0) or ()) * _filter_volume(node)  # type: ignore[arg-type]


def product_macs(node: NodeView) -> int:
    """Each output element takes one row of the left operand."""
    shape = node.shape(0) or (1,)
    return _output_volume(node) * int(shape[0 if node.attribute("transA", 0) else -1] or 1)


def gemm_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """DA = alpha · dY Bᵀ, dB = alpha · Aᵀ dY, each turned as its operand is."""
    left, right = bool(b.view.attribute("transA", 0)), bool(b.view.attribute("transB", 0))
    alpha = float(b.view.attribute("alpha", 1.0))
    found = {}
    if 0 in b.wanted:
        operands = (b.input(1), b.gradient, right, True) if left else (b.gradient, b.input(1), False, not right)
        found[0] = b.op("Gemm", *operands[:2], alpha=alpha, transA=int(operands[2]), transB=int(operands[3]))
    if 1 in b.wanted:
        operands = (b.gradient, b.input(0), True, left) if right else (b.input(0), b.gradient, not left, False)
        found[1] = b.op("Gemm", *operands[:2], alpha=alpha, transA=int(operands[2]), transB=int(operands[3]))
    if 2 in b.wanted:
        found[2] = b.unbroadcast(b.op("Mul", b.gradient, b.scalar(float(b.view.attribute("beta", 1.0)))), 2)
    return found


ROWS = (
    Operator("Gemm", gemm, macs=product_macs, reverse=gemm_reverse),
    Operator("MatMul", matmul, macs=product_macs),
    Operator("Conv", conv, macs=conv_macs),
    Operator("ConvTranspose", conv_transpose, macs=conv_transpose_macs),
)
