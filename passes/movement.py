"""Chains of movement: what exporters write as Reshape, Transpose, Reshape, … becomes one Reshape and one Transpose at most.

Each axis is followed as a product of factors through the chain. Where heads are merged with the samples and parted again on
the way, the short form shows that nothing but the heads' own axis was ever split. The same elements come to the same places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import infer_shapes
from mscompile.operators import Dim, Shape
from mscompile.passes.readers import add_parameter, name_outputs

MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")


@dataclass(eq=False)
class Factor:
    """Part of a source axis; parts of parts replace it."""

    size: Dim
    parts: list[Factor] = field(default_factory=list)

    def leaves(self) -> list[Factor]:
        """The factors it consists of."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]


@dataclass(frozen=True)
class ShortenMovement(ir.passes.InPlacePass):
    """Replace chains of movement by shorter ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        nodes = [n for n in model.graph if n.op_type in MOVING and n.domain in ("", "ai.onnx")]
        if len(nodes) < 3:
            return ir.passes.PassResult(model, False)
        shapes, modified = infer_shapes(model), False
        for node in nodes:
            if node.graph is not None and not _goes_on(node.outputs[0]):
                modified |= _shorten(model.graph, chain_to(node), shapes)
        return ir.passes.PassResult(model, modified)


def _goes_on(value: ir.Value) -> bool:
    """Whether all that happens to a value is to be moved, once."""
    uses = list(value.uses())
    return len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_type in MOVING and uses[0].idx == 0


def chain_to(end: ir.Node) -> list[ir.Node]:
    """The movement that leads to a node, each of which does all that happens to what the one before it gives."""
    chain = [end]
    while (source := chain[0].inputs[0]) is not None and (node := source.producer()) is not None:
        if node.op_type not in MOVING or node.domain not in ("", "ai.onnx") or not _goes_on(source):
            break
        chain.insert(0, node)
    return chain


def _shorten(graph: ir.Graph, chain: Sequence[ir.Node], shapes: Mapping[str, Shape]) -> bool:
    source, end = chain[0].inputs[0], chain[-1].outputs[0]
    start = None if source is None else shapes.get(source.name or "")
    if source is None or start is None or len(chain) < 3:
        return False
    axes = [Factor(dim) for dim in start]
    layout = layout_behind(chain, axes, shapes)
    if layout is None:
        return False
    leaves = [leaf for axis in axes for leaf in axis.leaves()]
    wanted = [leaf for axis in layout for factor in axis for leaf in factor.leaves()]
    # Factors of size 1 come and go, and stand nowhere.
    leaves = [leaf for leaf in leaves if leaf.size != 1]
    order = [leaves.index(leaf) for leaf in wanted if leaf.size != 1]
    split = _stated([leaf.size for leaf in leaves], start)
    merged = _stated([_product(axis) for axis in layout], tuple(leaves[i].size for i in order))
    if split is None or merged is None or len(order) != len(leaves):
        return False
    apart = [leaf.size for leaf in leaves] != list(start)
    turned = order != sorted(order)
    together = [leaves[i].size for i in order] != [_product(axis) for axis in layout]
    if apart + turned + together >= len(chain):
        return False
    tape, value = ir.tape.Tape(), source
    if apart:
        value = tape.op("Reshape", [value, add_parameter(graph, f"{end.name}.apart", np.array(split, dtype=np.int64))])
    if turned:
        value = tape.op("Transpose", [value], {"perm": order})
    if together:
        value = tape.op("Reshape", [value, add_parameter(graph, f"{end.name}.together", np.array(merged, dtype=np.int64))])
    if value is source:
        return False
    name_outputs(graph, tape.nodes, end.name or "moved")
    graph.insert_before(chain[-1], tape.nodes)
    name, end.name = end.name, None
    value.shape, value.type = end.shape, end.type
    ir.convenience.replace_all_uses_with(end, value, replace_graph_outputs=True)
    value.name = name
    for node in reversed(chain):
        graph.remove(node, safe=True)
    return True


def layout_behind(
    chain: Sequence[ir.Node], axes: Sequence[Factor], shapes: Mapping[str, Shape]
) -> list[list[Factor]] | None:
    """The factors that each axis behind a chain consists of, from those before it; None where they cannot be followed."""
    layout = [[axis] for axis in axes]
    for node in chain:
        moved = _moved(node, layout, shapes)
        if moved is None:
            return None
        layout = moved
    return layout


def _product(factors: Sequence[Factor]) -> Dim:
    sizes = [leaf.size for factor in factors for leaf in factor.leaves() if leaf.size != 1]
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes)  # type: ignore[arg-type]
    return sizes[0] if len(sizes) == 1 else None


def _stated(sizes: Sequence[Dim], source: Shape) -> list[int] | None:
    """Target of a Reshape: 0 where the source has the same size at the same place, −1 for one size that is not known."""
    target = [
        size if isinstance(size, int) else 0 if place < len(source) and size is not None and size == source[place] else -1
        for place, size in enumerate(sizes)
    ]
    return None if target.count(-1) > 1 else target


def _moved(node: ir.Node, layout: list[list[Factor]], shapes: Mapping[str, Shape]) -> list[list[Factor]] | None:
    """The layout behind one node."""
    target = shapes.get(node.outputs[0].name or "")
    if target is None:
        return None
    if node.op_type == "Transpose":
        rank = len(layout)
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else tuple(reversed(range(rank)))
        return [layout[axis] for axis in perm]
    factors = [leaf for axis in layout for factor in axis for leaf in factor.leaves() if leaf.size != 1]
    wide = [place for place, size in enumerate(target) if size != 1]
    found: dict[int, list[Factor]] = {place: [] for place in range(len(target))}
    while wide and (taken := _take(factors, target[wide[-1]], last=True)) is not None:
        found[wide.pop()] = taken
    while len(wide) > 1 and (taken := _take(factors, target[wide[0]], last=False)) is not None:
        found[wide.pop(0)] = taken
    if len(wide) > 1 or (factors and not wide):
        return None
    if wide:
        found[wide[0]] = list(factors)
    return [found[place] for place in range(len(target))]


def _take(factors: list[Factor], size: Dim, *, last: bool) -> list[Factor] | None:
    """Take factors of that product from one end, splitting one if need be; None, and nothing taken, if there are none."""
    if not isinstance(size, int):
        if size is None or not factors or factors[-1 if last else 0].size != size:
            return None
        return [factors.pop(-1 if last else 0)]
    rest, taken, ends = size, 0, factors[::-1] if last else factors
    for factor in itertools.chain(ends):
        if rest == 1:
            break
        if not isinstance(factor.size, int) or (rest % factor.size and factor.size % rest):
            return None
        taken += 1
        if factor.size > rest:
            inner = Factor(rest)
            outer = Factor(factor.size // rest)
            factor.parts = [outer, inner] if last else [inner, outer]
            place = factors.index(factor)
            factors[place : place + 1] = factor.parts
            rest = 1
            break
        rest //= factor.size
    if rest != 1:
        return None
    cut = factors[len(factors) - taken :] if last else factors[:taken]
    del factors[len(factors) - taken if last else 0 : len(factors) if last else taken]
    return cut
