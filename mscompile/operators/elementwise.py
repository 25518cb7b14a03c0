"""Operators that act element by element, after broadcasting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import DIALECT, OUT, Barrier, NodeView, Operator, Signature
from mscompile.operators.backward import FLOATS, Backward, Formula, Reverse, Term, gradients, nothing, slope, through


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
    """Elementwise sum or difference."""
    base = elementwise(node)
    return base if isinstance(base, str) else replace(base, additive=True)


def product(node: NodeView) -> Signature | str:
    """Elementwise product."""
    base = elementwise(node)
    return base if isinstance(base, str) else replace(base, scaled=tuple(range(len(node.node.inputs))))


def quotient(node: NodeView) -> Signature | str:
    """Elementwise quotient."""
    base = elementwise(node)
    return base if isinstance(base, str) else replace(base, scaled=(0,))


def dropout(node: NodeView) -> Signature | str:
    """The identity at inference; random in training mode."""
    switch = node.constant(2)
    if node.value(2) is not None and (switch is None or bool(switch)):
        return "may be in training mode"
    return unary(node)


def carry(node: NodeView) -> Signature | str:
    """Input 0 with one more channel, of ones, behind each of `groups` blocks of channels, which is no unit's."""
    base = unary(node)
    return base if isinstance(base, str) else replace(base, moving=True)


def unary(node: NodeView) -> Signature | str:
    """Acts on input 0 element by element; any further inputs are scalars or switches."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    return Signature(tuple(((0, a), (OUT, a)) for a in range(rank)))


# -- reverse --


def bend(x: Term, below: float | Term) -> Term:
    """1 where x > 0, else `below`."""
    return x.positive() * (1.0 - below) + below


def exponential(x: Term, alpha: float) -> Term:
    """1 where x > 0, else alpha eˣ."""
    return alpha * x.of("Min", 0.0).of("Exp") + x.positive() * (1.0 - alpha)


def inside(x: Term) -> Term:
    """1 where 0 < x < 1."""
    return x.positive() * (1.0 - x).positive()


def swish(x: Term, y: Term, alpha: float) -> Term:
    """Slope of y = x σ(αx)."""
    s = (alpha * x).of("Sigmoid")
    return s + alpha * y * (1.0 - s)


def mish(x: Term) -> Term:
    """Slope of x tanh(log(1 + eˣ))."""
    t = x.of("Softplus").of("Tanh")
    return t + x * (1.0 - t * t) * x.of("Sigmoid")


def gelu(x: Term) -> Term:
    """Slope of x Φ(x), Φ the normal distribution."""
    u = x * math.sqrt(0.5)
    return 0.5 * u.of("Erf") + 0.5 + u * (-0.5 * math.log(math.pi) - u * u).of("Exp")


def tanh_gelu(x: Term) -> Term:
    """The same with the approximation of Φ by tanh."""
    c = math.sqrt(2.0 / math.pi)
    square = x * x
    t = (c * x * (1.0 + 0.044715 * square)).of("Tanh")
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (c + 3.0 * 0.044715 * c * square)


SLOPES: Mapping[str, Formula] = {
    "Relu": lambda b: b.y.positive(),
    "LeakyRelu": lambda b: bend(b.x, b.view.attribute("alpha", 0.01)),
    "ThresholdedRelu": lambda b: (b.x - b.view.attribute("alpha", 1.0)).positive(),
    "Elu": lambda b: exponential(b.x, b.view.attribute("alpha", 1.0)),
    "Selu": lambda b: (
        b.view.attribute("gamma", 1.05070102214813232421875)
        * exponential(b.x, b.view.attribute("alpha", 1.67326319217681884765625))
    ),
    "Celu": lambda b: (b.x / b.view.attribute("alpha", 1.0)).of("Min", 0.0).of("Exp"),
    "Sigmoid": lambda b: b.y * (1.0 - b.y),
    "HardSigmoid": lambda b: b.view.attribute("alpha", 0.2) * inside(b.y),
    "Gelu": lambda b: gelu(b.x) if b.view.attribute("approximate", "none") == "none" else tanh_gelu(b.x),
    "HardSwish": lambda b: (s := b.x.of("HardSigmoid", alpha=1 / 6, beta=0.5)) + b.x * inside(s) / 6.0,
    "Swish": lambda b: swish(b.x, b.y, b.view.attribute("alpha", 1.0)),
    "Mish": lambda b: mish(b.x),
    "Tanh": lambda b: 1.0 - b.y * b.y,
    "Softplus": lambda b: b.x.of("Sigmoid"),
    "Softsign": lambda b: (s := 1.0 - b.y.of("Abs")) * s,
    "Erf": lambda b: (math.log(2.0 / math.sqrt(math.pi)) - b.x * b.x).of("Exp"),
    "Exp": lambda b: b.y,
    "Log": lambda b: 1.0 / b.x,
    "Sqrt": lambda b: 0.5 / b.y,
    "Abs": lambda b: b.x.of("Sign"),
    "Reciprocal": lambda b: -(b.y * b.y),
    "Sin": lambda b: b.x.of("Cos"),
    "Cos": lambda b: -b.x.of("Sin"),
    "Tan": lambda b: 1.0 + b.y * b.y,
    "Asin": lambda b: 1.0 / (1.0 - b.x * b.x).of("Sqrt"),
    "Acos": lambda b: -1.0 / (1.0 - b.x * b.x).of("Sqrt"),
    "Atan": lambda b: 1.0 / (1.0 + b.x * b.x),
    "Sinh": lambda b: b.x.of("Cosh"),
    "Cosh": lambda b: b.x.of("Sinh"),
    "Asinh": lambda b: 1.0 / (1.0 + b.x * b.x).of("Sqrt"),
    "Acosh": lambda b: 1.0 / (b.x * b.x - 1.0).of("Sqrt"),
    "Atanh": lambda b: 1.0 / (1.0 - b.x * b.x),
}
"""Derivative by operator, where it acts element by element."""


def clip_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """1 where the value stays what it is, the bounds included."""
    if b.wanted != {0}:
        return "computes its bounds"
    return {0: b.op("Mul", b.gradient, b.number(b.equal(b.input(0), b.output())))}


def cast_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """Between floats the gradient, which has one type everywhere; through integers nothing."""
    return through(b) if ir.DataType(b.view.attribute("to", 0)) in FLOATS else {}


def dropout_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The gradient."""
    refused = dropout(b.view)
    return refused if isinstance(refused, str) else through(b)


