"""Operators that mix positions, or normalise: pooling, reductions, normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import OUT, Barrier, NodeView, Operator, Signature, Size
from mscompile.operators.backward import Backward, NoRuleError, Reverse, Term, nothing
from mscompile.operators.sliding import pads_to_size, slides


def batch_normalisation(node: NodeView) -> Signature | str:
    """An affine map per channel of axis 1."""
    rank = node.rank(0)
    if rank is None or rank < 2:
        return "its input has no channel axis"
    if node.attribute("training_mode", 0):
        return "is in training mode"
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a != 1)
    return Signature((*links, ((0, 1), (1, 0), (2, 0), (3, 0), (4, 0), (OUT, 1))))


def instance_normalisation(node: NodeView) -> Signature | str:
    """Normalises each channel of each sample over its positions."""
    if node.rank(0) is None:
        return "its input has no known rank"
    links = (((0, 0), (OUT, 0)), ((0, 1), (1, 0), (2, 0), (OUT, 1)))
    return Signature(links, centred=True, mixes="normalises across this axis")


def group_normalisation(node: NodeView) -> Signature | str:
    """Normalises groups of channels of each sample over their positions: the channels of a group live and die together."""
    shape, groups = node.shape(0), int(node.attribute("num_groups", 0))
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int) or groups < 1 or shape[1] % groups:
        return "its channels are not known to fill its groups"
    if node.opset < 21:
        return "holds scales per group, before opset 21"
    links = (((0, 0), (OUT, 0)), ((0, 1), (1, 0), (2, 0), (OUT, 1)))
    sizes = (Size("num_groups", None, (OUT, 1), share=shape[1] // groups),)
    return Signature(links, centred=True, sizes=sizes, ties=(((0, 1), groups),), mixes="normalises across this axis")


def pooling(node: NodeView) -> Signature | str:
    """Mixes positions within a channel. Zeros that padding counts in make a constant uneven at the border."""
    if node.rank(0) is None:
        return "its input has no known rank"
    padded = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    uneven = padded and bool(node.attribute("count_include_pad", 0))
    ceil = bool(node.attribute("ceil_mode", 0)) and bool(node.attribute("count_include_pad", 0))
    return Signature((((0, 0), (OUT, 0)), ((0, 1), (OUT, 1))), steady=not (uneven or ceil), mixes="pools over this axis")


def reduced_axes(node: NodeView, rank: int) -> list[int] | str:
    """Axes that a reduction reduces, in order."""
    axes = node.attribute("axes", None)
    if axes is None:
        given = node.constant(1)
        if given is None and node.value(1) is not None:
            return "its axes are computed"
        axes = given.tolist() if given is not None else []
    if not axes and not node.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    return sorted({int(a) % rank for a in axes})


def reduction(node: NodeView) -> Signature | str:
    """Reduces some axes and keeps the others (mean over positions)."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    reduced = reduced_axes(node, rank)
    if isinstance(reduced, str):
        return reduced
    keepdims = bool(node.attribute("keepdims", 1))
    kept = [a for a in range(rank) if a not in reduced]
    targets = kept if keepdims else range(len(kept))
    return Signature(tuple(((0, a), (OUT, t)) for a, t in zip(kept, targets, strict=True)), mixes="reduces over this axis")


def normalised_axes(node: NodeView, rank: int) -> Sequence[int]:
    """Axes that a softmax normalises over: `axis`; before opset 13 every axis behind it as well, with another default."""
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1) % rank
    return (axis,) if node.opset >= 13 else range(axis, rank)


def softmax(node: NodeView) -> Signature | str:
    """Normalises over some axes; the others pass."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    over = normalised_axes(node, rank)
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a not in over)
    level = over[0] if len(over) == 1 else None
    return Signature(links, levels=level, mixes="normalises across this axis")


def layer_normalisation(node: NodeView) -> Signature | str:
    """Normalises over `axis` and every axis behind it; the axes before it pass, with those of scale and bias, if any."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    shapes = {operand: node.shape(operand) for operand in (1, 2) if node.value(operand) is not None}
    links = []
    for axis in range(node.attribute("axis", -1) % rank):
        aligned = {operand: axis - rank + len(shape) for operand, shape in shapes.items() if shape is not None}
        vary = ((o, a) for o, a in aligned.items() if a >= 0 and shapes[o][a] != 1)  # type: ignore[index]
        links.append(((0, axis), *vary, (OUT, axis)))
    return Signature(tuple(links), mixes="normalises across this axis")


