"""Sites: every reading traced back to its tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mscompile.network.findings import Read, Refusal
from mscompile.network.layout import ROWS
from mscompile.network.origins import Found
from mscompile.network.pairing import Pairings
from mscompile.network.sites import Reader, Site
from mscompile.network.units import components
from mscompile.network.walk import Walk
from mscompile.operators import DIALECT, IntArray


def sites_of(walk: Walk) -> Callable[[IntArray, Mapping[int, Refusal], Sequence[IntArray]], Iterator[Site]]:
    """Trace every reading back to its tensor; gives the sites once units are settled."""
    trace = Readings(walk)
    found = [trace.reader(read) for read in walk.reads]
    found += [pairing for meeting in walk.meetings if (pairing := trace.pairing(meeting)) is not None]

    def settle(root: IntArray, frozen: Mapping[int, Refusal], every: Sequence[IntArray]) -> Iterator[Site]:
        groups = components(every, len(root))
        order = {node: i for i, node in enumerate(walk.signatures)}
        by_place: dict[tuple[ir.Value, int], list[Found]] = {}
        for one in found:
            by_place.setdefault((one.tensor, one.axis), []).append(one)
        axes: dict[ir.Value, list[int]] = {}
        for tensor, axis in by_place:
            axes.setdefault(tensor, []).append(axis)
        staying = np.fromiter(frozen, dtype=np.int64)
        for (tensor, axis), ones in sorted(by_place.items(), key=lambda kv: order[kv[0][0].producer()]):  # type: ignore[index]
            units = root[ones[0].units]
            stays = np.isin(units, staying)
            refusal = frozen[int(units[stays][0])] if stays.all() else None
            reason = _irregular(walk, tensor, axis, axes[tensor])
            if refusal is None and reason is not None:
                refusal = Refusal(tensor.name or "?", "", reason)
            yield Site(
                tensor.name or "?",
                axis,
                units,
                tuple(one.reader(root) for one in ones if one.reader is not None),
                int(groups[units[0]]),
                refusal,
                tuple(one.pairing for one in ones if one.pairing is not None),
                stays if stays.any() else None,
                _rows(ones),
                walk.samples.of(tensor) or ROWS,
            )

    return settle


def _rows(ones: Sequence[Found]) -> IntArray | None:
    """The coarsest rows that keep apart what any reader keeps apart."""
    told = [one.rows for one in ones if one.rows is not None]
    if not told:
        return None
    rows: IntArray = np.unique(np.stack(told), axis=1, return_inverse=True)[1].ravel().astype(np.int64)
    return rows


def _irregular(walk: Walk, tensor: ir.Value, axis: int, axes: Sequence[int]) -> str | None:
    """Why units cannot be replaced at a tensor, if so."""
    if axis == 0:
        return "holds units on axis 0, which is taken for the samples"
    if len(axes) > 1:
        return "is read on several of its axes"
    if tensor.name not in walk.shapes:
        return "has no known rank"
    layout = walk.samples.of(tensor)
    if layout is None:
        return "holds the samples where they cannot be followed"
    return "holds units and samples on one axis" if layout.axis == axis else None


class Readings(Pairings):
    """Finds what weights read."""

    def reader(self, read: Read) -> Found:
        """The tensor where the units of a reading stand on an axis of their own, which is read alone."""
        linear = read.signature.linear
        assert linear is not None
        value, entry = read.node.inputs[linear.data], read.node
        assert value is not None
        if (node := value.producer()) is not None and node.domain == DIALECT and node.op_type == "Carry":
            value, entry = node.inputs[0], node
            assert value is not None
        tensor, axis, units = value, read.data_axis, read.units
        if read.plain:
            origin = self.origin(value, axis, units, entry)
            times = np.bincount(_positions(origin[2], units))
            if (times == times[0]).all() and (
                linear.groups == 1 or times[0] == 1
            ):  # else a channel may be in several groups
                tensor, axis, units, entry = origin
        index = _positions(units, read.units) if tensor is not value else np.arange(len(units), dtype=np.int64)
        layout = self.walk.samples.of(value)

        def settled(root: IntArray) -> Reader:
            units = root[read.units]
            return Reader(read.node, read.signature, entry, read.data_axis, read.weight_axis, index, units, layout)

        rows = None
        if linear.groups > 1:
            rows = np.empty(len(units), dtype=np.int64)
            rows[index] = np.repeat(np.arange(linear.groups), len(index) // linear.groups)
        return Found(tensor, axis, units, settled, None, rows)


def _positions(units: IntArray, wanted: IntArray) -> IntArray:
    """Place of each wanted unit among `units`, all different."""
    order = np.argsort(units)
    return order[np.searchsorted(units, wanted, sorter=order)]
