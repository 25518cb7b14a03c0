"""The forward walk over a graph: which units stand on which axes of every tensor, and where they are read.

Each node's axis signature says where the channels of its inputs go. Labels travel along: an array of units per axis, or per
pair of axes where an axis was split (heads). What a signature does not speak of freezes the units it meets.
"""

from __future__ import annotations

import onnx_ir as ir

from mscompile.network.contraction import Contraction
from mscompile.network.findings import Refusal, captured, label
from mscompile.network.passage import Passage
from mscompile.network.walk import Walk
from mscompile.operators import NodeView, Signature, signature


def visit(walk: Walk, node: ir.Node) -> None:
    """Carry labels over one node."""
    view = NodeView(node, walk.shapes, walk.opset)
    found = signature(view)
    if isinstance(found, Signature) and _says_too_little(node, found):
        found = "has a further output that is used"
    walk.signatures[node] = found
    walk.samples.visit(view, found)
    for value in captured(node):
        walk.freeze_value(value, Refusal(label(node), node.op_type, "uses them inside a subgraph"))
    if isinstance(found, str):
        for operand in view.live:
            walk.freeze_value(node.inputs[operand], Refusal(label(node), node.op_type, found))  # type: ignore[arg-type]
        return
    passage, contraction = Passage(walk, view, found), Contraction(walk, view, found)
    for target, value in enumerate(node.outputs):
        passage.label(~target, value)
    passage.stop_heads()
    contraction.contract()
    contraction.create()
    contraction.constrain()


def _says_too_little(node: ir.Node, found: Signature) -> bool:
    """Whether something uses an output behind the first that the signature does not speak of."""
    spoken_of = {operand for link in found.links for operand, _ in link} | {move.target[0] for move in found.moves}
    return any(
        ~i not in spoken_of and (value.uses() or value.is_graph_output()) for i, value in enumerate(node.outputs) if i > 0
    )
