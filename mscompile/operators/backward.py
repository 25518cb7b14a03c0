"""Reverse-mode rules: the vocabulary in which a declaration says how gradients pass its operator.

A rule takes a `Backward` and returns, for each input operand that wants one, the gradient of ``vᵀ y`` with respect to it,
built from standard operators; or the reason why it cannot. Rules never differentiate parameters.

Rules hold from opset `OLDEST` on. The graph also runs on batches of other sizes than the sample that the shapes come from:
a rule reads ranks, ones and static sizes from them, and asks ``Shape`` of the running graph for anything that may vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from mscompile.operators.axes import NodeView, Shape

PREFIX = "mscompile."
"""Start of every name the compiler gives to a tensor of a throw-away graph."""
OLDEST = 9
"""First opset with rules: what they are made of is older."""
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_AXES_OPERAND = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
"""Opset from which the axes are an operand; 18 for every other reduction."""


class NoRuleError(Exception):
    """Why a rule does not apply to a node, as a clause after the node's name."""


@dataclass
class Builder:
    """Appends nodes to a graph; asked twice for the same node, it gives the first one again.

    So rules are written without a thought to sharing: what several seeds have in common is computed once.
    """

    graph: ir.Graph
    opset: int
    prefix: str = PREFIX
    fused: bool = False
    """Whether the graph may hold operators that only onnxruntime has."""
    folds: bool = True
    """Whether matrices may be made from stored ones: each is held beside those that it is made from."""
    scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """Values that are another one times a number per channel, [channels]: a product behind may take it into its weight."""
    products: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """Values that are another one times a stored matrix: what is linear and comes next may be taken into that."""
    spread: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values that are another one, broadcast: a product with a tensor of their shape may take the narrow one."""
    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    """Shapes on the sample batch, of values that shape inference need not get to by itself."""
    _made: dict[Any, ir.Value] = field(default_factory=dict)

    def op(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Output of a node of one output."""
        return self.ops(operator, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, operator: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Outputs of a node."""
        key = (operator, domain, tuple(map(id, inputs)), repr(sorted(attributes.items())), outputs)
        if (key, 0) not in self._made:
            values = [ir.Value(name=f"{self.prefix}{len(self._made)}.{i}") for i in range(outputs)]
            node = ir.node(operator, list(inputs), attributes, domain=domain, outputs=values, name=values[0].name)
            self.graph.append(node)
            self._made |= {(key, i): value for i, value in enumerate(values)}
        return tuple(self._made[key, i] for i in range(outputs))

    def more_outputs(self, node: ir.Node, count: int) -> Sequence[ir.Value]:
        """Outputs of a node of the graph behind the first, which it may leave out."""
        if len(node.outputs) < count:
            node.resize_outputs(count)
        for value in node.outputs[1:]:
            value.name = value.name or f"{self.prefix}{node.outputs[0].name}.{value.index()}"
        return node.outputs[1:]

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> ir.Value:
        """A stored array."""
        array = np.asarray(value, dtype=dtype)
        key = ("constant", array.tobytes(), array.dtype.str, array.shape)
        if key not in self._made:
            tensor = ir.tensor(array, name=f"{self.prefix}{len(self._made)}")
            stored = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(stored)
            self._made[key] = stored
        return self._made[key]

    def integers(self, values: int | Sequence[int]) -> ir.Value:
        """A stored int64 array."""
        return self.constant(values, np.int64)

    def over(self, operator: str, value: ir.Value, axes: Sequence[int], **attributes: Any) -> ir.Value:
        """An operator that takes axes: as an attribute in older opsets, as an operand in newer ones."""
        if self.opset >= _AXES_OPERAND.get(operator, 18):
            return self.op(operator, value, self.integers(list(axes)), **attributes)
        return self.op(operator, value, axes=list(axes), **attributes)

    def reduce(self, operator: str, value: ir.Value, axes: Sequence[int], *, keepdims: bool = True) -> ir.Value:
        """ReduceSum and its kind."""
        return self.over(operator, value, axes, keepdims=int(keepdims))

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Insert axes of size 1; `axes` are those of the result."""
        return self.over("Unsqueeze", value, axes) if axes else value

    def squeeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Remove axes of size 1."""
        return self.over("Squeeze", value, axes)

    def extents(self, value: ir.Value, axes: Iterable[int]) -> ir.Value:
        """Sizes of some axes when the graph runs: an int64 vector."""
        return self.op("Gather", self.op("Shape", value), self.integers(list(axes)), axis=0)

    def fill(self, number: ir.Value, shape: ir.Value) -> ir.Value:
        """A tensor of one number."""
        return self.op("Expand", number, shape)

    def swap(self, value: ir.Value, rank: int) -> ir.Value:
        """Transpose the last two axes."""
        return self.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])

    def project(self, value: ir.Value, matrix: ir.Value) -> ir.Value:
        """The product with a stored matrix, kept in mind in `products`."""
        product = self.op("MatMul", value, matrix)
        if self.folds:
            self.products[product] = value, matrix
        return product

    def product(self, left: ir.Value, right: ir.Value, *, ranks: tuple[int, int], turned: int) -> ir.Value:
        """The product of stacks of matrices, those of operand `turned` transposed."""
        if self.fused:  # without a transpose of its own, which would be a copy
            self.graph.opset_imports.setdefault("com.microsoft", 1)
            return self.op(
                "FusedMatMul", left, right, domain="com.microsoft", transA=int(turned == 0), transB=int(turned == 1)
            )
        operands = [left, right]
        operands[turned] = self.swap(operands[turned], ranks[turned])
        return self.op("MatMul", *operands)

    def contract(self, value: ir.Value, axis: int, rank: int, response: ir.Value) -> ir.Value:
        """Carry a gradient back through a linear map along one axis; ``response[i, o]`` is ∂output o / ∂input i."""
        if axis == rank - 2:
            return self.op("MatMul", response, value)
        across = self.op("Transpose", response, perm=[1, 0])
        if axis == rank - 1:
            return self.op("MatMul", value, across)
        order = [a for a in range(rank) if a != axis] + [axis]
        product = self.op("MatMul", self.op("Transpose", value, perm=order), across)
        return self.op("Transpose", product, perm=[int(a) for a in np.argsort(order)])


@dataclass(frozen=True)
class Backward:
    """One node on the way back.

    Attributes
    ----------
    view
        The node; its shapes are those of a sample batch, all numbers where inference could find them.
    build
        Where new nodes go.
    gradients
        Per output of the node: the gradient that arrives, or None.
    wanted
        Input operands whose gradient is asked for.
    dtype
        Element type of gradients.
    declared
        Shapes by tensor name as the model states them; a number there is the same in every run.
    """

    view: NodeView
    build: Builder
    gradients: tuple[ir.Value | None, ...]
    wanted: frozenset[int]
    dtype: np.dtype[Any]
    declared: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def gradient(self) -> ir.Value:
        """Gradient that arrives at output 0, for rules that know no other output."""
        gradient, *others = self.gradients
        if gradient is None or any(other is not None for other in others):
            raise NoRuleError("has a gradient at another output than its first")
        return gradient

    @property
    def opset(self) -> int:
        """Opset of the model."""
        return self.build.opset

    def input(self, operand: int) -> ir.Value:
        """Input of the forward node, in the gradients' type if it is a float."""
        value = self.view.value(operand)
        assert value is not None
        return self._float(value)

    def output(self, position: int = 0) -> ir.Value:
        """Output of the forward node, in the gradients' type if it is a float."""
        return self._float(self.view.node.outputs[position])

    def of(self, operand: int) -> Term:
        """Input of the forward node, in a formula."""
        return Term(self, self.input(operand))

    @property
    def x(self) -> Term:
        """Input 0, in a formula."""
        return self.of(0)

    @property
    def y(self) -> Term:
        """Output 0, in a formula."""
        return Term(self, self.output())

    @property
    def g(self) -> Term:
        """The arriving gradient, in a formula."""
        return Term(self, self.gradient)

    def _float(self, value: ir.Value) -> ir.Value:
        kind = ir.DataType.from_numpy(self.dtype)
        return self.op("Cast", value, to=int(kind)) if value.dtype in FLOATS and value.dtype != kind else value

    def shape(self, operand: int) -> Shape:
        """Shape of an operand for the sample batch."""
        shape = self.view.shape(operand)
        if shape is None:
            raise NoRuleError("has an operand of unknown shape")
        return shape

    def rank(self, operand: int) -> int:
        """Rank of an operand."""
        return len(self.shape(operand))

    def sizes(self, operand: int, axes: Sequence[int]) -> list[int]:
        """Sizes of some axes of an operand for the sample batch."""
        shape = self.shape(operand)
        sizes = [d for d in (shape[a] for a in axes) if isinstance(d, int)]
        if len(sizes) < len(axes):
            raise NoRuleError("has an operand of unknown size")
        return sizes

    def fixed(self, operand: int, axis: int) -> int | None:
        """Size of an axis if it is the same in every run, None where that is not known."""
        value = self.view.value(operand)
        assert value is not None
        shape, sample = self.declared.get(value.name or "", value.shape), self.shape(operand)
        size = None if shape is None or len(shape) != len(sample) else shape[axis]
        return size if isinstance(size, int) and size == sample[axis] else None

    def op(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Output of a new node."""
        return self.build.op(operator, *inputs, **attributes)

    def scalar(self, value: float) -> ir.Value:
        """A stored number of the gradients' type."""
        return self.build.constant(value, self.dtype)

    def number(self, value: ir.Value) -> ir.Value:
        """Truth values or integers as numbers of the gradients' type."""
        return self.op("Cast", value, to=int(ir.DataType.from_numpy(self.dtype)))

    def equal(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Truth values; before opset 11 Equal takes no floats."""
        if self.opset >= 11:
            return self.op("Equal", left, right)
        return self.op("Not", self.op("Or", self.op("Less", left, right), self.op("Greater", left, right)))

    def where_positive(self, value: ir.Value) -> ir.Value:
        """1 where `value` > 0, else 0, in the gradients' type."""
        if self.dtype == np.float32:  # One fast operator; only subnormal values come out between 0 and 1.
            return self.op("HardSigmoid", value, alpha=3e38, beta=0.0)
        return self.number(self.op("Greater", value, self.scalar(0.0)))

    def like(self, gradient: ir.Value, operand: int) -> ir.Value:
        """Reshape to the shape of an input."""
        return self.op("Reshape", gradient, self.op("Shape", self.input(operand)))

    def spread(self, gradient: ir.Value, operand: int) -> ir.Value:
        """Broadcast to the shape of an input."""
        wide = self.op("Expand", gradient, self.op("Shape", self.input(operand)))
        self.build.spread[wide] = gradient
        return wide

    def zeros(self, value: ir.Value) -> ir.Value:
        """Zeros of the shape of a value."""
        return self.build.fill(self.scalar(0.0), self.op("Shape", value))

    def identity(self, operand: int, axis: int) -> ir.Value:
        """The identity matrix of the size of an axis: through it, a linear operator shows its matrix."""
        size = self.fixed(operand, axis)
        if size is not None:
            return self.build.constant(np.eye(size), self.dtype)
        length = self.build.extents(self.input(operand), [axis])
        return self.op("EyeLike", self.build.fill(self.scalar(0.0), self.op("Concat", length, length, axis=0)))

    def unbroadcast(self, gradient: ir.Value, operand: int, wide: Shape | None = None) -> ir.Value:
        """Sum a gradient of shape `wide` (the output's if not given) over the axes along which `operand` was broadcast."""
        wide, narrow = self.shape(~0) if wide is None else wide, self.shape(operand)
        extra = len(wide) - len(narrow)
        pairs = list(zip(narrow, wide[extra:], strict=True))
        if any(n != w for n, w in pairs if not isinstance(n, int)) or any(n is None for n, _ in pairs):
            return self._unbroadcast_late(gradient, operand, extra)
        over = [*range(extra), *(extra + axis for axis, (n, w) in enumerate(pairs) if n == 1 and w != 1)]
        if not over:
            return gradient
        summed = self.build.reduce("ReduceSum", gradient, over)
        return self.like(summed, operand) if extra else summed

    def _unbroadcast_late(self, gradient: ir.Value, operand: int, extra: int) -> ir.Value:
        """The same where a size is not known before the graph runs."""
        if self.opset < 13:
            raise NoRuleError("broadcasts operands of unknown size")
        ones = self.build.integers([1] * extra)
        narrow = self.op("Concat", ones, self.op("Shape", self.input(operand)), axis=0)
        over = self.op("NonZero", self.op("Less", narrow, self.op("Shape", gradient)))
        flat = self.op("Reshape", over, self.build.integers([-1]))
        return self.like(self.op("ReduceSum", gradient, flat, keepdims=1, noop_with_empty_axes=1), operand)


@dataclass(frozen=True, eq=False)
class Term:
    """A value in a formula; arithmetic on it appends nodes."""

    b: Backward
    value: ir.Value

    def of(self, operator: str, *others: Term | float, **attributes: Any) -> Term:
        """An operator on this term and others."""
        return Term(self.b, self.b.op(operator, self.value, *map(self._value, others), **attributes))

    def _value(self, other: Term | float) -> ir.Value:
        return other.value if isinstance(other, Term) else self.b.scalar(other)

    def _term(self, number: float) -> Term:
        return Term(self.b, self.b.scalar(number))

    def __add__(self, other: Term | float) -> Term:
        return self.of("Add", other)

    def __sub__(self, other: Term | float) -> Term:
        return self.of("Sub", other)

    def __mul__(self, other: Term | float) -> Term:
        return self.of("Mul", other)

    def __truediv__(self, other: Term | float) -> Term:
        return self.of("Div", other)

    def __neg__(self) -> Term:
        return self.of("Neg")

    def __radd__(self, number: float) -> Term:
        return self + number

    def __rsub__(self, number: float) -> Term:
        return self._term(number) - self

    def __rmul__(self, number: float) -> Term:
        return self * number

    def __rtruediv__(self, number: float) -> Term:
        return self._term(number) / self

    def positive(self) -> Term:
        """1 where the term is positive, else 0."""
        return Term(self.b, self.b.where_positive(self.value))

    def over(self, operator: str, axes: Sequence[int]) -> Term:
        """A reduction that keeps the reduced axes."""
        return Term(self.b, self.b.build.reduce(operator, self.value, axes))


Reverse = Callable[[Backward], Mapping[int, ir.Value] | str]
"""Gradients by input operand, or the reason why there are none."""
Formula = Callable[[Backward], Term]


def nothing(b: Backward) -> Mapping[int, ir.Value]:
    """No output changes with an input, as far as derivatives go."""
    del b
    return {}


def through(b: Backward) -> Mapping[int, ir.Value]:
    """The gradient, as it is."""
    return {0: b.gradient}


def slope(formula: Formula) -> Reverse:
    """Rule of an operator that acts on input 0 element by element, from its derivative."""
    return lambda b: {0: b.op("Mul", b.build.spread.get(b.gradient, b.gradient), formula(b).value)}


def gradients(*formulas: Formula) -> Reverse:
    """Rule of an operator that broadcasts, from the gradient of each operand before it is summed."""
    return lambda b: {i: b.unbroadcast(formulas[i](b).value, i) for i in b.wanted}