# -- reverse: pooling --


def max_pool_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The gradient, to the first of the largest elements of each window."""
    windows = slides(b, b.view.attribute("kernel_shape", ()))
    side_by_side = all(
        w.kernel == w.stride and w.dilation == 1 and w.low == w.high == 0 and isinstance(n, int) and n % w.kernel == 0
        for n, w in zip(b.shape(0)[2:], windows, strict=True)
    )
    fast = side_by_side and b.opset >= 11 and b.dtype == np.float32
    if fast and math.prod(b.sizes(0, range(2, b.rank(0)))) <= EXACT:
        return {0: _unpool(b, b.gradient, _places(b, [w.kernel for w in windows]))}
    given = {name: a.value for name, a in b.view.node.attributes.items() if name != "storage_order"}
    _, places = b.build.ops("MaxPool", b.input(0), outputs=2, **given)
    apart = [-(-w.extent // w.stride) for w in windows]
    if max(apart) == 1:
        return {0: _unpool(b, b.gradient, places)}
    if b.opset >= 16:
        return {0: _scatter(b, b.gradient, places, reduction="add")}
    if b.opset < 10:
        return "pools in windows that overlap, in an opset before 10"
    # Nothing adds up what goes to one place: windows too far apart to overlap, at a time.
    axes = b.build.integers(list(range(2, 2 + len(windows))))
    end = b.build.integers([np.iinfo(np.int64).max] * len(windows))
    parts = []
    for start in product(*map(range, apart)):
        every = (b.build.integers(start), end, axes, b.build.integers(apart))
        parts.append(_unpool(b, *(b.op("Slice", value, *every) for value in (b.gradient, places))))
    return {0: b.op("Sum", *parts)}


EXACT = 2**24
"""Integers up to here are exact in float32."""


def _unpool(b: Backward, gradient: ir.Value, places: ir.Value) -> ir.Value:
    """Each element to its place among the elements of the input, counted through; zeros elsewhere."""
    if b.dtype != np.float32:  # which is all that onnxruntime unpools
        return _scatter(b, gradient, places)
    ones = [1] * (b.rank(0) - 2)
    return b.op("MaxUnpool", gradient, places, b.op("Shape", b.input(0)), kernel_shape=ones, strides=ones)


def _scatter(b: Backward, gradient: ir.Value, places: ir.Value, **reduction: str) -> ir.Value:
    """The same, for any type, and added up if so asked."""
    if b.opset < 11:
        raise NoRuleError(f"pools values of type {b.dtype}, in an opset before 11")
    parts = [b.op("Reshape", value, b.build.integers([-1])) for value in (b.zeros(b.input(0)), places, gradient)]
    return b.like(b.op("ScatterElements", *parts, axis=0, **reduction), 0)


def _places(b: Backward, kernel: Sequence[int]) -> ir.Value:
    """The indices of pooling in windows side by side, from operators that run many times faster than pooling with indices.

    Elements that equal the largest one of their window are numbered downwards through their channel; in each window the one
    with the largest number is first.
    """
    x, y, spatial = b.input(0), b.output(), range(2, 2 + len(kernel))
    integers, ones = b.build.integers, [1] * len(kernel)
    channels, channel, pooled = b.build.extents(x, range(2)), b.build.extents(x, spatial), b.build.extents(y, spatial)
    count, size = (b.op("ReduceProd", part, keepdims=0) for part in (channels, channel))
    # As images of one channel: for several, onnxruntime changes to a layout that the other operators do not take.
    images = b.op("Reshape", y, b.op("Concat", integers([-1, 1]), pooled, axis=0))
    none, scales = (b.build.constant(numbers, np.float32) for numbers in ([], [1.0, 1.0, *kernel]))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    largest = b.number(b.op("Equal", x, b.like(b.op("Resize", images, none, scales, **how), 0)))
    down = b.number(b.op("Range", size, integers(0), integers(-1)))
    numbers = b.op("Mul", largest, b.op("Reshape", down, b.op("Concat", integers([1, 1]), channel, axis=0)))
    first = b.op("MaxPool", numbers, kernel_shape=kernel, strides=kernel)
    place = b.op("Sub", size, b.op("Cast", first, to=int(ir.DataType.INT64)))
    start = b.op("Mul", b.op("Range", integers(0), count, integers(1)), size)
    return b.op("Add", place, b.op("Reshape", start, b.op("Concat", channels, integers(ones), axis=0)))


def average_pool_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The average is linear along each axis; its matrix there is what it makes of the identity."""
    rank, gradient = b.rank(0), b.gradient
    windows = slides(b, b.view.attribute("kernel_shape", ()))
    named = ("ceil_mode", "count_include_pad", "auto_pad")
    given = {name: a.value for name, a in b.view.node.attributes.items() if name in named}
    for axis, w in enumerate(windows, start=2):
        if (w.kernel, w.stride, w.low, w.high) != (1, 1, 0, 0):
            one = given | ({} if pads_to_size(b.view) else {"pads": [w.low, w.high]})
            one |= {"dilations": [w.dilation]} if w.dilation > 1 else {}
            unit = b.build.unsqueeze(b.identity(0, axis), [0])
            mean = b.op("AveragePool", unit, kernel_shape=[w.kernel], strides=[w.stride], **one)
            gradient = b.build.contract(gradient, axis, rank, b.build.squeeze(mean, [0]))
    return {0: gradient}


