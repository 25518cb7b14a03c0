"""Carriers: constants that reach the border of zero-padded readers exactly (see `mscompile.planning.constants`).

A Carry node gives its reader one more channel, of ones, or one for each group of it. Here a unit that nothing reads takes
the place of each: its producers get zero weights and a fixed bias, so that it is v everywhere inside the map, and its
outgoing weights become those of the ones over v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Reader, Scm, Site, read_scm
from mscompile.operators import DIALECT, IntArray, Signature
from mscompile.passes.narrow import unread_units
from mscompile.passes.readers import add_bias, array_of, owned
from mscompile.planning.carrying import Demand, shared_out, standing
from mscompile.planning.constants import Carrier, carriers


@dataclass(frozen=True)
class FoldCarriers(ir.passes.InPlacePass):
    """Replace Carry nodes by carriers; where no unread unit can be made constant, the nodes stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        scm = read_scm(model)
        groups: dict[int, list[tuple[Site, Reader]]] = {}
        for site in scm.sites:
            for reader in site.readers:
                if carry_of(reader) is not None:
                    groups.setdefault(site.group, []).append((site, reader))
        unread = unread_units(scm)
        folded = [_fold(model.graph, scm, members, unread) for members in groups.values()]
        return ir.passes.PassResult(model, any(folded))


def carry_of(reader: Reader) -> ir.Node | None:
    """The Carry node that a reader reads."""
    data = reader.node.inputs[reader.signature.linear.data]  # type: ignore[union-attr]
    producer = None if data is None else data.producer()
    return producer if producer is not None and producer.domain == DIALECT and producer.op_type == "Carry" else None


def _fold(graph: ir.Graph, scm: Scm, members: Sequence[tuple[Site, Reader]], unread: IntArray) -> bool:
    found = _choose(scm, [Demand(site, reader, g) for site, reader in members for g in range(reader.groups)], unread)
    if found is None:
        return False
    make_constant(graph, scm, members[0][0], [constant for constant, _ in found.values()])
    for site, reader in members:
        node, linear = carry_of(reader), reader.signature.linear
        assert node is not None
        assert linear is not None
        weight = array_of(reader.weight).astype(np.float64)
        rows, ones = reader.rows(weight).copy(), reader.ones(weight)
        assert ones is not None
        for group in range(reader.groups):
            constant, value = found[reader.node, group]
            channel = np.flatnonzero(site.units == constant.unit)[0]  # whose value it is: those of one unit may differ
            rows[np.flatnonzero(reader.index == channel)[:1]] = ones[group] / value
        owned(graph, reader.node, linear.weight, reader.from_rows(rows))
        reader.node.replace_input_with(linear.data, node.inputs[0])
        graph.remove(node, safe=True)
    return True


def _choose(
    scm: Scm, demands: Sequence[Demand], unread: IntArray
) -> dict[tuple[ir.Node, int], tuple[Carrier, float]] | None:
    """A carrier, and its value at the site, by reader and group; None where there is none for one of them."""
    shared, stand = shared_out(demands, unread), standing(scm)
    found: dict[tuple[ir.Node, int], tuple[Carrier, float]] = {}
    for tensors in dict.fromkeys(tuple(entry.sites) for entry in shared):
        entries = [entry for entry in shared if tuple(entry.sites) == tensors]
        sites = [*entries[0].sites.values()]
        chosen = _carriers(scm, sites, [entry.least(stand) for entry in entries])
        if None in chosen:
            chosen = _carriers(scm, sites, [entry.units for entry in entries])
        for entry, constant in zip(entries, chosen, strict=True):
            if constant is None:
                return None
            values = dict(zip(tensors, constant.values, strict=True))
            found |= {(d.reader.node, d.group): (constant, values[d.site.tensor]) for d in entry.demands}
    return found


def _carriers(scm: Scm, sites: Sequence[Site], units: Sequence[set[int]]) -> tuple[Carrier | None, ...]:
    return carriers(scm, sites, [np.flatnonzero(np.isin(sites[0].units, list(some))) for some in units])


def make_constant(graph: ir.Graph, scm: Scm, site: Site, constants: Sequence[Carrier]) -> None:
    """Give the carriers' producers zero weights and their bias."""
    for creator in scm.creators_of(site.units):
        biases = np.zeros(len(creator.units))
        for constant in constants:
            biases[creator.units == constant.unit] = constant.bias
        chosen, found = np.isin(creator.units, [constant.unit for constant in constants]), scm.signatures[creator.node]
        assert isinstance(found, Signature)
        assert found.linear is not None
        if not chosen.any():
            continue
        for slot in creator.slots:
            array = array_of(creator.node.inputs[slot.operand]).copy()
            np.moveaxis(array, slot.axis, 0)[chosen] = 0
            owned(graph, creator.node, slot.operand, array)
        rank = len(scm.shapes[creator.node.outputs[0].name or ""])
        add_bias(graph, creator.node, found.linear, biases, rank - 1 - creator.axis)
