"""Reading a graph as a structural causal model: its units, where they are read, and which may be removed.

A *unit* is a class of indices that live and die together: index j of a created axis, and every index that operators link
or move it to. Axes that share units form a *group* (one retained set); a *site* is a tensor and channel axis that operators
with a weight read, and its *readers* are those operators. The reading is one forward walk over the axis signatures of
`mscompile.operators` (see `mscompile.network.flow`); it is linear in the graph and in the number of channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.network.findings import Creator, Refusal, Slot, captured, label
from mscompile.network.flow import visit
from mscompile.network.sites import Pairing, Reader, Site
from mscompile.network.tracing import sites_of
from mscompile.network.units import Axes, Block, Labels, along, even
from mscompile.network.walk import Walk
from mscompile.operators import Dim, IntArray, Shape, Signature, declared, is_parameter

__all__ = [
    "Creator",
    "Pairing",
    "Reader",
    "Refusal",
    "Scm",
    "Site",
    "Slot",
    "captured",
    "infer_shapes",
    "label",
    "parameters",
    "read_scm",
    "size_of",
]


@dataclass(frozen=True)
class Scm:
    """A graph read as a structural causal model.

    Attributes
    ----------
    model
        The graph. It is only read.
    shapes
        Shape of every tensor as far as inference knows it.
    sites
        In topological order of their tensors.
    creators, slots
        Where units begin, and every parameter axis that follows them.
    labels
        Units on the axes of each computed tensor.
    blocks
        Rows of units, as many of which must stay in every row.
    signatures
        Axis signature, or reason for a barrier, of each node.
    frozen
        Units that must stay, with the reason.
    undivided
        Units that are whole rows, as heads whose queries and keys are rotated, with the reason why no part of them can go.
    samples_met
        Whether samples seem to be on two axes of one tensor, as they would where they are taken for positions.
    """

    model: ir.Model
    shapes: Mapping[str, Shape]
    sites: tuple[Site, ...]
    creators: tuple[Creator, ...]
    slots: tuple[Slot, ...]
    labels: Mapping[str, Labels]
    blocks: tuple[Block, ...]
    signatures: Mapping[ir.Node, Signature | str]
    frozen: Mapping[int, Refusal]
    undivided: Mapping[int, Refusal] = field(default_factory=dict)
    samples_met: bool = False

    def site(self, tensor: str) -> Site:
        """Site of that tensor name; KeyError if there is none."""
        for site in self.sites:
            if site.tensor == tensor:
                return site
        raise KeyError(tensor)

    def units_on(self, tensor: str, axis: int) -> IntArray | None:
        """Units along an axis, of the first row where there are several; None where it carries none."""
        return along(self.labels.get(tensor, {}), axis)

    def removable(self, dead: Set[int], axes: Sequence[IntArray] | None = None) -> IntArray:
        """Of units that nothing reads, those that can go: rows stay equally large, and of a whole axis one unit stays.

        Heads go with the last of their units that anything reads. `axes` are units by axis, all there are if not given.
        """
        if axes is None:
            axes = [units for labels in self.labels.values() for units in labels.values()]
        dead = {*dead}
        while True:
            gone = dead - self._all_heads  # these go with all that they hold
            if dead & self._in_blocks:
                heads = self._heads_gone(dead)
                gone = gone.union(*heads.values())
                left = np.array(sorted(self._in_blocks - gone), dtype=np.int64)
                gone -= {*even(left, self.blocks, (), heads.keys()).tolist()}
                gone |= heads.keys()
            kept = {
                int(units.flat[0]) for units in axes if units.flat[0] in gone and gone.issuperset(units.ravel().tolist())
            }
            if not kept & dead:  # else what stays may bring others back
                return np.array(sorted(gone - kept), dtype=np.int64)
            dead -= kept

    def _heads_gone(self, dead: Set[int]) -> dict[int, set[int]]:
        """Heads that go with `dead` units, and all units they hold: nothing is read of them, and nothing else needs them."""
        met = ((head, units, units & self._read) for head, units in self.heads.items() if not dead.isdisjoint(units))
        return {head: units for head, units, read in met if read and read <= dead}

    @cached_property
    def heads(self) -> dict[int, set[int]]:
        """Heads that may go, and all units they hold, themselves among them where they are units."""
        rows: dict[int, set[int]] = {}
        for block in self.blocks:
            for head, units in zip(block.heads.tolist(), block.units.tolist(), strict=True):
                if head >= 0:
                    rows.setdefault(head, {head}).update(units)
        return {head: units for head, units in rows.items() if not units & self.frozen.keys()}

    @cached_property
    def _all_heads(self) -> frozenset[int]:
        return frozenset(head for block in self.blocks for head in block.heads.tolist())

    @cached_property
    def _in_blocks(self) -> frozenset[int]:
        return self._all_heads.union(*(row for block in self.blocks for row in block.rows))

    @cached_property
    def _read(self) -> frozenset[int]:
        """Units that anything reads."""
        return frozenset(unit for site in self.sites if site.readers for unit in site.units.tolist())

    def creators_of(self, units: IntArray) -> tuple[Creator, ...]:
        """Creators that share a unit with `units`."""
        return tuple(c for c in self.creators if np.isin(c.units, units).any())


def infer_shapes(
    model: ir.Model, bound: Mapping[str, tuple[int, ...]] | None = None, known: Mapping[str, Shape] | None = None
) -> dict[str, Shape]:
    """Shape of every tensor of the main graph, by onnx shape inference on a copy.

    Parameters
    ----------
    model
        Left as it is.
    bound
        Concrete shapes of graph inputs; with them every inferable dimension comes out as a number.
    known
        Shapes of other tensors that come with those.
    """
    copy = model.clone()
    _shape_like(copy.graph)
    stated = {v.name or "": v.shape for v in copy.graph.outputs if v.producer() is not None and v.shape is not None}
    for value in copy.graph.outputs:
        if value.producer() is not None:
            value.shape = None  # what a file says of its outputs may be wrong, and would stop inference
    if bound is not None:
        stored = {id(v) for v in copy.graph.initializers.values()}
        kept = {id(v) for v in copy.graph.inputs} | stored
        for value in _values(copy.graph):
            if id(value) not in kept:
                value.shape = None
        given = {**(known or {}), **bound}
        for value in _values(copy.graph):
            if value.name in given and id(value) not in stored:
                value.shape = ir.Shape(given[value.name])
    copy = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy).model
    shapes: dict[str, Shape] = {}
    for value in _values(copy.graph):
        shape = value.shape if value.const_value is None else value.const_value.shape
        if value.name and shape is not None:
            shapes[value.name] = tuple(size_of(d) for d in shape)
    for name, declared_shape in stated.items() if bound is None else ():
        dims = tuple(size_of(d) for d in declared_shape)
        found = shapes.get(name, dims)
        if len(found) == len(dims):
            found = tuple(own if isinstance(own, int) else said for own, said in zip(found, dims, strict=True))
        shapes[name] = found
    return shapes


EINSUM = 12
"""Opset that Einsum came with."""


def _shape_like(graph: ir.Graph) -> None:
    """Put nodes that onnx knows the shapes of in place of those that the table says are alike in this."""
    graph.opset_imports.setdefault("", EINSUM)  # which models of other domains alone need not import
    for node in list(graph):
        row = declared(node)
        like = None if row is None else row.like(node) if callable(row.like) else row.like
        if like is None or (isinstance(like, str) and graph.opset_imports.get("", 1) < EINSUM):
            continue
        if isinstance(like, int):
            like = [ir.node("Identity", [node.inputs[like]])]
        elif isinstance(like, str):
            like = [ir.node("Einsum", node.inputs[: like.count(",") + 1], {"equation": like})]
        for old, stand_in in zip(node.outputs, like, strict=False):
            new, name = stand_in.outputs[0], old.name
            new.shape, new.type, old.name, new.name = old.shape, old.type, f"{name}.unknown", name
            graph.insert_before(node, stand_in)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def size_of(dim: int | ir.SymbolicDimProtocol) -> Dim:
    """A dimension as a number or name; some exporters write -1 where it is free."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def read_scm(model: ir.Model) -> Scm:
    """Read a canonical model (nodes sorted, weights in initializers) as a structural causal model."""
    shapes = infer_shapes(model)
    whole: dict[ir.Value, Refusal] = {}
    refused: dict[ir.Node, Refusal] = {}
    apart: set[ir.Value] = set()
    while True:  # until it is known of which rows no part can go, and what goes with heads
        walk = Walk(shapes, model.graph.opset_imports.get("", 1), whole=whole, refused=refused, apart=apart)
        walk.samples.begin(model.graph.inputs)
        for node in model.graph:
            visit(walk, node)
        for value in model.graph.outputs:
            walk.freeze_value(value, Refusal(value.name or "?", "", "is a model output"))
        sites = sites_of(walk)  # may freeze what nothing can be folded into
        read = walk.read_apart()
        if not walk.divided and not read:
            break
        whole |= walk.divided
        apart |= read
        refused = walk.refused
    root = walk.sets.roots()
    frozen: dict[int, Refusal] = {}
    for unit, refusal in walk.frozen.items():
        frozen.setdefault(int(root[unit]), refusal)
    for rows, refusal in walk.rows:
        for unit in _alone(root[rows]):
            frozen.setdefault(int(unit), refusal)
    labels: dict[str, dict[Axes, IntArray]] = {}
    for value, found in (*walk.labels.items(), *walk.heads.items()):
        labels.setdefault(value.name or "", {}).update({axes: root[units] for axes, units in found.items()})
    blocks = {}
    for block in walk.blocks:
        rooted = Block(root[block.units], np.where(block.heads < 0, -1, root[block.heads]), block.multiple)
        blocks[rooted.units.tobytes() + rooted.heads.tobytes(), rooted.multiple] = rooted
    staying = _sharing([*blocks.values()])
    blocks = {key: replace(b, heads=np.where(np.isin(b.heads, staying), -1, b.heads)) for key, b in blocks.items()}
    slots = tuple(_rooted(slot, root) for slot in walk.slots)
    slots += tuple(
        Slot(slot.node, slot.operand, slot.axis, alone)
        for slot in walk.row_slots
        if len(alone := _alone(root[slot.units])) == len(slot.units)
    )
    creators = tuple(
        Creator(c.node, tuple(_rooted(slot, root) for slot in c.slots), c.axis, root[c.units]) for c in walk.creators
    )
    every = [*(units for found in labels.values() for units in found.values()), *(block.units for block in blocks.values())]
    return Scm(
        model,
        shapes,
        tuple(sites(root, frozen, every)),
        creators,
        slots,
        labels,
        tuple(block for block in blocks.values() if _binds(block)),
        walk.signatures,
        frozen,
        {int(unit): refusal for units, refusal in reversed(walk.undivided) for unit in root[units]},
        walk.samples.met,
    )


def _alone(rows: IntArray) -> IntArray:
    """Units that fill a whole row, in order."""
    one: IntArray = rows[(rows == rows[:, :1]).all(axis=1), 0]
    return one


def _sharing(blocks: Sequence[Block]) -> list[int]:
    """Heads some unit of which is another head's as well, as of keys that all heads share: none of them can go alone."""
    holders: dict[int, set[int]] = {}
    for block in blocks:
        for head, units in zip(block.heads.tolist(), block.units.tolist(), strict=True):
            for unit in units:
                holders.setdefault(unit, set()).add(head)
    return sorted({head for heads in holders.values() if len(heads - {-1}) > 1 for head in heads} - {-1})


def _binds(block: Block) -> bool:
    """Whether a block says more than that rows of one unit each, or rows of the same units, are equally large."""
    return (
        block.multiple > 1
        or bool((block.heads >= 0).any())
        or (len(_alone(block.units)) < len(block.units) and not np.all(block.units == block.units[:1]))
    )


def _rooted(slot: Slot, root: IntArray) -> Slot:
    return Slot(slot.node, slot.operand, slot.axis, root[slot.units])


def parameters(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers that no caller can override."""
    return (v for v in model.graph.initializers.values() if is_parameter(v))