# -- reverse: reductions --


@dataclass(frozen=True)
class Reduced:
    """A reduction on the way back: arriving gradient and output with the reduced axes kept, as axes of size 1."""

    b: Backward
    g: Term
    y: Term
    axes: list[int]

    @property
    def count(self) -> Term | float:
        """Number of elements reduced to one."""
        sizes = [self.b.fixed(0, a) for a in self.axes]
        if None not in sizes:
            return float(math.prod(n for n in sizes if n is not None))
        whole, part = (self.b.op("Size", v) for v in (self.b.input(0), self.b.output()))
        return Term(self.b, self.b.number(self.b.op("Div", whole, part)))

    def spread(self, term: Term) -> Term:
        """Broadcast to the shape of the input."""
        return Term(self.b, self.b.spread(term.value, 0))

    def shared(self, beyond: str) -> Term:
        """The gradient, shared by the elements that are not `beyond` the output."""
        b = self.b
        same = Term(b, b.number(b.op("Not", b.op(beyond, b.input(0), self.y.value))))
        return self.g / same.over("ReduceSum", self.axes) * same

    def product(self) -> Term:
        """The gradient times the product of the other elements, zeros among them or not."""
        b, one = self.b, self.b.scalar(1.0)
        null = b.equal(b.input(0), b.scalar(0.0))
        nulls = Term(b, b.number(null))
        rest = Term(b, b.op("Where", null, one, b.input(0)))
        others = (nulls.over("ReduceSum", self.axes) - nulls).positive()
        return self.g * (rest.over("ReduceProd", self.axes) / rest) * (1.0 - others)


REDUCTIONS: Mapping[str, Callable[[Reduced], Term]] = {
    "ReduceSum": lambda r: r.spread(r.g),
    "ReduceMean": lambda r: r.spread(r.g / r.count),
    "ReduceMax": lambda r: r.shared("Less"),
    "ReduceMin": lambda r: r.shared("Greater"),
    "ReduceProd": lambda r: r.product(),
    "ReduceL1": lambda r: r.g * r.b.x.of("Sign"),
    "ReduceL2": lambda r: r.g / r.y.of("Max", 1e-30) * r.b.x,
    "ReduceSumSquare": lambda r: 2.0 * r.g * r.b.x,
    "ReduceLogSum": lambda r: r.spread(r.g / r.y.of("Exp")),
    "ReduceLogSumExp": lambda r: r.g * (r.b.x - r.y).of("Exp"),
}
"""Gradient of the input."""


