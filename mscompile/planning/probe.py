"""The probe: samples held out, on which risks of plans are measured from one place of the network to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mscompile.intake.samples import Samples
from mscompile.planning.drafts import Draft
from mscompile.planning.plan import SitePlan
from mscompile.planning.scores import measured_risk
from mscompile.planning.staged import StagedPass
from mscompile.planning.tuning import Tunable
from mscompile.runs.work import NOWHERE, Work


class Probe:
    """Samples on their way through a network: what lies before the place reached is not run again.

    Parameters
    ----------
    outputs
        Weight by name of the outputs whose change is measured.
    """

    def __init__(
        self, tunable: Tunable, outputs: Mapping[str, float], samples: Samples, batch_size: int, work: Work = NOWHERE
    ) -> None:
        self._tunable, self._outputs, self._count = tunable, outputs, len(samples)
        self._passing = StagedPass(tunable.graph, samples, batch_size, work)
        self._wanted = self._passing.outputs(list(outputs), tunable.weights(()))

    def advance(self, tensor: str, plans: Iterable[SitePlan | Draft] = ()) -> None:
        """Go on to a site under the plans of those before it."""
        for _ in self._passing.advance([tensor], self._tunable.weights(plans)):
            pass

    def risk(self, plans: Iterable[SitePlan | Draft], basis: str) -> float:
        """Risk per sample, of the quantity that `basis` names; of plans before the place reached the same ones as there."""
        changed = self._passing.outputs(list(self._outputs), self._tunable.weights(plans))
        return measured_risk(basis, self._wanted, changed, self._outputs) / self._count
