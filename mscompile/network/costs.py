"""What a network costs at given widths, before it is compiled: parameters, multiply–accumulates, shares of both.

Every parameter axis and every tensor axis that carries units is as wide as the units of it that stay; which stay at a given
width is known from the order in which they go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Scm, Site, infer_shapes, parameters
from mscompile.network.units import Labels, width
from mscompile.operators import IntArray, NodeView, Shape, declared
from mscompile.operators.backward import FLOATS
from mscompile.planning.carrying import Standing, standing, with_carriers
from mscompile.planning.selection import retained_units, without_carriers

Counts = Mapping[int, int]
"""Channels left, by group."""
Term = tuple[object, frozenset[int], Callable[[Counts], float]]
"""A part of the whole cost: its name, the groups that it depends on, and what it costs."""

Axis = tuple[int, bytes, tuple[int, ...], int]
"""What says how wide an axis is: the group of its units, these and their shape, and where among them the axis stands."""


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes
    ----------
    units
        Units by axis.
    folded
        Units whose replacement changes the values of the parameter, so that it is stored apart from other uses.
    """

    units: Mapping[int, IntArray]
    folded: IntArray | None


@dataclass(frozen=True)
class Costs:
    """Costs of a model whose groups are cut in given orders.

    Attributes
    ----------
    orders
        Units by group, first to go first.
    inputs
        Shapes of the model's inputs, axis 0 the samples.
    """

    scm: Scm
    orders: Mapping[int, IntArray]
    inputs: Mapping[str, tuple[int, ...]]
    _axis: dict[tuple[str, int], Axis | None] = field(default_factory=dict, repr=False)
    _cut: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _widths: dict[tuple[Axis, int], int] = field(default_factory=dict, repr=False)
    _dead: dict[tuple[int, int], IntArray] = field(default_factory=dict, repr=False)
    _on: dict[ir.Node, frozenset[int]] = field(default_factory=dict, repr=False)
    _costs: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor for the given inputs, nothing cut."""
        return infer_shapes(self.scm.model, self.inputs)

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Nodes that multiply and accumulate."""
        rows = ((node, declared(node)) for node in self.scm.model.graph)
        return tuple(node for node, row in rows if row is not None and row.macs is not None)

    @cached_property
    def _parameters(self) -> Mapping[int | None, list[Term]]:
        """Elements of every floating-point parameter."""
        tensors = ((value.name or "", value.const_value) for value in parameters(self.scm.model))
        shapes = [(name, t.shape.numpy()) for name, t in tensors if t is not None and t.dtype in FLOATS]
        return _by_group(
            (name, self._groups_on(name), partial(self._elements, name, tuple(map(int, shape)))) for name, shape in shapes
        )

    @cached_property
    def _products(self) -> Mapping[int | None, list[Term]]:
        """Multiply–accumulates of every node."""
        return _by_group((i, self.groups_of(node), partial(self._work, node)) for i, node in enumerate(self.nodes))

    def _groups_on(self, name: str) -> frozenset[int]:
        """Groups whose units stand on any axis of a parameter, at any of its uses."""
        uses = self._uses.get(name, ())
        units = [units for use in uses for units in use.units.values()] + [
            use.folded for use in uses if use.folded is not None
        ]
        return frozenset(group for each in units if (group := self._group(each)) is not None)

    @cached_property
    def _uses(self) -> dict[str, list[Use]]:
        """Every way in which each parameter is used."""
        found: dict[tuple[ir.Node, int], dict[int, IntArray]] = {}
        for slot in self.scm.slots:
            found.setdefault((slot.node, slot.operand), {})[slot.axis] = slot.units
        folded: dict[tuple[ir.Node, int], IntArray] = {}
        for site in self.scm.sites:
            for reader in site.readers:
                linear = reader.signature.linear
                assert linear is not None
                folded |= {(reader.node, o): reader.units for o in (linear.weight, linear.bias) if o is not None}
            folded |= {(slot.node, slot.operand): site.units for pairing in site.pairings for slot in pairing.slots}
        uses: dict[str, list[Use]] = {}
        for value in parameters(self.scm.model):
            for place in dict.fromkeys((node, operand) for node, operand in value.uses()):
                uses.setdefault(value.name or "", []).append(Use(found.get(place, {}), folded.get(place)))
        return uses

    @cached_property
    def _labels(self) -> dict[str, Labels]:
        """Units along the axes of every tensor, parameters included as they are used first."""
        found: dict[str, dict[tuple[int, ...], IntArray]] = {name: dict(labels) for name, labels in self.scm.labels.items()}
        for name, uses in self._uses.items():
            for axis, units in uses[0].units.items():
                found.setdefault(name, {}).setdefault((axis,), units)
        return dict(found)

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {int(unit): group for group, order in self.orders.items() for unit in order.tolist()}

    def _group(self, units: IntArray) -> int | None:
        """The group that units on one axis belong to; not all of them need be read."""
        return next((self._group_of[unit] for unit in units.ravel().tolist() if unit in self._group_of), None)

    def group(self, name: str, axis: int) -> int | None:
        """The group whose units an axis of a tensor carries; None where they stay, or it carries none."""
        found = self._along(name, axis)
        return None if found is None else found[0]

    def _along(self, name: str, axis: int) -> Axis | None:
        """What the width of an axis depends on; None where it is always the same."""
        key = name, axis
        if key not in self._axis:
            axes, units = next(((axes, u) for axes, u in self._labels.get(name, {}).items() if axis in axes), ((), None))
            group = None if units is None else self._group(units)
            self._axis[key] = None
            if units is not None and group is not None:
                self._axis[key] = group, units.tobytes(), units.shape, axes.index(axis)
        return self._axis[key]

    def width(self, name: str, axis: int, full: int, counts: Counts) -> int:
        """Places of an axis at given widths, `full` of them in the whole model."""
        along = self._along(name, axis)
        if along is None or counts.get(along[0], len(self.orders[along[0]])) >= len(self.orders[along[0]]):
            return full
        key = along, counts[along[0]]
        if key not in self._widths:
            left = width(self._labels[name], axis, self._gone(along[0], counts[along[0]]))
            self._widths[key] = full if left is None else left
        return self._widths[key]

    def left(self, group: int, count: int) -> int:
        """Units left of a group that is asked to keep so many: more where rows must stay equally large."""
        return len(self.orders[group]) - len(self._gone(group, count))

    def _gone(self, group: int, count: int) -> IntArray:
        if (group, count) not in self._dead:
            order, sites = self.orders[group], self._sites.get(group, ())
            kept = retained_units(order, count, self.scm.blocks, self.scm.frozen, sites)
            if any(site.border for site in sites) and not self._alike(sites):
                retained = without_carriers(kept, order, self.scm.blocks, sites)
                kept = with_carriers(retained, sites, np.setdiff1d(order, retained), self._standing)
            gone = self._units[group].difference(kept.tolist())
            self._dead[group, count] = self.scm.removable(gone, self._axes.get(group, ()))
        return self._dead[group, count]

    @cached_property
    def _sites(self) -> dict[int, list[Site]]:
        found: dict[int, list[Site]] = {}
        for site in self.scm.sites:
            found.setdefault(site.group, []).append(site)
        return found

    @cached_property
    def _units(self) -> dict[int, frozenset[int]]:
        return {group: frozenset(order.tolist()) for group, order in self.orders.items()}

    def _alike(self, sites: Sequence[Site]) -> bool:
        """Whether it makes no difference to the widths which units of a reader that pads carry constants."""
        padding = [site.units for site in sites if site.border]
        return all(len({self._standing.get(unit) for unit in units.tolist()}) == 1 for units in padding)

    @cached_property
    def _standing(self) -> dict[int, Standing]:
        return standing(self.scm)

    @cached_property
    def _axes(self) -> dict[int, list[IntArray]]:
        """Units on every axis, by group; the same ones once."""
        found: dict[int, dict[bytes, IntArray]] = {}
        for labels in self.scm.labels.values():
            for units in labels.values():
                if (group := self._group(units)) is not None:
                    found.setdefault(group, {})[units.tobytes()] = units.ravel()
        return {group: [*axes.values()] for group, axes in found.items()}

    def shape(self, value: ir.Value, counts: Counts) -> Shape | None:
        """Shape of a tensor at given widths."""
        full = self.shapes.get(value.name or "")
        return None if full is None else self._sized(value.name or "", full, counts)

    def _sized(self, name: str, full: Shape, counts: Counts) -> Shape:
        if name not in self._cut:
            self._cut[name] = [axis for axis, dim in enumerate(full) if isinstance(dim, int) and self._along(name, axis)]
        found = [*full]
        for axis in self._cut[name]:
            found[axis] = self.width(name, axis, full[axis], counts)  # type: ignore[arg-type]
        return tuple(found)

    def view(self, node: ir.Node, counts: Counts) -> NodeView:
        """A node with the shapes of its operands at given widths."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
        found = {v.name: shape for v in values if (shape := self.shape(v, counts)) is not None}
        return NodeView(node, found, self.scm.model.graph.opset_imports.get("", 1))  # type: ignore[arg-type]

    def groups_of(self, node: ir.Node) -> frozenset[int]:
        """Groups that the costs of a node depend on."""
        if node not in self._on:
            values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
            axes = (self.group(v.name or "", a) for v in values for a in range(len(self.shapes.get(v.name or "", ()))))
            self._on[node] = frozenset(group for group in axes if group is not None)
        return self._on[node]

    def params(self, counts: Counts, group: int | None = None) -> float:
        """Elements of floating-point parameters; with `group`, of those alone whose number depends on it."""
        return self._sum(self._parameters.get(group, ()), counts)

    def macs(self, counts: Counts, group: int | None = None) -> float:
        """Multiply–accumulates for `inputs`, of nodes whose shapes are known; `group` as for `params`."""
        return self._sum(self._products.get(group, ()), counts)

    def _sum(self, terms: Iterable[Term], counts: Counts) -> float:
        """Costs that depend on the widths of a few groups each, remembered by these."""
        total = 0.0
        for name, groups, cost in terms:
            key = name, *map(counts.get, groups)
            if key not in self._costs:
                self._costs[key] = cost(counts)
            total += self._costs[key]
        return total

    def _elements(self, name: str, shape: tuple[int, ...], counts: Counts) -> float:
        """Elements of a parameter, and of the copies it falls into where its uses are cut in several ways."""
        uses = self._uses.get(name, [])
        if len(uses) < 2:
            return float(math.prod(self._sized(name, shape, counts)))  # type: ignore[arg-type]
        copies: dict[object, int] = {}
        for number, use in enumerate(uses):
            left = {axis: np.flatnonzero(~np.isin(units, self._gone_at(units, counts))) for axis, units in use.units.items()}
            cut = {axis: places for axis, places in left.items() if len(places) < use.units[axis].size}
            sizes = [len(cut[a]) * d // use.units[a].size if a in cut else d for a, d in enumerate(shape)]
            own = use.folded is not None and len(self._gone_at(use.folded, counts)) > 0
            copies[number if own else tuple((axis, places.tobytes()) for axis, places in sorted(cut.items()))] = math.prod(
                sizes
            )
        return float(sum(copies.values()))

    def _gone_at(self, units: IntArray, counts: Counts) -> IntArray:
        group = self._group(units)
        return np.zeros(0, dtype=np.int64) if group is None or group not in counts else self._gone(group, counts[group])

    def _work(self, node: ir.Node, counts: Counts) -> float:
        row, view = declared(node), self.view(node, counts)
        involved = [view.shape(operand) for operand in (0, 1, ~0)]
        known = all(shape is not None and all(isinstance(d, int) for d in shape) for shape in involved)
        return float(row.macs(view)) if known else 0.0  # type: ignore[union-attr, misc]


def _by_group(terms: Iterable[Term]) -> dict[int | None, list[Term]]:
    """Those that depend on each group; under None all."""
    found: dict[int | None, list[Term]] = {None: [*terms]}
    for term in found[None]:
        for group in term[1]:
            found.setdefault(group, []).append(term)
    return found
