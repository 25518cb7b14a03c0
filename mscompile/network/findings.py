"""What the walk over a graph finds: where units begin, are read and meet, and why some must stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mscompile.operators import IntArray, Signature


@dataclass(frozen=True)
class Refusal:
    """Why something is left alone: the node, its operator, and the reason as a clause after the node's name."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node!r} {self.reason}" if self.operator else f"{self.node!r} {self.reason}"


@dataclass(frozen=True)
class Slot:
    """A parameter axis that carries units: axis `axis` of operand `operand` of a node; `units[i]` is index i's unit.

    Units [blocks, n] belong to a parameter whose axis 0 falls into as many blocks, each with n units of its own on `axis`.
    """

    node: ir.Node
    operand: int
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Creator:
    """A node at whose output units begin: its weight (and bias) slots and the output axis they label."""

    node: ir.Node
    slots: tuple[Slot, ...]
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Read:
    """A contraction with a weight met on the walk: the units, one by one, along the data's and the weight's axis."""

    node: ir.Node
    signature: Signature
    data_axis: int
    weight_axis: int
    units: IntArray
    plain: bool
    """Whether the units stand on that one axis alone, all of them different tensors' channels."""


@dataclass(frozen=True)
class Meeting:
    """A contraction of two computed tensors, as of queries and keys: units by operand, in step, and the axes they are on."""

    node: ir.Node
    signature: Signature
    units: tuple[IntArray, IntArray]
    contracted: tuple[int, int]
    row: int
    """Units in a row: those of one head."""


def label(node: ir.Node) -> str:
    """A node's name, or that of its first output where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), "") or "?"


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of a node take in, from wherever they come; most nodes have none."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs: Sequence[ir.Graph] = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        else:
            continue
        for graph in graphs:
            yield from graph.outputs
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (v for v in inner.inputs if v is not None)
