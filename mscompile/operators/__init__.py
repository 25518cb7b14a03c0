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

Beside its declaration stands the operator's reverse-mode rule, which says how gradients come back through it (`backward`).
A row with a rule and no declaration is a `Barrier`: channels end there, gradients pass.

Passes and analyses ask for links, never for operator names. To add an operator, add a row to `OPERATORS`, and example
nodes to ``tests/test_operators.py``, where one law per kind is checked by running the operator, and to
``tests/test_reverse.py``, where rules are compared with finite differences.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mscompile.operators import attention, elementwise, microsoft, movement, neighbours, positions, products, selection
from mscompile.operators.axes import (
    DIALECT,
    OUT,
    Barrier,
    Declaration,
    Dim,
    IntArray,
    Linear,
    Move,
    NodeView,
    Operator,
    Pick,
    Port,
    Regroup,
    Shape,
    Signature,
    Size,
    is_parameter,
)

__all__ = [
    "DIALECT",
    "OPERATORS",
    "OUT",
    "Barrier",
    "Declaration",
    "Dim",
    "IntArray",
    "Linear",
    "Move",
    "NodeView",
    "Operator",
    "Pick",
    "Port",
    "Regroup",
    "Shape",
    "Signature",
    "Size",
    "declared",
    "is_parameter",
    "signature",
]

_FAMILIES = (elementwise, products, positions, movement, selection, attention, microsoft, neighbours)
OPERATORS: Mapping[tuple[str, str], Operator] = {(row.domain, row.name): row for module in _FAMILIES for row in module.ROWS}


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
