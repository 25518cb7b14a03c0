"""Carriers: constants that reach the border of zero-padded readers exactly (see `mscompile.constants`).

A Carry node gives its reader one more channel, of ones. Here a unit that nothing reads takes its place: its producers get
zero weights and a fixed bias, so that it is v everywhere inside the map, and its outgoing weights become those of the ones
over v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.constants import Carrier, carrier
from mscompile.operators import DIALECT, Signature
from mscompile.passes.narrow import unread_units
from mscompile.passes.readers import add_bias, array_of, owned
from mscompile.scm import Reader, Scm, Site, read_scm


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


def _fold(graph: ir.Graph, scm: Scm, members: Sequence[tuple[Site, Reader]], unread: np.ndarray) -> bool:
    sites = list({site.tensor: site for site, _ in members}.values())
    constant = carrier(scm, sites, np.flatnonzero(np.isin(sites[0].units, unread) & sites[0].free))
    if constant is None:
        return False
    make_constant(graph, scm, sites[0], constant)
    values = dict(zip((site.tensor for site in sites), constant.values, strict=True))
    for site, reader in members:
        node, linear = carry_of(reader), reader.signature.linear
        assert node is not None
        assert linear is not None
        weight = np.moveaxis(array_of(reader.weight).astype(np.float64), reader.axis, 0)
        channel = np.flatnonzero(site.units == constant.unit)[0]  # whose value it is: those of one unit may differ
        weight[np.flatnonzero(reader.index == channel)[:1]] = weight[-1] / values[site.tensor]
        owned(graph, reader.node, linear.weight, np.moveaxis(weight[:-1], 0, reader.axis))
        reader.node.replace_input_with(linear.data, node.inputs[0])
        graph.remove(node, safe=True)
    return True


def make_constant(graph: ir.Graph, scm: Scm, site: Site, constant: Carrier) -> None:
    """Give the carrier's producers zero weights and its bias."""
    for creator in scm.creators_of(site.units):
        chosen, found = creator.units == constant.unit, scm.signatures[creator.node]
        assert isinstance(found, Signature)
        assert found.linear is not None
        if not chosen.any():
            continue
        for slot in creator.slots:
            array = array_of(creator.node.inputs[slot.operand]).copy()
            np.moveaxis(array, slot.axis, 0)[chosen] = 0
            owned(graph, creator.node, slot.operand, array)
        rank = len(scm.shapes[creator.node.outputs[0].name or ""])
        add_bias(graph, creator.node, found.linear, chosen * constant.bias, rank - 1 - creator.axis)
