"""The footprint: what a run of a graph holds at most, foretold from the shapes of its tensors.

onnxruntime goes through a graph in one order, which the graph determines, and lets go of a tensor once all that read it have
run. So what is held at each step is known without running anything, activations kept for the way back among it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from mscompile.calibration.blocks import BLOCK_BYTES, HELD
from mscompile.network.scm import captured
from mscompile.operators import Shape

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output onnxruntime lays over their input."""
PRODUCTS = frozenset({"MatMul", "FusedMatMul"})
"""Operators that take operands turned round as they are."""
NUMBER_BYTES = 4
"""Of most tensors; larger ones of other types are rare."""
Sizes = Callable[[str], int]
"""Bytes of a tensor by name."""


def footprint(graph: ir.Graph, sizes: Sizes) -> int:
    """Bytes of the tensors that a run of a graph holds at once; weights, inputs and outputs apart."""
    order = list(_order(graph))
    last = {_held_as(value): turn for turn, node in enumerate(order) for value in _read(node)}
    ends: dict[int, list[ir.Value]] = {}
    for value, turn in last.items():
        ends.setdefault(turn, []).append(value)
    returned = {_held_as(value) for value in graph.outputs}
    held, most, known = 0, 0, dict[ir.Value, int]()
    for turn, node in enumerate(order):
        if not _is_view(node):
            known |= {value: 0 if value in returned else sizes(value.name or "") for value in node.outputs}
            held += sum(known[value] for value in node.outputs)
        loops = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        most = max(most, held + HELD * BLOCK_BYTES * loops)
        held -= sum(known.get(value, 0) for value in ends.get(turn, ()))
    return most


def size_of_tensor(shape: Shape) -> int:
    """Bytes of a tensor; 0 where its shape is not known."""
    return NUMBER_BYTES * math.prod(int(d or 0) for d in shape) if all(isinstance(d, int) for d in shape) else 0


def _order(graph: ir.Graph) -> Iterator[ir.Node]:
    """The order in which onnxruntime runs a graph: from what nothing reads, the last first, back to what it takes."""
    numbers = {node: number for number, node in enumerate(graph)}
    open_: list[tuple[ir.Node, bool]] = [(node, False) for node in graph if not any(v.uses() for v in node.outputs)]
    seen: set[ir.Node] = set()
    while open_:
        node, done = open_.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            open_.append((node, True))
            makers = {maker for value in _read(node) if (maker := value.producer()) in numbers and maker is not None}
            open_ += [(maker, False) for maker in sorted(makers - seen, key=numbers.__getitem__)]


def _read(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in (*node.inputs, *captured(node)) if value is not None)


def _is_view(node: ir.Node) -> bool:
    """Whether a node makes nothing new: it names another's memory, or is taken into the products that read it."""
    turned = node.op_type == "Transpose" and all(use.node.op_type in PRODUCTS for use in node.outputs[0].uses())
    return node.op_type in VIEWS or turned


def _held_as(value: ir.Value) -> ir.Value:
    """The tensor whose memory a value lies in."""
    while (node := value.producer()) is not None and _is_view(node) and (source := node.inputs[0]) is not None:
        value = source
    return value
