"""The probe: samples held out, on which risks of plans are measured from one place of the network to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from mscompile.intake.samples import Samples
from mscompile.planning.drafts import Draft, Folding, Reading, drafted
from mscompile.planning.plan import SitePlan
from mscompile.planning.scores import measured_risk
from mscompile.planning.staged import StagedPass
from mscompile.planning.tuning import Tunable
from mscompile.runs.work import NOWHERE, Work
from mscompile.runtime import Arrays


class Probe:
    """Samples on their way through a network: what lies before the place reached is not run again.

    Parameters
    ----------
    outputs
        Weight by name of the outputs whose change is measured.
    foldings
        By site tensor and reader, where readers read rows: what they give under drafts need not be run.
    """

    def __init__(
        self,
        tunable: Tunable,
        outputs: Mapping[str, float],
        samples: Samples,
        batch_size: int,
        work: Work = NOWHERE,
        foldings: Mapping[str, Mapping[str, Folding]] = MappingProxyType({}),
    ) -> None:
        self._tunable, self._outputs, self._count, self._foldings = tunable, outputs, len(samples), foldings
        self._passing = StagedPass(tunable.graph, samples, batch_size, work)
        self._read: tuple[str, list[dict[str, Reading]]] = "", []

    @cached_property
    def _wanted(self) -> Arrays:
        """The dense network's outputs: from where no plan has led, and always the same place, which decides on rounding."""
        return self._passing.outputs(list(self._outputs), self._tunable.weights(()))

    def advance(self, tensor: str, plans: Sequence[SitePlan | Draft] = ()) -> None:
        """Go on to a site under the plans of those before it."""
        if plans:
            _ = self._wanted
        weights, foldings, self._read = self._tunable.weights(plans), self._foldings.get(tensor, {}), ("", [])
        found = [batch[tensor] for batch in self._passing.advance([tensor], weights) if foldings]
        _ = self._wanted
        if found and sum(array.size for array in found) < found[0].shape[-1] ** 2:  # else to fold the weights takes less
            ahead = self._passing.ahead([*foldings], weights)
            self._read = tensor, [drafted(foldings, array, ahead.run(number)) for number, array in enumerate(found)]

    def risk(self, plans: Sequence[SitePlan | Draft], basis: str) -> float:
        """Risk per sample, of the quantity that `basis` names; of plans before the place reached the same ones as there."""
        tensor, batches = self._read
        here = next((plan for plan in plans if plan.tensor == tensor and isinstance(plan, Draft)), None)
        given: list[Arrays] = []
        if here is not None:
            given = [{name: reading.at(len(here.kept)) for name, reading in batch.items()} for batch in batches]
        weights = self._tunable.weights(plan for plan in plans if plan is not here)
        changed = self._passing.outputs(list(self._outputs), weights, given)
        return measured_risk(basis, self._wanted, changed, self._outputs) / self._count
