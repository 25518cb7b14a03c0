"""Remove units that nothing reads, everywhere they appear.

A unit is dead where every weight column that meets it is zero. Its rows, filters, biases and per-channel parameters go;
target shapes and channel counts follow. By itself this preserves the function exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Scm, Slot, read_scm
from mscompile.network.units import alive, width
from mscompile.operators import DIALECT, IntArray, Signature
from mscompile.passes.readers import add_parameter, array_of, new_weight, owned


@dataclass(frozen=True)
class RemoveDeadUnits(ir.passes.InPlacePass):
    """Remove dead units.

    Attributes
    ----------
    tensors
        Only units of the sites at these tensors; of all sites if None.
    alignment
        Filled by the run: for each narrowed site, the original channel of each channel left.
    """

    tensors: frozenset[str] | None = None
    alignment: dict[str, IntArray] = field(default_factory=dict)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        scm = read_scm(model)
        dead = dead_units(scm, self.tensors)
        if not len(dead):
            return ir.passes.PassResult(model, False)
        _slice_parameters(model.graph, scm, dead)
        _follow_sizes(model.graph, scm, dead)
        values = {v.name: v for node in model.graph for v in node.outputs}
        for name, labels in scm.labels.items():
            value = values[name]
            if value.shape is not None and any(np.isin(units, dead).any() for units in labels.values()):
                widths = {axis: width(labels, axis, dead) for axes in labels for axis in axes}
                value.shape = ir.Shape([d if (w := widths.get(a)) is None else w for a, d in enumerate(value.shape)])
        for site in scm.sites:
            left = np.flatnonzero(~np.isin(site.units, dead))
            if len(left) < site.size:
                self.alignment[site.tensor] = left
        return ir.passes.PassResult(model, True)


def unread_units(scm: Scm) -> IntArray:
    """Units that may go and that every reader meets with zeros."""
    read: set[int] = set()
    every: set[int] = set()
    for site in scm.sites:
        every.update(site.units.tolist())
        for reader in site.readers:
            weight = reader.rows(array_of(reader.weight))
            read.update(reader.units[weight.reshape(len(weight), -1).any(axis=1)].tolist())
        for pairing in site.pairings:  # a pair whose query is zero adds nothing to any score
            for slot, index in zip(pairing.slots, pairing.index, strict=True):
                rows = np.moveaxis(array_of(slot.node.inputs[slot.operand]), slot.axis, 0)
                read.update(site.units[index[rows.reshape(len(rows), -1).any(axis=1) & (index >= 0)]].tolist())
    for node in scm.model.graph:
        if node.domain == DIALECT and node.op_type == "Replace":  # reads retained units on behalf of the others
            seen = scm.units_on(node.outputs[0].name or "", node.attributes["axis"].as_int())
            read.update(() if seen is None else seen.tolist())
    return np.array(sorted(every - read - set(scm.frozen)), dtype=np.int64)


def dead_units(scm: Scm, tensors: Iterable[str] | None = None) -> IntArray:
    """Unread units of the sites at `tensors`, or of all; of a whole axis of dead units one stays."""
    dead = set(unread_units(scm).tolist())
    if tensors is not None:
        dead &= {unit for site in scm.sites if site.tensor in set(tensors) for unit in site.units.tolist()}
    for node in scm.model.graph:
        if node.domain == DIALECT:  # holds channel numbers, or counts channels, and would have to follow
            for units in scm.labels.get(node.outputs[0].name or "", {}).values():
                dead -= set(units.ravel().tolist())
    return scm.removable(dead)


def _slice_parameters(graph: ir.Graph, scm: Scm, dead: IntArray) -> None:
    cuts: dict[tuple[ir.Node, int], dict[int, IntArray]] = {}
    blocked: dict[tuple[ir.Node, int], Slot] = {}
    for slot in scm.slots:
        if slot.units.ndim > 1:
            if np.isin(slot.units, dead).any():
                blocked[slot.node, slot.operand] = slot
                cuts.setdefault((slot.node, slot.operand), {})
            continue
        left = np.flatnonzero(~np.isin(slot.units, dead))
        if len(left) < len(slot.units):
            cuts.setdefault((slot.node, slot.operand), {})[slot.axis] = left
    shared: dict[tuple[ir.Value, tuple[tuple[int, bytes], ...]], ir.Value] = {}
    uses_left = {value: len(value.uses()) for value in graph.initializers.values()}
    for (node, operand), axes in cuts.items():
        value = node.inputs[operand]
        assert value is not None
        assert value.const_value is not None
        key = (value, tuple((axis, left.tobytes()) for axis, left in sorted(axes.items())))
        if (node, operand) in blocked:
            array = _take_by_block(array_of(value), blocked[node, operand], axes, dead)
            owned(graph, node, operand, array)
            continue
        if key not in shared:
            array = array_of(value)
            for axis, left in axes.items():
                array = np.take(array, left, axis=axis)
            dtype = value.const_value.dtype
            same = [k for k in cuts if k[0].inputs[k[1]] is value]
            alone = len(same) == uses_left[value] and not value.is_graph_output()
            if alone and all(_equal(cuts[k], axes) for k in same):
                value.const_value = new_weight(graph, array, dtype, value.name)
                value.shape = ir.Shape(array.shape)
                shared[key] = value
            else:
                shared[key] = add_parameter(graph, value.name or "weight", array, dtype)
        if shared[key] is not value:
            node.replace_input_with(operand, shared[key])


def _equal(one: dict[int, IntArray], other: dict[int, IntArray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[axis], other[axis]) for axis in one)


def _take_by_block(array: np.ndarray, slot: Slot, axes: dict[int, IntArray], dead: IntArray) -> np.ndarray:
    """Cut a parameter each of whose blocks of rows has units of its own on another axis; rows are cut as `axes` says."""
    blocks = np.split(np.arange(array.shape[0]), len(slot.units))
    kept = axes.get(0, np.arange(array.shape[0]))
    parts = [
        np.take(array[np.intersect1d(rows, kept)], np.flatnonzero(~np.isin(units, dead)), axis=slot.axis)
        for rows, units in zip(blocks, slot.units, strict=True)
    ]
    return np.concatenate(parts)


def _follow_sizes(graph: ir.Graph, scm: Scm, dead: IntArray) -> None:
    for node in graph:
        found = scm.signatures[node]
        if not isinstance(found, Signature):
            continue
        held: dict[int | str, np.ndarray] = {}
        for size in found.sizes:
            operand, axis = size.port
            value = node.inputs[operand] if operand >= 0 else node.outputs[~operand]
            labels = {} if value is None else scm.labels.get(value.name or "", {})
            left = alive(labels, axis, dead)
            if left is None or not any(np.isin(u, dead).any() for axes, u in labels.items() if axis in axes):
                continue
            if size.holder not in held:
                held[size.holder] = _numbers(node, size.holder)
            numbers = held[size.holder]
            if size.meaning == "width":
                numbers[size.position if size.position is not None else ...] = left.sum() // size.share
            elif size.meaning == "bound":
                first, _, _ = slice(int(numbers[size.position]), None).indices(len(left))
                numbers[size.position] = left[:first].sum()
            else:
                numbers = numbers % len(left)
                held[size.holder] = (np.cumsum(left) - 1)[numbers[left[numbers]]]
        for holder, numbers in held.items():
            if isinstance(holder, int):
                owned(graph, node, holder, numbers)
            else:
                stored = node.attributes[holder]
                many = stored.type == ir.AttributeType.INTS
                node.attributes.add(
                    ir.AttrInt64s(holder, numbers.tolist()) if many else ir.AttrInt64(holder, int(numbers[0]))
                )


def _numbers(node: ir.Node, holder: int | str) -> np.ndarray:
    """The integers that an operand or attribute holds."""
    if isinstance(holder, int):
        return array_of(node.inputs[holder]).copy()
    value = node.attributes[holder].value
    return np.array(value if isinstance(value, list | tuple) else [value], dtype=np.int64)
