"""What the compiler knows of each operator: one declaration a row, nothing anywhere else.

An operator is declared by its *axis signature*, in the manner of an einsum: which axes of its operands run in step.
An axis of an operand is a `Port`; ports whose channels are the same, index by index, form a *link*. ``Conv`` reads::

    X[n, c, ...], W[o, c, ...], B[o] -> Y[n, o, ...]

which is the links ``c = (X,1) (W,1)`` and ``o = (W,0) (B,0) (Y,1)``. What a link does to a channel follows from its ports:

========== ======================= ====================== ===========================================
kind       live input in the link  output in the link     meaning
========== ======================= ====================== ===========================================
creates    no                      yes                    units begin here (rows of a weight)
passes     one                     yes                    channelwise: channel j out is channel j in
joins      several                 yes                    channels meet one by one (residual add, gate)
reads      yes                     no                     contracted with a weight: the channels are mixed
========== ======================= ====================== ===========================================

A channel on an axis that is in no link is mixed in a way nothing is declared for: a *barrier*, reported with its reason.
An undeclared operator is a barrier on all axes; it is never assumed to be elementwise.

Passes and analyses ask for links, never for operator names. To add an operator, add a row to `OPERATORS`, and example
nodes to ``tests/test_operators.py``, where one law per kind is checked by running the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Dim = int | str | None
Shape = tuple[Dim, ...]
Port = tuple[int, int]
"""(operand, axis). Operand ``i`` is input ``i``, operand ``~i`` output ``i``; axes count from 0."""

OUT = ~0
DIALECT = "mscompile"
"""Domain of the compiler's own operators."""
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Move:
    """An axis whose channels keep their values and change their places: ``target[i] = source[index[i]]``."""

    source: Port
    target: Port
    index: IntArray


@dataclass(frozen=True)
class Size:
    """Entry `position` of the integer operand `operand` holds the size of output axis `axis`."""

    operand: int
    position: int
    axis: int


@dataclass(frozen=True)
class Linear:
    """The operator is linear in the data it contracts with a weight, so replacements fold into weight and bias.

    ``Y = gain · (weight ∘ data) + bias_gain · bias``. `bias` is the operand that holds, or may hold, the bias vector over
    the created channels; None if the operator takes none. `border` is true where the response to a constant channel
    depends on the position (zero padding, strided transposed convolution), so that a constant is no mere bias.
    """

    data: int
    weight: int
    bias: int | None
    border: bool = False
    gain: float = 1.0
    bias_gain: float = 1.0


