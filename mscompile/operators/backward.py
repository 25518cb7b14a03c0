"""Reverse-mode rules: the vocabulary in which a declaration says how gradients pass its operator.

A rule takes a `Backward` and returns, for each input operand that wants one, the gradient of ``vᵀ y`` with respect to it,
built from standard operators; or the reason why it cannot. Rules never differentiate parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from mscompile.operators.axes import NodeView, Shape

PREFIX = "mscompile."
"""Start of every name the compiler gives to a tensor of a throw-away graph."""


@dataclass
class Builder:
    """Appends nodes to a graph; asked twice for the same node, it gives the first one again.

    So rules are written without a thought to sharing: what several seeds have in common is computed once.
    """

    graph: ir.Graph
    opset: int
    prefix: str = PREFIX
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

    def reduce(self, operator: str, value: ir.Value, axes: Sequence[int], *, keepdims: bool = True) -> ir.Value:
        """ReduceSum and its kind; the axes became an operand with opset 13 (ReduceSum) or 18 (the others)."""
        keep = int(keepdims)
        if self.opset >= (13 if operator == "ReduceSum" else 18):
            return self.op(operator, value, self.integers(list(axes)), keepdims=keep)
        return self.op(operator, value, axes=list(axes), keepdims=keep)


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
    """

    view: NodeView
    build: Builder
    gradients: tuple[ir.Value | None, ...]
    wanted: frozenset[int]
    dtype: np.dtype[Any]

    @property
    def gradient(self) -> ir.Value:
        """Gradient that arrives at output 0."""
        gradient = self.gradients[0]
        assert gradient is not None
        return gradient

    def input(self, operand: int) -> ir.Value:
        """Input of the forward node."""
        value = self.view.node.inputs[operand]
        assert value is not None
        return value

    def output(self, position: int = 0) -> ir.Value:
        """Output of the forward node."""
        return self.view.node.outputs[position]

    def shape(self, operand: int) -> Shape:
        """Shape of an operand, which a rule may ask for only where it is known."""
        shape = self.view.shape(operand)
        assert shape is not None
        return shape

    def op(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Output of a new node."""
        return self.build.op(operator, *inputs, **attributes)

    def scalar(self, value: float) -> ir.Value:
        """A stored number of the gradients' type."""
        return self.build.constant(value, self.dtype)

    def where_positive(self, value: ir.Value) -> ir.Value:
        """1 where `value` > 0, else 0, in the gradients' type."""
        kind = int(ir.DataType.from_numpy(self.dtype))
        return self.op("Cast", self.op("Greater", value, self.scalar(0.0)), to=kind)

    def unbroadcast(self, gradient: ir.Value, operand: int) -> ir.Value:
        """Sum a gradient of the output's shape over the axes along which `operand` was broadcast."""
        wide, narrow = self.shape(~0), self.shape(operand)
        extra = len(wide) - len(narrow)
        stretched = [extra + axis for axis, dim in enumerate(narrow) if dim == 1 and wide[extra + axis] != 1]
        over = [*range(extra), *stretched]
        if not over:
            return gradient
        summed = self.build.reduce("ReduceSum", gradient, over)
        return self.op("Reshape", summed, self.op("Shape", self.input(operand))) if extra else summed


Reverse = Callable[[Backward], Mapping[int, ir.Value] | str]
"""Gradients by input operand, or the reason why there are none."""