def reduction_reverse(formula: Callable[[Reduced], Term], *, pooled: bool = False) -> Reverse:
    """Rule of a reduction; of the spatial axes, if it is `pooled`."""

    def rule(b: Backward) -> Mapping[int, ir.Value] | str:
        rank = b.rank(0)
        axes = list(range(2, rank)) if pooled else reduced_axes(b.view, rank)
        if isinstance(axes, str):
            return axes
        if not axes:
            return "reduces no axis"
        gone = [] if b.view.attribute("keepdims", 1) else axes
        g, y = (Term(b, b.build.unsqueeze(value, gone)) for value in (b.gradient, b.output()))
        return {0: formula(Reduced(b, g, y, axes)).value}

    return rule


# -- reverse: normalisation --


def softmax_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """``y (g - Σ y g)``."""
    weighted = (b.g * b.y).over("ReduceSum", normalised_axes(b.view, b.rank(0)))
    return {0: (b.y * (b.g - weighted)).value}


def log_softmax_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """``g - eʸ Σ g``."""
    return {0: (b.g - b.y.of("Exp") * b.g.over("ReduceSum", normalised_axes(b.view, b.rank(0)))).value}


def only_data(rule: Callable[[Backward], Term]) -> Reverse:
    """Rule of an operator whose other operands are parameters."""
    return lambda b: {0: rule(b).value} if b.wanted == {0} else "computes its parameters"


def batch_normalisation_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """``scale / √(variance + ε)``, per channel."""
    refused = batch_normalisation(b.view)
    if isinstance(refused, str):
        return refused
    if b.wanted != {0}:
        return "computes its parameters"
    factor = b.of(1) / (b.of(4) + b.view.attribute("epsilon", 1e-5)).of("Sqrt")
    shaped = b.op("Reshape", factor.value, b.build.integers([-1] + [1] * (b.rank(0) - 2)))
    found = b.op("Mul", b.gradient, shaped)
    b.build.scaled[found] = b.gradient, factor.value
    return {0: found}


def standard(x: Term, axes: Sequence[int], epsilon: float) -> tuple[Term, Term]:
    """Standardised values and the factor that made them."""
    centred = x - x.over("ReduceMean", axes)
    factor = 1.0 / ((centred * centred).over("ReduceMean", axes) + epsilon).of("Sqrt")
    return centred * factor, factor


def standard_reverse(g: Term, normal: Term, factor: Term, axes: Sequence[int]) -> Term:
    """Back through standardisation: what changes mean or spread is taken out of the gradient."""
    kept = g - normal * (g * normal).over("ReduceMean", axes)
    return (kept - kept.over("ReduceMean", axes)) * factor


def layer_normalisation_terms(b: Backward, g: Term, x: Term, scale: Term, epsilon: float, axis: int) -> Term:
    """Gradient of the input `x` of a layer normalisation at whose output `g` arrives."""
    axes = list(range(axis, b.rank(0)))
    centred = x - x.over("ReduceMean", axes)
    factor = 1.0 / ((centred * centred).over("ReduceMean", axes) + epsilon).of("Sqrt")
    return centred_reverse(b, g, scale, centred, factor, axes)


def centred_reverse(b: Backward, g: Term, scale: Term, centred: Term, factor: Term, axes: Sequence[int]) -> Term:
    """Back through ``scale · factor · centred``, where the factor makes the variance 1 along the axes."""
    if g.value in b.build.products and len(axes) == 1:  # scale and mean go into the stored matrix
        before, matrix = b.build.products[g.value]
        scaled = Term(b, matrix) * scale
        g = Term(b, b.build.project(before, (scaled - scaled.over("ReduceMean", [1])).value))
    else:
        g = g * scale
        g = g - g.over("ReduceMean", axes)
    return (g - centred * ((g * centred).over("ReduceMean", axes) * (factor * factor))) * factor


