"""Who carries constants to readers that pad: for each of these, or each group of one, a unit that nothing reads.

One unit may serve several. Of those that could, one that stands on the fewest parameters stays, so that what a width costs
is known beforehand; among equals the one that scales best (`mscompile.planning.constants`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mscompile.network.scm import Reader, Scm, Site
from mscompile.operators import IntArray

Standing = tuple[int, tuple[int, ...]]
"""On how many parameter axes a unit stands, and on which, numbered in the order of the graph."""


@dataclass(frozen=True)
class Demand:
    """A group of a reader that pads: one of the units it meets is to be its carrier."""

    site: Site
    reader: Reader
    group: int

    def units(self, unread: IntArray) -> set[int]:
        """Units that may be: those nothing reads, free to go, whose first channel, which tells their value, it meets."""
        first = np.unique(self.site.units, return_index=True)[1]
        channels = np.intersect1d(self.reader.met[self.group], first)
        own = self.site.units[channels[self.site.free[channels]]]
        return set(own[np.isin(own, unread)].tolist())


@dataclass
class Shared:
    """Demands that one unit serves, and the units that could."""

    units: set[int]
    demands: list[Demand]

    @property
    def sites(self) -> dict[str, Site]:
        """Where it is read."""
        return {demand.site.tensor: demand.site for demand in self.demands}

    def least(self, standing: Mapping[int, Standing]) -> set[int]:
        """Those of the units that stand on the fewest parameters."""
        fewest = min((standing[unit] for unit in self.units if unit in standing), default=(0, ()))
        return {unit for unit in self.units if standing.get(unit, fewest) == fewest}


def shared_out(demands: Iterable[Demand], unread: IntArray) -> list[Shared]:
    """The demands, those together that one unit can serve."""
    shared: list[Shared] = []
    for units, demand in sorted(((d.units(unread), d) for d in demands), key=lambda pair: len(pair[0])):
        for entry in shared:
            if entry.units & units:
                entry.units &= units
                entry.demands.append(demand)
                break
        else:
            shared.append(Shared(units, [demand]))
    return shared


def standing(scm: Scm) -> dict[int, Standing]:
    """Where each unit stands."""
    order = {node: number for number, node in enumerate(scm.model.graph)}
    places: dict[int, list[int]] = {}
    slots = sorted(scm.slots, key=lambda slot: (order[slot.node], slot.operand, slot.axis))
    for number, slot in enumerate(slots):
        for unit in slot.units.ravel().tolist():
            places.setdefault(unit, []).append(number)
    return {unit: (len(found), tuple(found)) for unit, found in places.items()}


def with_carriers(kept: IntArray, sites: Sequence[Site], unread: IntArray, stand: Mapping[int, Standing]) -> IntArray:
    """The units retained, and those that will carry constants for others that go, as far as there are any."""
    cut = [site for site in sites if not np.isin(site.units, kept).all()]
    padding = [(site, reader) for site in cut for reader in site.readers if reader.border]
    demands = [Demand(site, reader, group) for site, reader in padding for group in range(reader.groups)]
    chosen = [min(entry.least(stand)) for entry in shared_out(demands, unread) if entry.units]
    return np.union1d(kept, np.array(chosen, dtype=np.int64))
