"""What the weights alone prove, without any data: constant units, duplicate units, and units that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mscompile.network.scm import Scm, Site
from mscompile.operators import IntArray
from mscompile.passes.narrow import dead_units
from mscompile.planning.constants import can_be_constant, constant_response
from mscompile.planning.plan import Plan, SitePlan

OBJECTIVE = "weights-only"


def exact_plan(scm: Scm, groups: Mapping[int, Sequence[Site]], *, model_sha256: str) -> Plan:
    """Plan that replaces only what is provably a constant, a copy of another unit, or unread.

    A unit is constant where its incoming weights are all zero, a duplicate where it agrees with another unit byte for byte
    in every parameter on its way, dead where every weight that reads it is zero. Groups read by several sites, or holding
    units that begin at several nodes, are treated by the first two rules only where each rule holds at all of them.
    """
    planned = []
    unread = set(dead_units(scm).tolist())
    for sites in groups.values():
        units = np.unique(np.concatenate([site.units for site in sites]))
        dead = unread & set(units.tolist())
        levels = {u: np.array([b]) for u, b in _constant_biases(scm, units).items() if u not in dead}
        responses = {site.tensor: constant_response(scm, site, levels) if levels else None for site in sites}
        constant = {u for u in levels if all(_known(responses[site.tensor], site, u) for site in sites)}
        twin = _twins(scm, set(units.tolist()) - dead - constant)
        gone = dead | constant | set(twin)
        # Where constants must reach a zero-padded border, a removed unit stays as their carrier: one alone gains nothing.
        carried = any(site.border and _value(responses[site.tensor], site, constant).any() for site in sites)
        if not gone or len(gone) == len(units) or (carried and len(gone) == 1):
            continue
        planned += [_plan_site(site, gone, constant, twin, responses[site.tensor]) for site in sites]
    order = {site.tensor: i for i, site in enumerate(scm.sites)}
    planned.sort(key=lambda entry: order[entry.tensor])
    return Plan(model_sha256=model_sha256, objective=OBJECTIVE, replacement="exact", swap=0.0, sites=tuple(planned))


def _plan_site(
    site: Site,
    gone: set[int],
    constant: set[int],
    twin: Mapping[int, int],
    response: npt.NDArray[np.float64] | None,
) -> SitePlan:
    stays = np.array([u not in gone for u in site.units.tolist()])
    kept, replaced = np.flatnonzero(stays), np.flatnonzero(~stays)
    # A unit that stands at several channels has its twin at as many, in the same order.
    count = _occurrence(site.units)
    place = {(int(site.units[k]), int(count[k])): i for i, k in enumerate(kept.tolist())}
    constants = np.zeros(len(replaced), dtype=np.float32)
    matrix = np.zeros((len(replaced), len(kept)), dtype=np.float32)
    for row, channel in enumerate(replaced.tolist()):
        unit = int(site.units[channel])
        if unit in constant and response is not None:
            constants[row] = response[0, channel]
        elif unit in twin:
            matrix[row, place[twin[unit], int(count[channel])]] = 1.0
    return SitePlan(
        name=site.tensor,
        tensor=site.tensor,
        axis=site.axis,
        size=site.size,
        kept=kept,
        constants=constants,
        affine=matrix if matrix.any() else None,
        basis="proved from the weights",
    )


def _occurrence(units: IntArray) -> IntArray:
    """How often each entry has occurred before."""
    seen: dict[int, int] = {}
    found = []
    for unit in units.tolist():
        found.append(seen.get(unit, 0))
        seen[unit] = found[-1] + 1
    return np.array(found, dtype=np.int64)


def _known(response: npt.NDArray[np.float64] | None, site: Site, unit: int) -> bool:
    return response is not None and bool(np.isfinite(_value(response, site, {unit})).all())


def _value(response: npt.NDArray[np.float64] | None, site: Site, units: set[int]) -> npt.NDArray[np.float64]:
    """Constants of some units at a site."""
    return np.zeros(0) if response is None else response[0][np.isin(site.units, sorted(units))]


def _constant_biases(scm: Scm, units: IntArray) -> dict[int, float]:
    """Bias of each unit that begins at one node with zero weights."""
    creators = scm.creators_of(units)
    if len(creators) != 1 or not can_be_constant(scm, creators[0]):
        return {}
    (creator,) = creators
    linear = scm.signatures[creator.node].linear  # type: ignore[union-attr]
    assert linear is not None
    rows = {s.operand: _rows(s.node.inputs[s.operand].const_value.numpy(), s.axis) for s in creator.slots}  # type: ignore[union-attr]
    bias = np.zeros(len(creator.units))
    if linear.bias in rows:
        bias = linear.bias_gain * rows[linear.bias][:, 0].astype(np.float64)
    zero = np.flatnonzero(~rows[linear.weight].any(axis=1))
    return {int(creator.units[i]): float(bias[i]) for i in zero if creator.units[i] in units}


def _twins(scm: Scm, units: set[int]) -> dict[int, int]:
    """For each duplicate unit the first unit it agrees with, byte for byte, in all parameters that make it."""
    read = {(r.node, r.signature.linear.weight, r.axis) for s in scm.sites for r in s.readers if r.signature.linear}
    traits: dict[int, list[bytes]] = {unit: [] for unit in sorted(units)}
    for slot in scm.slots:
        if (slot.node, slot.operand, slot.axis) in read:
            continue
        rows = _rows(slot.node.inputs[slot.operand].const_value.numpy(), slot.axis)  # type: ignore[union-attr]
        for unit, row in zip(slot.units.tolist(), rows, strict=True):
            if unit in traits:
                traits[unit].append(row.tobytes())
    first: dict[tuple[bytes, ...], int] = {}
    return {
        unit: first[tuple(trait)] for unit, trait in traits.items() if trait and first.setdefault(tuple(trait), unit) != unit
    }


def _rows(array: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.generic]:
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(len(moved), -1)
