"""Remove units that nothing reads, everywhere they appear.

A unit is dead where every weight column that meets it is zero. Its rows, filters, biases and per-channel parameters go;
target shapes and channel counts follow. By itself this preserves the function exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.operators import DIALECT, IntArray, Signature
from mscompile.passes.readers import add_parameter, array_of, owned
from mscompile.scm import Scm, read_scm


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
        for (name, axis), units in scm.axes.items():
            left = np.flatnonzero(~np.isin(units, dead))
            if len(left) < len(units):
                value = values[name]
                if value.shape is not None:
                    value.shape = ir.Shape([len(left) if a == axis else d for a, d in enumerate(value.shape)])
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
            # Behind a Carry node the weight has one column more, which is no unit's.
            weight = np.moveaxis(array_of(reader.weight), reader.axis, 0)[: len(reader.units)]
            read.update(reader.units[weight.reshape(len(weight), -1).any(axis=1)].tolist())
    for node in scm.model.graph:
        if node.domain == DIALECT and node.op_type == "Replace":  # reads retained units on behalf of the others
            seen = scm.axes.get((node.outputs[0].name or "", node.attributes["axis"].as_int()))
            read.update(() if seen is None else seen.tolist())
    return np.array(sorted(every - read - set(scm.frozen)), dtype=np.int64)


def dead_units(scm: Scm, tensors: Iterable[str] | None = None) -> IntArray:
    """Unread units of the sites at `tensors`, or of all; of a whole axis of dead units one stays."""
    dead = set(unread_units(scm).tolist())
    if tensors is not None:
        dead &= {unit for site in scm.sites if site.tensor in set(tensors) for unit in site.units.tolist()}
    for node in scm.model.graph:
        if node.domain == DIALECT:  # holds channel numbers, or counts channels, and would have to follow
            for axis in range(len(scm.shapes.get(node.outputs[0].name or "", ()))):
                dead -= set(scm.axes.get((node.outputs[0].name or "", axis), np.zeros(0, np.int64)).tolist())
    for units in scm.axes.values():
        if dead.issuperset(units.tolist()):
            dead.discard(int(units[0]))
    return np.array(sorted(dead), dtype=np.int64)


def _slice_parameters(graph: ir.Graph, scm: Scm, dead: IntArray) -> None:
    cuts: dict[tuple[ir.Node, int], dict[int, IntArray]] = {}
    for slot in scm.slots:
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
        if key not in shared:
            array = array_of(value)
            for axis, left in axes.items():
                array = np.take(array, left, axis=axis)
            dtype = value.const_value.dtype
            same = [k for k in cuts if k[0].inputs[k[1]] is value]
            alone = len(same) == uses_left[value] and not value.is_graph_output()
            if alone and all(_equal(cuts[k], axes) for k in same):
                value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
                value.shape = ir.Shape(array.shape)
                shared[key] = value
            else:
                shared[key] = add_parameter(graph, value.name or "weight", array, dtype)
        if shared[key] is not value:
            node.replace_input_with(operand, shared[key])


def _equal(one: dict[int, IntArray], other: dict[int, IntArray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[axis], other[axis]) for axis in one)


def _follow_sizes(graph: ir.Graph, scm: Scm, dead: IntArray) -> None:
    for node in graph:
        found = scm.signatures[node]
        if not isinstance(found, Signature):
            continue
        output = node.outputs[0].name or ""
        for size in found.sizes:
            units = scm.axes.get((output, size.axis))
            if units is None or not np.isin(units, dead).any():
                continue
            target = array_of(node.inputs[size.operand]).copy()
            target[size.position] = int((~np.isin(units, dead)).sum())
            owned(graph, node, size.operand, target)
        for attribute, axis in found.counts:
            units = scm.axes.get((output, axis))
            if units is not None and np.isin(units, dead).any():
                node.attributes.add(ir.AttrInt64(attribute, int((~np.isin(units, dead)).sum())))