def addition_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The gradient, to every operand."""
    return {operand: b.unbroadcast(b.gradient, operand) for operand in b.wanted}


def mean_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The gradient, shared equally."""
    share = b.op("Mul", b.gradient, b.scalar(1.0 / len(b.view.node.inputs)))
    return {operand: b.unbroadcast(share, operand) for operand in b.wanted}


def pow_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """``p x^(p-1)``, and ``y log x`` for a computed exponent."""
    given = b.view.constant(1)
    p = Term(b, b.number(b.input(1)) if given is None else b.build.constant(given, b.dtype))
    found = {}
    if 0 in b.wanted:
        square = given is not None and bool(np.all(given == 2))
        found[0] = b.unbroadcast((b.g * (p * (b.x if square else b.x.of("Pow", p - 1.0)))).value, 0)
    if 1 in b.wanted:
        zero = b.scalar(0.0)
        change = b.op("Where", b.equal(b.output(), zero), zero, (b.y * b.x.of("Log")).value)
        found[1] = b.unbroadcast(b.op("Mul", b.gradient, change), 1)
    return found


def extreme(beyond: str) -> Reverse:
    """Rule of Max and Min: the first operand that is not `beyond` the output gets the gradient."""

    def rule(b: Backward) -> Mapping[int, ir.Value]:
        found, earlier = {}, None
        for operand in range(max(b.wanted) + 1):
            missed = b.op(beyond, b.input(operand), b.output())
            missed_all = missed if earlier is None else b.op("And", earlier, missed)
            if operand in b.wanted:
                chosen = b.op("Not", missed) if earlier is None else b.op("Xor", earlier, missed_all)
                found[operand] = b.unbroadcast(b.op("Mul", b.gradient, b.number(chosen)), operand)
            earlier = missed_all
        return found

    return rule


def where_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The gradient, to the operand that was chosen."""
    chosen = {1: b.input(0), 2: b.op("Not", b.input(0))}
    return {i: b.unbroadcast(b.op("Mul", b.gradient, b.number(chosen[i])), i) for i in b.wanted if i in chosen}


_STEPS = "Sign Floor Ceil Round"
_COMPARISONS = "Not And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual IsNaN IsInf"

ROWS = (
    *(Operator(name, unary, reverse=slope(formula)) for name, formula in SLOPES.items()),
    *(Operator(name, unary, reverse=nothing) for name in _STEPS.split()),
    *(Operator(name, Barrier("compares values"), reverse=nothing) for name in _COMPARISONS.split()),
    Operator("Neg", unary, reverse=lambda b: {0: b.op("Neg", b.gradient)}),
    Operator("Clip", unary, reverse=clip_reverse),
    Operator("Cast", unary, reverse=cast_reverse),
    Operator("Identity", unary, reverse=through),
    Operator("Dropout", dropout, reverse=dropout_reverse),
    *(Operator(name, addition, reverse=addition_reverse) for name in ("Add", "Sum")),
    Operator("Mean", elementwise, reverse=mean_reverse),
    Operator("Sub", addition, reverse=gradients(lambda b: b.g, lambda b: -b.g)),
    Operator("Mul", product, reverse=gradients(lambda b: b.g * b.of(1), lambda b: b.g * b.x)),
    Operator("Div", quotient, reverse=gradients(lambda b: b.g / b.of(1), lambda b: -(b.g * b.y / b.of(1)))),
    Operator(
        "PRelu", elementwise, reverse=gradients(lambda b: b.g * bend(b.x, b.of(1)), lambda b: b.g * b.x.of("Min", 0.0))
    ),
    Operator("Pow", elementwise, reverse=pow_reverse),
    Operator("Max", elementwise, reverse=extreme("Less")),
    Operator("Min", elementwise, reverse=extreme("Greater")),
    Operator("Where", elementwise, reverse=where_reverse),
    # do(unit := value), written into a graph by passes/replace.py; never leaves the compiler.
    Operator("Replace", unary, domain=DIALECT),
    Operator("Carry", carry, domain=DIALECT),
)