def layer_normalisation_reverse(b: Backward) -> Term:
    """With its own scale, and with the mean and the factor that the operator itself can return."""
    axis, node = b.view.attribute("axis", -1) % b.rank(0), b.view.node
    if b.opset < 17 or b.dtype != np.float32 or node.inputs[0].dtype == ir.DataType.DOUBLE:  # type: ignore[union-attr]
        return layer_normalisation_terms(b, b.g, b.x, b.of(1), b.view.attribute("epsilon", 1e-5), axis)
    mean, factor = b.build.more_outputs(node, 3)
    return centred_reverse(b, b.g, b.of(1), b.x - Term(b, mean), Term(b, factor), list(range(axis, b.rank(0))))


def rms_normalisation_reverse(b: Backward) -> Term:
    """The same, where nothing is centred."""
    axes = list(range(b.view.attribute("axis", -1) % b.rank(0), b.rank(0)))
    factor = 1.0 / ((b.x * b.x).over("ReduceMean", axes) + b.view.attribute("epsilon", 1e-5)).of("Sqrt")
    normal, g = b.x * factor, b.g * b.of(1)
    return (g - normal * (g * normal).over("ReduceMean", axes)) * factor


def group_normalisation_reverse(b: Backward) -> Term:
    """Standardised group by group; scales are per channel, before opset 21 of GroupNormalization per group."""
    rank = b.rank(0)
    groups = b.view.attribute("num_groups", 0)  # 0 in a target shape: as many as channels
    rows = b.build.integers([0, groups, -1])
    per_group = groups and b.opset < 21
    column = b.build.integers([-1] + [1] * (1 if per_group else rank - 2))
    scale = Term(b, b.op("Reshape", b.input(1), column))
    g = b.g if per_group else b.g * scale
    g, x = (Term(b, b.op("Reshape", term.value, rows)) for term in (g, b.x))
    normal, factor = standard(x, [2], b.view.attribute("epsilon", 1e-5))
    return Term(b, b.like(standard_reverse(g * scale if per_group else g, normal, factor, [2]).value, 0))


def lp_normalisation_reverse(b: Backward) -> Term:
    """Takes out of the gradient what changes the norm."""
    axes, power = [b.view.attribute("axis", -1) % b.rank(0)], b.view.attribute("p", 2)
    along = b.y if power == 2 else b.x.of("Sign")
    return (b.g - along * (b.g * b.y).over("ReduceSum", axes)) / b.x.over(f"ReduceL{power}", axes)


_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp"
_CHOICES = "ArgMax ArgMin Hardmax"

ROWS = (
    *(Operator(name, reduction, reverse=reduction_reverse(REDUCTIONS[name])) for name in _REDUCTIONS.split()),
    Operator("ReduceLogSum", Barrier(), reverse=reduction_reverse(REDUCTIONS["ReduceLogSum"])),
    *(Operator(name, Barrier("chooses by size"), reverse=nothing) for name in _CHOICES.split()),
    Operator("MaxPool", pooling, reverse=max_pool_reverse),
    Operator("AveragePool", pooling, reverse=average_pool_reverse),
    Operator("GlobalMaxPool", pooling, reverse=reduction_reverse(REDUCTIONS["ReduceMax"], pooled=True)),
    Operator("GlobalAveragePool", pooling, reverse=reduction_reverse(REDUCTIONS["ReduceMean"], pooled=True)),
    Operator("BatchNormalization", batch_normalisation, reverse=batch_normalisation_reverse),
    Operator("InstanceNormalization", instance_normalisation, reverse=only_data(group_normalisation_reverse)),
    Operator("GroupNormalization", group_normalisation, reverse=only_data(group_normalisation_reverse), like=0),
    Operator("LayerNormalization", layer_normalisation, reverse=only_data(layer_normalisation_reverse)),
    Operator("RMSNormalization", layer_normalisation, reverse=only_data(rms_normalisation_reverse)),
    Operator("LpNormalization", Barrier("normalises across an axis"), reverse=only_data(lp_normalisation_reverse)),
    Operator("Softmax", softmax, reverse=softmax_reverse),
    Operator("LogSoftmax", softmax, reverse=log_softmax_reverse),
)
