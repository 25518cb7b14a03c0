"""Risks of groups alone, for the curves that goals go down."""

from __future__ import annotations

from functools import cached_property

from mscompile.operators import IntArray
from mscompile.planning.probe import Probe
from mscompile.planning.scores import predictable
from mscompile.search.candidates import Workshop
from mscompile.search.goals import PROBED

PASSES = 4
"""Forward passes per calibration sample that measuring risk curves may cost, at most."""
FEWEST = 32
"""Samples that a risk is measured on, at least."""


class GroupRisks:
    """Risks of groups alone, one group after the other in the order of the graph.

    Attributes
    ----------
    places
        First site by group, in that order.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self.places: dict[int, str] = {}
        for site in workshop.source.scm.sites:
            if site.group in workshop.eliminations:
                self.places.setdefault(site.group, site.tensor)
        self._ahead = [*self.places]

    @cached_property
    def _probe(self) -> Probe:
        workshop = self._workshop
        batch = workshop.source.batch or 1
        count = max(FEWEST, PASSES * len(workshop.parts["calibrate"]) // (len(PROBED) * len(self.places)))
        samples = workshop.held.take(slice(count // batch * batch or batch))
        work, rows = workshop.stage.work, workshop.read_by_rows
        return Probe(workshop.tunable, workshop.outputs, samples, workshop.batch, work, rows)

    def measure(self, group: int, counts: IntArray) -> dict[int, float]:
        """By channels left, where what is planned for the group predicts a risk that can be measured."""
        found: dict[int, float] = {}
        if not self._workshop.outputs:
            return found
        # By the same stages whether those before were measured here or kept: other ones round otherwise.
        while group in self._ahead:
            self._probe.advance(self.places[self._ahead.pop(0)])
        for count in map(int, counts):
            plans = self._workshop.drafts({group: count})
            if plans and all(predictable(plan.basis) for plan in plans):
                found[count] = self._probe.risk(plans, plans[0].basis)
        return found
