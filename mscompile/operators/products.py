"""Operators that contract channels with a weight: matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import OUT, Barrier, Dim, Linear, Move, NodeView, Operator, Port, Signature, Size, is_parameter
from mscompile.operators.backward import Backward
from mscompile.operators.sliding import Slide, pads_to_size, slides, transposed_slides


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
    """Convolution of any rank. A depthwise one passes channels, one in groups contracts them block by block."""
    weight, group = node.shape(1), int(node.attribute("group", 1))
    if weight is None or not all(isinstance(d, int) for d in weight):
        return "its weight has no static shape"
    border = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    made: tuple[Port, ...] = ((1, 0), (OUT, 1)) if node.value(2) is None else ((1, 0), (2, 0), (OUT, 1))
    batch: tuple[Port, ...] = ((0, 0), (OUT, 0))
    mixes = "convolves this axis"
    if group == 1:
        return Signature((batch, ((0, 1), (1, 1)), made), linear=Linear(0, 1, 2, border), mixes=mixes)
    shape = node.shape(0)
    filters, each = weight[:2]
    if shape is None or shape[1] != group * each or filters % group:  # type: ignore[operator]
        return f"is a convolution in {group} groups, which its channels are not known to fill"
    if each == 1:
        return _depthwise((batch, made), (0, 1), group, filters // group, steady=not border)  # type: ignore[operator]
    if 1 in node.live:
        return f"is a convolution in {group} groups with computed filters"
    even = (((0, 1), group), ((OUT, 1), group))
    linear = Linear(0, 1, 2, border, groups=group)
    return Signature((batch, ((0, 1), (1, 1)), made), linear=linear, even=even, mixes=mixes)


def _depthwise(
    links: tuple[tuple[Port, ...], tuple[Port, ...]], data: Port, group: int, multiplier: int, *, steady: bool
) -> Signature:
    """Each channel has `multiplier` filters of its own."""
    batch, made = links
    sizes, mixes = (Size("group", None, data),), "convolves this axis"
    if multiplier == 1:
        return Signature((batch, (data, *made)), steady=steady, sizes=sizes, mixes=mixes)
    index = np.repeat(np.arange(group, dtype=np.int64), multiplier)
    return Signature((batch, made), moves=(Move(data, (OUT, 1), index),), steady=steady, sizes=sizes, mixes=mixes)


def conv_transpose(node: NodeView) -> Signature | str:
    """Transposed convolution: the weight is stored [in, out, ...]. A constant is uneven even without padding."""
    weight, group = node.shape(1), int(node.attribute("group", 1))
    made: tuple[Port, ...] = ((1, 1), (OUT, 1)) if node.value(2) is None else ((1, 1), (2, 0), (OUT, 1))
    batch: tuple[Port, ...] = ((0, 0), (OUT, 0))
    if group == 1:
        linear = Linear(0, 1, 2, border=True)
        return Signature((batch, ((0, 1), (1, 0)), made), linear=linear, mixes="convolves this axis")
    if weight is None or weight[0] != group or weight[1] != 1:
        return "is a transposed convolution in groups of several channels"
    through: tuple[Port, ...] = ((0, 1), (1, 0), *made[1:])
    return Signature((batch, through), steady=False, sizes=(Size("group", None, (0, 1)),), mixes="convolves this axis")


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


# -- reverse --


def gemm_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """DA = alpha · dY Bᵀ, dB = alpha · Aᵀ dY, each turned as its operand is."""
    left, right = bool(b.view.attribute("transA", 0)), bool(b.view.attribute("transB", 0))
    alpha = float(b.view.attribute("alpha", 1.0))

    def product(first: ir.Value, second: ir.Value, turn_first: bool, turn_second: bool) -> ir.Value:
        bias = () if b.opset >= 11 else (b.scalar(0.0),)
        return b.op("Gemm", first, second, *bias, alpha=alpha, transA=int(turn_first), transB=int(turn_second))

    found = {}
    if 0 in b.wanted:
        other = b.input(1)
        found[0] = product(other, b.gradient, right, True) if left else product(b.gradient, other, False, not right)
    if 1 in b.wanted:
        other = b.input(0)
        found[1] = product(b.gradient, other, True, left) if right else product(other, b.gradient, not left, False)
    if 2 in b.wanted:
        found[2] = b.unbroadcast((b.g * float(b.view.attribute("beta", 1.0))).value, 2)
    return found


def matmul_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """DA = dY Bᵀ, dB = Aᵀ dY, summed over the stacks that an operand was repeated for; a vector is a row or a column."""
    shapes, build = (b.shape(0), b.shape(1)), b.build
    left, right, gradient = b.input(0), b.input(1), b.gradient
    row, column = len(shapes[0]) == 1, len(shapes[1]) == 1
    rank = max(2, *map(len, shapes))
    stack = b.shape(~0)[: rank - 2]
    if column:
        right, gradient = build.unsqueeze(right, [1]), build.unsqueeze(gradient, [b.rank(~0)])
    if row:
        left, gradient = build.unsqueeze(left, [0]), build.unsqueeze(gradient, [rank - 2])
    found = {}
    if 0 in b.wanted:
        if len(shapes[1]) == 2 and is_parameter(b.view.node.inputs[1]):  # type: ignore[arg-type]
            product = build.project(gradient, build.swap(right, 2))
        else:
            product = build.product(gradient, right, ranks=(rank, max(2, len(shapes[1]))), turned=1)
        found[0] = b.unbroadcast(product, 0, (*stack, *((1,) if row else ()), *shapes[0][-2:]))
    if 1 in b.wanted:
        product = build.product(left, gradient, ranks=(max(2, len(shapes[0])), rank), turned=0)
        if column:
            product = build.reduce("ReduceSum", product, [rank - 1], keepdims=False)
        found[1] = b.unbroadcast(product, 1, (*stack, *shapes[1][-2:]))
    return found


def einsum_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """An einsum of the arriving gradient with the other operands, where every index of the operand occurs there."""
    equation = str(b.view.attribute("equation", "")).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = inputs.replace(".", "").replace(",", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    sizes: dict[str, Dim] = {}
    for operand, term in zip((*range(len(terms)), OUT), (*terms, output), strict=True):
        before, dots, after = term.partition("...")
        if len({*before, *after}) < len(before + after):
            return "repeats an index in one operand"
        shape = b.shape(operand)
        stack = range(len(shape) - len(before + after), 0, -1) if dots else ()
        names = [*before, *(f"-{place}" for place in stack), *after]
        if any(sizes.setdefault(name, size) != size for name, size in zip(names, shape, strict=True)):
            return "broadcasts an index"
    found = {}
    for i in b.wanted:
        others = [j for j in range(len(terms)) if j != i]
        if not set(terms[i]) <= set(output).union(*(terms[j] for j in others)):
            return "sums over an index of one operand"
        if ("..." in output) != ("..." in terms[i]):
            return "has '...' in some operands only"
        back = ",".join([output, *(terms[j] for j in others)]) + "->" + terms[i]
        found[i] = b.op("Einsum", b.gradient, *(b.input(j) for j in others), equation=back)
    return found


def conv_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The transposed convolution with the same filters; at stride 1 the faster convolution with the filters turned round."""
    if 1 in b.wanted:
        return "computes its filters"
    found = _bias_reverse(b)
    if 0 in b.wanted:
        windows = slides(b, b.sizes(1, range(2, b.rank(1))))
        pads = [w.extent - 1 - w.low for w in windows] + [w.extent - 1 - w.high for w in windows]
        gradient, filters = _unscaled(b)
        if all(w.stride == 1 for w in windows) and min(pads) >= 0 and b.opset >= 10:
            found[0] = b.op("Conv", gradient, _turn_round(b, filters), pads=pads, **_filter(b, windows))
        else:
            found[0] = _spread(b, gradient, filters, windows)
    return found