@dataclass(frozen=True)
class Signature:
    """How the axes of one node's operands run in step.

    Attributes
    ----------
    links
        Tuples of ports whose channels are the same, index by index.
    moves
        Axes whose channels are copied to other places.
    linear
        Set where the contraction of the node folds.
    steady
        A channel that is constant over samples and positions stays so; its value is found by running the operator.
    sizes
        Operands that repeat an output size and must follow when it changes.
    counts
        Attributes that hold the number of channels of an output axis: (attribute, axis).
    moving
        The node only moves values (any reader behind it reads its input).
    additive
        The output is the sum of the operands.
    mixes
        Why the axes in no link are a barrier, for the report.
    """

    links: tuple[tuple[Port, ...], ...] = ()
    moves: tuple[Move, ...] = ()
    linear: Linear | None = None
    steady: bool = True
    sizes: tuple[Size, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    moving: bool = False
    additive: bool = False
    mixes: str = "mixes this axis"


@dataclass(frozen=True)
class NodeView:
    """A node with the shapes of its operands, as a declaration sees it."""

    node: ir.Node
    shapes: Mapping[str, Shape]
    opset: int

    def value(self, operand: int) -> ir.Value | None:
        """Value at an operand; None where an optional operand is absent."""
        values = self.node.inputs if operand >= 0 else self.node.outputs
        position = operand if operand >= 0 else ~operand
        return values[position] if position < len(values) else None

    def shape(self, operand: int) -> Shape | None:
        """Shape of an operand, None where unknown or absent."""
        value = self.value(operand)
        if value is None or value.name is None:
            return None
        return self.shapes.get(value.name)

    def rank(self, operand: int) -> int | None:
        """Rank of an operand, None where unknown or absent."""
        shape = self.shape(operand)
        return None if shape is None else len(shape)

    def constant(self, operand: int) -> npt.NDArray[np.generic] | None:
        """Value of a parameter: an initializer that is neither a graph input nor absent."""
        value = self.value(operand)
        return None if value is None or not is_parameter(value) else value.const_value.numpy()  # type: ignore[union-attr]

    def attribute(self, name: str, default: T) -> T:
        """Value of an attribute, `default` where it is not set."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    @property
    def live(self) -> tuple[int, ...]:
        """Operands of the inputs that are computed: everything but parameters and absent ones."""
        return tuple(i for i, v in enumerate(self.node.inputs) if v is not None and not is_parameter(v))


def is_parameter(value: ir.Value) -> bool:
    """Whether a value is fixed: an initializer that no caller can override."""
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


Declaration = Callable[[NodeView], Signature | str]
"""Gives the signature of a node, or the reason why this node is a barrier."""


# --- families ---------------------------------------------------------------------------------------------------------


def elementwise(node: NodeView) -> Signature | str:
    """Every output element depends on the input elements at its place, after broadcasting."""
    out = node.shape(OUT)
    shapes = {i: node.shape(i) for i, value in enumerate(node.node.inputs) if value is not None}
    if any(shape is None for shape in shapes.values()):
        return "its operands have no known rank"
    rank = max((len(shape) for shape in shapes.values() if shape is not None), default=0)
    links = []
    for axis in range(rank):
        aligned = {i: axis - rank + len(shape) for i, shape in shapes.items() if shape is not None}
        dims = {i: shapes[i][a] for i, a in aligned.items() if a >= 0}  # type: ignore[index]
        full = out[axis] if out is not None and out[axis] is not None else max(dims.values(), key=_extent)
        ports = tuple((i, aligned[i]) for i, dim in dims.items() if dim == full and dim is not None)
        if ports:
            links.append((*ports, (OUT, axis)))
    return Signature(tuple(links), mixes="broadcasts this axis")


def addition(node: NodeView) -> Signature | str:
    """Elementwise sum."""
    base = elementwise(node)
    return base if isinstance(base, str) else replace(base, additive=True)


def _extent(dim: Dim) -> float:
    """Order of dimensions under broadcasting: 1 yields to everything, a symbol yields to nothing."""
    return dim if isinstance(dim, int) else math.inf


def dropout(node: NodeView) -> Signature | str:
    """The identity at inference; random in training mode."""
    switch = node.constant(2)
    if node.value(2) is not None and (switch is None or bool(switch)):
        return "may be in training mode"
    return unary(node)


def unary(node: NodeView) -> Signature | str:
    """Acts on input 0 element by element; any further inputs are scalars or switches."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    return Signature(tuple(((0, a), (OUT, a)) for a in range(rank)))


def per_channel(*parameters: int) -> Declaration:
    """Per-channel map of axis 1 with one parameter vector per operand in `parameters` (batch normalisation)."""

    def declare(node: NodeView) -> Signature | str:
        rank = node.rank(0)
        if rank is None or rank < 2:
            return "its input has no channel axis"
        if node.attribute("training_mode", 0):
            return "is in training mode"
        links = tuple(((0, a), (OUT, a)) for a in range(rank) if a != 1)
        return Signature((*links, ((0, 1), *((p, 0) for p in parameters), (OUT, 1))))

    return declare


def pooling(node: NodeView) -> Signature | str:
    """Mixes positions within a channel. Zeros that padding counts in make a constant uneven at the border."""
    if node.rank(0) is None:
        return "its input has no known rank"
    padded = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    uneven = padded and bool(node.attribute("count_include_pad", 0))
    ceil = bool(node.attribute("ceil_mode", 0)) and bool(node.attribute("count_include_pad", 0))
    return Signature((((0, 0), (OUT, 0)), ((0, 1), (OUT, 1))), steady=not (uneven or ceil), mixes="pools over this axis")


def reduction(node: NodeView) -> Signature | str:
    """Reduces some axes and keeps the others (mean over positions)."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    axes = node.attribute("axes", None)
    if axes is None:
        given = node.constant(1)
        if given is None and node.value(1) is not None:
            return "its axes are computed"
        axes = given.tolist() if given is not None else []
    if not axes and not node.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    reduced = {int(a) % rank for a in axes}
    keepdims = bool(node.attribute("keepdims", 1))
    kept = [a for a in range(rank) if a not in reduced]
    targets = kept if keepdims else range(len(kept))
    return Signature(tuple(((0, a), (OUT, t)) for a, t in zip(kept, targets, strict=True)), mixes="reduces over this axis")


def softmax(node: NodeView) -> Signature | str:
    """Normalises over `axis`; before opset 13 over every axis behind it as well, with another default."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1) % rank
    return _normalised(rank, (axis,) if node.opset >= 13 else range(axis, rank))


def layer_normalisation(node: NodeView) -> Signature | str:
    """Normalises over `axis` and every axis behind it; the axes before it pass."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    return _normalised(rank, range(node.attribute("axis", -1) % rank, rank))


def _normalised(rank: int, over: Sequence[int]) -> Signature:
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a not in over)
    return Signature(links, mixes="normalises across this axis")


# --- contractions -----------------------------------------------------------------------------------------------------


def gemm(node: NodeView) -> Signature | str:
    """``alpha · A B + beta · C`` with optional transposes."""
    k, n = (1, 0) if node.attribute("transB", 0) else (0, 1)
    a_k, a_m = (0, 1) if node.attribute("transA", 0) else (1, 0)
    alpha, beta = float(node.attribute("alpha", 1.0)), float(node.attribute("beta", 1.0))
    bias = node.shape(2)
    created: tuple[Port, ...] = ((1, n), (OUT, 1))
    if node.value(2) is not None:
        if bias is None:
            return "its bias has no known shape"
        if bias and bias[-1] != 1:
            created = ((1, n), (2, len(bias) - 1), (OUT, 1))
    vector = node.value(2) is None or (bias is not None and bias[-1:] not in ((), (1,)) and set(bias[:-1]) <= {1})
    foldable = vector and (beta != 0 or node.value(2) is None)
    linear = Linear(0, 1, 2 if foldable else None, gain=alpha, bias_gain=beta)
    return Signature((((0, a_k), (1, k)), ((0, a_m), (OUT, 0)), created), linear=linear)


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


# --- movement ---------------------------------------------------------------------------------------------------------


def transpose(node: NodeView) -> Signature | str:
    """Permutes the axes."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    perm = node.attribute("perm", tuple(reversed(range(rank))))
    return Signature(tuple(((0, p), (OUT, a)) for a, p in enumerate(perm)), moving=True)


def regroup(node: NodeView) -> Signature | str:
    """Flatten, Squeeze, Unsqueeze, Reshape: axes that stay are linked, axes merged into one are moved.

    Shapes are matched from the right, block by block: the smallest trailing blocks of equal static volume correspond.
    """
    source, target = node.shape(0), node.shape(OUT)
    if source is None or target is None:
        return "its shapes are not known"
    links: list[tuple[Port, ...]] = []
    moves: list[Move] = []
    for ins, outs in _blocks(source, target):
        wide_in = [a for a in ins if source[a] != 1] or ins[-1:]
        wide_out = [a for a in outs if target[a] != 1] or outs[-1:]
        if len(wide_in) == len(wide_out) == 1:
            links.append(((0, wide_in[0]), (OUT, wide_out[0])))
        elif len(wide_out) == 1:
            places = np.indices([source[a] for a in wide_in], dtype=np.int64)  # type: ignore[arg-type, misc]
            moves += [Move((0, a), (OUT, wide_out[0]), places[i].ravel()) for i, a in enumerate(wide_in)]
    return Signature(tuple(links), tuple(moves), moving=True, mixes="reshapes this axis")


def reshape(node: NodeView) -> Signature | str:
    """Regroups axes to a target shape, whose positive entries follow when a width changes."""
    target = node.constant(1)
    if target is None:
        return "computes its target shape"
    base = regroup(node)
    if isinstance(base, str):
        return base
    entries = target.ravel().astype(np.int64).tolist()
    return replace(base, sizes=tuple(Size(1, axis, axis) for axis, entry in enumerate(entries) if entry > 0))


def _blocks(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs of trailing axis blocks with equal volume, from the right, as far as the sizes are known."""
    blocks: list[tuple[list[int], list[int]]] = []
    i, j = len(source), len(target)
    while i > 0 and j > 0:
        ins, outs = [i - 1], [j - 1]
        if source[i - 1] != target[j - 1] or source[i - 1] is None:
            while True:
                a, b = _volume(source, ins), _volume(target, outs)
                if a is None or b is None:
                    return blocks
                if a == b:
                    break
                axes = ins if a < b else outs
                if axes[0] == 0:
                    return blocks
                axes.insert(0, axes[0] - 1)
        blocks.append((ins, outs))
        i, j = ins[0], outs[0]
    return blocks


def _volume(shape: Shape, axes: Sequence[int]) -> int | None:
    dims = [shape[a] for a in axes]
    return math.prod(dims) if all(isinstance(d, int) for d in dims) else None  # type: ignore[arg-type]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One row.

    Attributes
    ----------
    name, domain
        As in the node.
    declare
        Gives the axis signature.
    macs
        Multiply–accumulates of a node whose shapes are numbers; none where it is not set.
    """

    name: str
    declare: Declaration
    domain: str = ""
    macs: Callable[[NodeView], int] | None = None


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


_UNARY = """Relu LeakyRelu ThresholdedRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Swish Mish Tanh Softplus Softsign
Gelu Erf Exp Log Sqrt Abs Neg Reciprocal Sign Floor Ceil Round Sin Cos Clip Cast Identity"""
_BROADCAST = "Sub Mul Div Pow Min Max Mean PRelu Where"
_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp"

OPERATORS: Mapping[tuple[str, str], Operator] = {
    (row.domain, row.name): row
    for row in (
        *(Operator(name, unary) for name in _UNARY.split()),
        *(Operator(name, elementwise) for name in _BROADCAST.split()),
        *(Operator(name, addition) for name in ("Add", "Sum")),
        *(Operator(name, reduction) for name in _REDUCTIONS.split()),
        *(Operator(name, pooling) for name in ["MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"]),
        *(Operator(name, regroup) for name in ["Flatten", "Squeeze", "Unsqueeze"]),
        Operator("Reshape", reshape),
        Operator("Dropout", dropout),
        Operator("Transpose", transpose),
        Operator("BatchNormalization", per_channel(1, 2, 3, 4)),
        Operator("InstanceNormalization", per_channel(1, 2)),
        *(Operator(name, softmax) for name in ("Softmax", "LogSoftmax")),
        *(Operator(name, layer_normalisation) for name in ("LayerNormalization", "RMSNormalization")),
        Operator("Gemm", gemm, macs=product_macs),
        Operator("MatMul", matmul, macs=product_macs),
        Operator("Conv", conv, macs=conv_macs),
        Operator("ConvTranspose", conv_transpose, macs=conv_transpose_macs),
        # do(unit := value), written into a graph by passes/replace.py; never leaves the compiler.
        Operator("Replace", unary, domain=DIALECT),
    )
}


def declared(node: ir.Node) -> Operator | None:
    """The row of a node's operator, if there is one."""
    return OPERATORS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))


def signature(view: NodeView) -> Signature | str:
    """Axis signature of a node, or the reason why it is a barrier on all axes."""
    row = declared(view.node)
    if row is None:
        domain = view.node.domain
        return f"has no declaration{f' (domain {domain})' if domain else ''}"
    return row.declare(view)
