"""Constant channels: what becomes of one on its way from where units begin to a site.

A convolution that pads with zeros does not see a constant channel at its border, so a constant replacement is more than a
bias to it. It stays exact with a *carrier*: one removed unit whose producer is given zero weights and a fixed bias, so
that its channel is v everywhere inside and absent in the padding, as every constant is. Its outgoing weights then carry
Σ_P c_P W_P / v for all constants together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.errors import UnsupportedError
from mscompile.network.scm import Creator, Scm, Site
from mscompile.operators import IntArray, Signature
from mscompile.runtime import Session

Array = npt.NDArray[np.float64]

FREE_EXTENTS = (16, 24)
"""Extents tried for position axes of unknown size, larger than the windows of common pooling.

What comes out must not depend on them: a sum over positions would."""
EVEN = 1e-6
"""Relative spread over positions up to which a channel counts as constant: averages of equal float32 round that much."""
LEVELS = np.array([sign * 2.0**k for k in range(-6, 7) for sign in (1, -1)])
"""Biases tried for a carrier: powers of two, which lose no precision."""


@dataclass(frozen=True)
class Carrier:
    """A unit that can be made constant.

    Attributes
    ----------
    unit
        The unit.
    bias
        Bias of its producers.
    values
        Its value at each site asked for.
    """

    unit: int
    bias: float
    values: tuple[float, ...]


def carriers(scm: Scm, sites: Sequence[Site], parts: Sequence[IntArray]) -> tuple[Carrier | None, ...]:
    """For each of `parts`, channels of the first site, the unit that makes the best-scaled constant at all `sites`, if any.

    A unit counts by the first of its channels: those of one unit may differ.
    """
    first = np.unique(sites[0].units, return_index=True)[1]
    among = [sites[0].units[np.intersect1d(part, first)] for part in parts]
    units = np.unique(np.concatenate(among))
    for site in sites[1:]:
        units = units[np.isin(units, site.units)]
    none = (None,) * len(parts)
    if not len(units) or not all(can_be_constant(scm, creator) for creator in scm.creators_of(units)):
        return none
    responses = []
    # What a normalisation makes of a constant is exact for zeros alone, and otherwise holds rounding where zeros should be.
    levels = np.zeros(1) if any(_centred(scm, site) for site in sites) else LEVELS
    for site in sites:
        found = constant_response(scm, site, {int(u): levels for u in units})
        if found is None:
            return none
        places = {int(u): i for i, u in reversed([*enumerate(site.units)])}
        responses.append(found[:, [places[int(u)] for u in units]])
    stacked = np.abs(np.stack(responses))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(np.log2(stacked)).max(axis=0)
    distance[~np.isfinite(distance)] = np.inf

    def best(columns: IntArray) -> Carrier | None:
        if not len(columns) or not np.isfinite(distance[:, columns]).any():
            return None
        level, place = np.unravel_index(int(np.argmin(distance[:, columns])), (len(levels), len(columns)))
        column = columns[place]
        values = tuple(float(response[level, column]) for response in responses)
        return Carrier(int(units[column]), float(levels[level]), values)

    return tuple(best(np.flatnonzero(np.isin(units, own))) for own in among)


def has_carriers(scm: Scm, site: Site) -> bool:
    """Whether each group of every reader that pads meets a unit that can be made constant."""
    free = np.flatnonzero(site.free)
    parts = [np.intersect1d(met, free) for reader in site.readers if reader.border for met in reader.met]
    return not parts or None not in carriers(scm, [site], parts)


def can_be_constant(scm: Scm, creator: Creator) -> bool:
    """Whether a creator's output is ``weight ∘ data + bias`` and no more, so that zero weights leave a bias we can set."""
    found = scm.signatures.get(creator.node)
    if not isinstance(found, Signature) or found.linear is None:
        return False
    linear, sliced = found.linear, {slot.operand for slot in creator.slots}
    given = {operand for operand, value in enumerate(creator.node.inputs) if value is not None}
    return linear.weight in sliced and given - {linear.data} <= sliced <= {linear.weight, linear.bias}


def constant_response(scm: Scm, site: Site, levels: dict[int, Array]) -> Array | None:
    """Value of each channel at a site when its producers' outputs are held constant.

    Parameters
    ----------
    levels
        For each unit held, [trials] values of its producers' outputs; other units are held at 0.

    Returns
    -------
    array or None
        [trials, channels]; NaN where a channel does not come out constant. None where something on the way does not keep
        constants or depends on more than the producers.
    """
    creators = scm.creators_of(site.units)
    starts = [creator.node.outputs[0] for creator in creators]
    target = _tensor(scm, site)
    between = [] if target is None else _between(starts, target)
    if target is None or not all(_steady(scm, node) for node in between):
        return None
    if any(creator.axis == 0 for creator in creators) or any((start.name or "") not in scm.shapes for start in starts):
        return None
    # Large maps are probed on small ones where no node in between states a size.
    stated = any(
        found.regroups or any(isinstance(size.holder, int) for size in found.sizes)
        for node in between
        if isinstance(found := scm.signatures[node], Signature)
    )
    for largest in (np.inf,) if stated else (max(FREE_EXTENTS), np.inf):
        response = _probe(scm, site, target, creators, levels, largest)
        if response is not None:
            return response
    return None


