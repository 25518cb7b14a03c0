"""Risks of groups alone, measured along the graph, for the curves that goals go down."""

from __future__ import annotations

from functools import cached_property

from mscompile.operators import IntArray
from mscompile.planning.scores import measured_risk, predictable
from mscompile.planning.staged import StagedPass
from mscompile.runtime import Arrays
from mscompile.search.candidates import Workshop

PROBES = 4
"""Forward passes per calibration sample that measuring risk curves may cost, at most."""
FEWEST_PROBES = 32
"""Samples that a risk is measured on, at least."""


class Probe:
    """Risks of groups alone, measured from one to the next in the order of the graph: what lies before is not run again.

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
    def _start(self) -> tuple[StagedPass, Arrays, int]:
        """Samples on their way through the dense network, its outputs, and how many they are."""
        workshop = self._workshop
        batch = workshop.source.batch or 1
        wanted = PROBES * len(workshop.parts["calibrate"]) // (4 * len(workshop.eliminations))
        samples = workshop.held.take(slice(max(FEWEST_PROBES, wanted) // batch * batch or batch))
        passing = StagedPass(workshop.tunable.graph, samples, workshop.batch, workshop.stage.work)
        return passing, passing.outputs(list(workshop.outputs), workshop.tunable.weights(())), len(samples)

    def risks(self, group: int, counts: IntArray) -> dict[int, float]:
        """By channels left, where what is planned for the group predicts a risk that can be measured."""
        workshop, (passing, wanted, samples) = self._workshop, self._start
        tunable, outputs = workshop.tunable, workshop.outputs
        # By the same stages whether those before were measured here or kept: other ones round otherwise.
        while group in self._ahead:
            for _ in passing.advance([self.places[self._ahead.pop(0)]], tunable.weights(())):
                pass
        found: dict[int, float] = {}
        for count in map(int, counts):
            plans = workshop.plans({group: count})
            if plans and outputs and all(predictable(plan.basis) for plan in plans):
                changed = passing.outputs(list(outputs), tunable.weights(plans))
                found[count] = measured_risk(plans[0].basis, wanted, changed, outputs) / samples
        return found