def conv_transpose_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The convolution with the same filters."""
    if 1 in b.wanted:
        return "computes its filters"
    found = _bias_reverse(b)
    if 0 in b.wanted:
        windows = transposed_slides(b, b.sizes(1, range(2, b.rank(1))))
        pads = [w.low for w in windows] + [w.high for w in windows]
        more = b.view.attribute("output_padding", [0])
        if min(pads) < 0 or any(m >= w.stride for m, w in zip(more, windows, strict=False)):
            return "pads its output by more than its stride"
        strides = [w.stride for w in windows]
        found[0] = b.op("Conv", b.gradient, b.input(1), pads=pads, strides=strides, **_filter(b, windows))
    return found


def _bias_reverse(b: Backward) -> dict[int, ir.Value]:
    if 2 not in b.wanted:
        return {}
    return {2: b.build.reduce("ReduceSum", b.gradient, [a for a in range(b.rank(OUT)) if a != 1], keepdims=False)}


def _filter(b: Backward, windows: Sequence[Slide]) -> dict[str, Any]:
    return {
        "kernel_shape": [w.kernel for w in windows],
        "dilations": [w.dilation for w in windows],
        "group": b.view.attribute("group", 1),
    }


def _unscaled(b: Backward) -> tuple[ir.Value, ir.Value]:
    """The gradient and the filters; a number per channel that the gradient was multiplied by goes to the filters."""
    if b.gradient not in b.build.scaled or not is_parameter(b.input(1)):
        return b.gradient, b.input(1)
    gradient, factor = b.build.scaled[b.gradient]
    column = b.op("Reshape", factor, b.build.integers([-1] + [1] * (b.rank(1) - 1)))
    return gradient, b.op("Mul", b.input(1), column)


def _turn_round(b: Backward, filters: ir.Value) -> ir.Value:
    """Filters with input and output channels swapped and every spatial axis flipped; onnxruntime computes them once."""
    group = int(b.view.attribute("group", 1))
    outs, ins, *kernel = b.sizes(1, range(b.rank(1)))
    if group > 1:
        filters = b.op("Reshape", filters, b.build.integers([group, outs // group, ins, *kernel]))
        filters = b.op("Transpose", filters, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        filters = b.op("Reshape", filters, b.build.integers([group * ins, outs // group, *kernel]))
    else:
        filters = b.op("Transpose", filters, perm=[1, 0, *range(2, 2 + len(kernel))])
    flipped = [axis for axis, size in enumerate(kernel, start=2) if size > 1]
    if not flipped:
        return filters
    start, end, step = ([number] * len(flipped) for number in (-1, np.iinfo(np.int64).min, -1))
    return b.op("Slice", filters, *map(b.build.integers, (start, end, flipped, step)))


def _spread(b: Backward, gradient: ir.Value, filters: ir.Value, windows: Sequence[Slide]) -> ir.Value:
    """Transposed convolution back to the size of the input, which follows from the output's only up to a stride."""
    axes = range(2, b.rank(0))
    strided = [axis for axis, w in zip(axes, windows, strict=True) if w.stride > 1]
    exact = b.opset < 10 or pads_to_size(b.view) or all(b.fixed(0, axis) is not None for axis in strided)
    more = [w.stride - 1 for w in windows]
    if exact:
        ends = [w.low + w.high - w.extent for w in windows]
        more = [
            (b.sizes(0, [axis])[0] + end) % w.stride if w.stride > 1 else 0
            for axis, end, w in zip(axes, ends, windows, strict=True)
        ]
    spread = b.op(
        "ConvTranspose",
        gradient,
        filters,
        strides=[w.stride for w in windows],
        pads=[w.low for w in windows] + [w.high for w in windows],
        output_padding=more,
        **_filter(b, windows),
    )
    if exact:
        return spread
    sizes = b.build.extents(b.input(0), strided)
    return b.op("Slice", spread, b.build.integers([0] * len(strided)), sizes, b.build.integers(strided))


ROWS = (
    Operator("Gemm", gemm, macs=product_macs, reverse=gemm_reverse),
    Operator("MatMul", matmul, macs=product_macs, reverse=matmul_reverse),
    Operator("Conv", conv, macs=conv_macs, reverse=conv_reverse),
    Operator("ConvTranspose", conv_transpose, macs=conv_transpose_macs, reverse=conv_transpose_reverse),
    Operator("Einsum", Barrier("contracts by an equation"), reverse=einsum_reverse),
)