def _probe(
    scm: Scm, site: Site, target: ir.Value, creators: Sequence[Creator], levels: dict[int, Array], largest: float
) -> Array | None:
    """The response with maps no larger than `largest`; None where the network does not take these."""
    starts = [creator.node.outputs[0] for creator in creators]
    dims = [
        d
        for start, c in zip(starts, creators, strict=True)
        for a, d in enumerate(scm.shapes[start.name or ""])
        if a not in (0, c.axis)
    ]
    free = any(not isinstance(d, int) or d > largest for d in dims)
    responses = []
    for extent in FREE_EXTENTS if free else FREE_EXTENTS[:1]:
        response = _respond(scm, site, target, creators, levels, extent, largest)
        if response is None:
            return None
        responses.append(response)
    even = np.ptp(responses, axis=0) <= EVEN * np.abs(responses[0])
    return np.where(even, responses[0], np.nan)


def _respond(
    scm: Scm,
    site: Site,
    target: ir.Value,
    creators: Sequence[Creator],
    levels: dict[int, Array],
    extent: int,
    largest: float,
) -> Array | None:
    """The response where position axes of unknown size, or larger than `largest`, have `extent` places."""
    trials = len(next(iter(levels.values())))
    feed = {}
    for creator in creators:
        start = creator.node.outputs[0]
        extents = [
            d if isinstance(d, int) and (d <= largest or a == creator.axis) else extent
            for a, d in enumerate(scm.shapes[start.name or ""])
        ]
        extents[0] = trials
        array = np.zeros(extents, dtype=_dtype(creator).numpy())
        view = np.moveaxis(array, creator.axis, 1)
        for channel, unit in enumerate(creator.units.tolist()):
            if unit in levels:
                view[:, channel] = levels[unit].reshape((-1,) + (1,) * (view.ndim - 2))
        feed[start.name or ""] = array
    if target.name in feed:
        result = feed[target.name]
    else:
        try:
            graph = ir.convenience.extract(scm.model.graph, [creator.node.outputs[0] for creator in creators], [target])
            for value, creator in zip(graph.inputs, creators, strict=True):
                value.type = ir.TensorType(_dtype(creator))
                value.shape = None  # the probe may be smaller than the map
            for value in (v for node in graph for v in node.outputs):
                value.shape = None
            model = ir.Model(graph, ir_version=scm.model.ir_version)
            result = Session(model, optimise=False).run(feed)[target.name or ""]
        except (ValueError, UnsupportedError):
            return None
    if len(result) != trials:
        return None  # samples were moved to another axis
    flat = np.moveaxis(result, site.axis, 1).reshape(trials, site.size, -1).astype(np.float64)
    low, high = flat.min(axis=2), flat.max(axis=2)
    even = high - low <= EVEN * np.maximum(np.abs(high), np.abs(low))
    return np.where(even, flat[:, :, 0], np.nan)


def _dtype(creator: Creator) -> ir.DataType:
    """Element type of a creator's weight, hence of its output, which exporters need not declare."""
    (tensor, *_) = (creator.node.inputs[slot.operand] for slot in creator.slots)
    assert tensor is not None
    assert tensor.const_value is not None
    return tensor.const_value.dtype


def _between(starts: Sequence[ir.Value], target: ir.Value) -> list[ir.Node]:
    """Nodes on the way from `starts` to `target`."""
    nodes, waiting, seen = [], [target], {id(start) for start in starts}
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if id(value) in seen or node is None:
            continue
        seen.add(id(value))
        nodes.append(node)
        waiting += [v for v in node.inputs if v is not None]
    return nodes


def _tensor(scm: Scm, site: Site) -> ir.Value | None:
    return next((v for node in scm.model.graph for v in node.outputs if v.name == site.tensor), None)


def _centred(scm: Scm, site: Site) -> bool:
    """Whether a normalisation stands between where units begin and the site."""
    starts, target = [creator.node.outputs[0] for creator in scm.creators_of(site.units)], _tensor(scm, site)
    found = (scm.signatures.get(node) for node in ([] if target is None else _between(starts, target)))
    return any(isinstance(one, Signature) and one.centred for one in found)


def _steady(scm: Scm, node: ir.Node) -> bool:
    found = scm.signatures.get(node)
    return isinstance(found, Signature) and found.steady and found.linear is None
