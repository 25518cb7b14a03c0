"""Operators of onnxruntime's own domain, which its optimiser writes in place of standard ones."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mscompile.operators.axes import Barrier, Operator
from mscompile.operators.backward import Backward, Formula, Reverse, Term, slope
from mscompile.operators.elementwise import gelu, swish, tanh_gelu
from mscompile.operators.positions import layer_normalisation_terms

DOMAIN = "com.microsoft"


def biased(b: Backward) -> Term:
    """Input 0 with the bias vector added, if there is one."""
    return b.x if b.view.value(1) is None else b.x + b.of(1)


def only_data(formula: Formula) -> Reverse:
    """Rule of an operator whose other operands are parameters."""
    return lambda b: slope(formula)(b) if b.wanted == {0} else "computes its bias"


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


def _row(name: str, reverse: Reverse) -> Operator:
    return Operator(name, Barrier(f"has no declaration (domain {DOMAIN})"), domain=DOMAIN, reverse=reverse)


ROWS = (
    _row("Gelu", slope(lambda b: gelu(b.x))),
    _row("BiasGelu", only_data(lambda b: gelu(biased(b)))),
    _row("FastGelu", only_data(lambda b: tanh_gelu(biased(b)))),
    _row("QuickGelu", slope(lambda b: swish(b.x, b.y, b.view.attribute("alpha", 1.702)))),
    _row("SkipLayerNormalization", skip_layer_normalisation_reverse),
)
