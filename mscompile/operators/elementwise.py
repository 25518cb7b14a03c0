"""Operators that act element by element, after broadcasting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from mscompile.operators.axes import DIALECT, OUT, NodeView, Operator, Signature
from mscompile.operators.backward import Backward


def elementwise(node: NodeView) -> Signature | str:
    """Every output element depends on the input elements at its place, after broadcasting."""
    shapes = {i: node.shape(i) for i, value in enumerate(node.node.inputs) if value is not None}
    if any(shape is None for shape in shapes.values()):
        return "its operands have no known rank"
    rank = max((len(shape) for shape in shapes.values() if shape is not None), default=0)
    links = []
    for axis in range(rank):
        aligned = {i: axis - rank + len(shape) for i, shape in shapes.items() if shape is not None}
        dims = {i: shapes[i][a] for i, a in aligned.items() if a >= 0}  # type: ignore[index]
        wide = {dim for dim in dims.values() if dim != 1}
        # Sizes that are not known to be equal may turn out as 1: then nothing is known to run in step.
        if len(wide) <= 1 and None not in wide:
            links.append((*((i, aligned[i]) for i, dim in dims.items() if dim in wide or not wide), (OUT, axis)))
    return Signature(tuple(links), mixes="broadcasts this axis")


def addition(node: NodeView) -> Signature | str:
    """Elementwise sum."""
    base = elementwise(node)
    return base if isinstance(base, str) else replace(base, additive=True)


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


def relu_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """1 where the output is positive."""
    return {0: b.op("Mul", b.gradient, b.where_positive(b.output()))}


def addition_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The gradient, to every operand."""
    return {operand: b.unbroadcast(b.gradient, operand) for operand in b.wanted}


_UNARY = """LeakyRelu ThresholdedRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Swish Mish Tanh Softplus Softsign
Gelu Erf Exp Log Sqrt Abs Neg Reciprocal Sign Floor Ceil Round Sin Cos Clip Cast Identity"""
_BROADCAST = "Sub Mul Div Pow Min Max Mean PRelu Where"

ROWS = (
    Operator("Relu", unary, reverse=relu_reverse),
    *(Operator(name, unary) for name in _UNARY.split()),
    *(Operator(name, elementwise) for name in _BROADCAST.split()),
    *(Operator(name, addition, reverse=addition_reverse) for name in ("Add", "Sum")),
    Operator("Dropout", dropout),
    # do(unit := value), written into a graph by passes/replace.py; never leaves the compiler.
    Operator("Replace", unary, domain=DIALECT),
)
