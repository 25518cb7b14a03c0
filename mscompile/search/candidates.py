"""Candidates: plans of given widths, carried out; all from one calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mscompile.calibration.statistics import Statistics
from mscompile.calibration.windows import window_name
from mscompile.clock import Clock
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.options import Options
from mscompile.planning.drafts import Draft, Folding, folded_bytes, foldings, reads_rows
from mscompile.planning.plan import Plan, SitePlan
from mscompile.planning.planner import Entry, Planner
from mscompile.planning.recalibration import Step, recalibrate
from mscompile.planning.replacements import AFFINE_FITS, Factor, fit_affine
from mscompile.planning.scores import Scores
from mscompile.planning.selection import Elimination, without_carriers
from mscompile.planning.tuning import Tunable
from mscompile.rewrite import Compiled, rewrite
from mscompile.runs.shelf import Shelf
from mscompile.runs.work import FORGET, Stage, digest
from mscompile.runtime import Progress
from mscompile.verification.metrics import METRICS
from mscompile.verification.verify import Fidelity, Interchange, Law, make_pair

Fits = tuple[Plan, Plan, tuple[Step, ...]]
"""A plan as fitted to the dense network, and after re-calibration, with its steps."""
FOLDED_BYTES = 1 << 28
"""What serves to fold drafts, at most; maps are solved for where there is no more room."""
HELD_SAMPLES = 256
"""Samples on which risks are measured while candidates are made, at most."""


@dataclass(frozen=True)
class Candidate:
    """Widths carried out.

    Attributes
    ----------
    fitted, plan
        As fitted to the dense network, and after re-calibration.
    interchange
        None where nothing was cut.
    steps
        What re-calibration found, site by site.
    """

    fitted: Plan
    plan: Plan
    compiled: Compiled
    interchange: Interchange | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Workshop:
    """What candidates are made from.

    Attributes
    ----------
    parts
        The data, see `search.SHARES`: candidates are fitted on `calibrate` and compared on `choose`.
    stage
        Where measurements are kept.
    """

    source: DenseModel
    statistics: Statistics
    scores: Scores
    eliminations: Mapping[int, Elimination]
    parts: Mapping[str, Samples]
    options: Options
    clock: Clock
    progress: Progress
    stage: Stage = FORGET
    _planned: dict[tuple[int, int], list[SitePlan]] = field(default_factory=dict, repr=False)
    _drafted: dict[tuple[int, int], list[SitePlan | Draft]] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """Samples at a time."""
        return self.options.batch

    @property
    def outputs(self) -> Mapping[str, float]:
        """Weight by name of the outputs whose change is scored."""
        return self.source.weighted_outputs(self.options)

    @property
    def held(self) -> Samples:
        """Samples that took no part in fitting, for risks."""
        batch = self.source.batch or 1
        return self.parts["choose"].take(slice(max(HELD_SAMPLES // batch, 1) * batch))

    @cached_property
    def tunable(self) -> Tunable:
        """The graph that candidates are tried and re-calibrated on."""
        return Tunable(self.source)

    def carriers(self, group: int) -> int:
        """How many of the channels left of a group carry constants."""
        order, scm = self.eliminations[group].order, self.source.scm
        return len(order) - len(without_carriers(order, order, scm.blocks, self.source.groups[group]))

    def plans(self, counts: Mapping[int, int]) -> tuple[SitePlan, ...]:
        """Plans of the sites that are cut, in the order of the graph."""
        with self.clock.time("plan"):
            return self._of(counts, self._planned, self._planner.group)

    def drafts(self, counts: Mapping[int, int]) -> tuple[SitePlan | Draft, ...]:
        """The same to be tried, see `Planner.drafts`."""
        return self._of(counts, self._drafted, self._planner.drafts)

    def _of(
        self, counts: Mapping[int, int], known: dict[tuple[int, int], list[Entry]], make: Callable[[int, int], list[Entry]]
    ) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for key in counts.items():
            if key not in known:
                known[key] = [entry.on(self._shelf) for entry in make(*key)]
            found += known[key]
        return self._planner.in_order(found)

    @cached_property
    def _planner(self) -> Planner:
        return Planner(
            self.source.scm,
            self.statistics,
            self.scores,
            self.source.groups,
            {group: elimination.order for group, elimination in self.eliminations.items()},
            self.options.replacement,
            self.options.swap,
            {group: elimination.lossless for group, elimination in self.eliminations.items()},
            self._factors,
            self._foldings,
        )

    @cached_property
    def _shelf(self) -> Shelf:
        """Of what is fitted at all sites."""
        return self.stage.work.shelf(sum(2 * site.size**2 * 8 for site in self.source.sites))

    @cached_property
    def _factors(self) -> dict[str, Factor]:
        """By site tensor; none where channels of several rows, or units of several channels, leave no order."""
        swap, found = self.options.swap, {}
        for group, elimination in self.eliminations.items():
            for site in self.source.groups[group]:
                single = site.rows is None and len(np.unique(site.units)) == site.size
                if not single or AFFINE_FITS.get(self.options.replacement) is not fit_affine:
                    continue
                place = np.argsort(elimination.order)
                own = place[np.searchsorted(elimination.order, site.units, sorter=place)]
                factor = Factor.make(self.statistics.moments[site.tensor], swap, np.argsort(-own))
                if factor is not None:
                    found[site.tensor] = factor.on(self._shelf)
        return found

    @cached_property
    def _foldings(self) -> dict[str, dict[str, Folding]]:
        """By site tensor and reader, as far as there is room for them."""
        found, left = {}, FOLDED_BYTES
        for tensor, factor in self._factors.items():
            site = self.source.scm.site(tensor)
            windowed = any(window_name(reader) in self.statistics.windows for reader in site.readers)
            if not windowed and (made := foldings(site, factor, left)):
                found[tensor] = made
                left -= folded_bytes(site)
        return found

    @property
    def read_by_rows(self) -> dict[str, dict[str, Folding]]:
        """Those of sites that are multiplied as they are, see `Reading`."""
        scm, ranks = self.source.scm, self.source.ranks
        return {tensor: found for tensor, found in self._foldings.items() if reads_rows(scm.site(tensor), ranks[tensor])}

    def make(self, counts: Mapping[int, int], *, recalibrated: bool) -> Candidate:
        """Plan, re-calibrate where asked for, rewrite, and open for interchange."""
        return self.opened(*self.fit(counts, recalibrated=recalibrated))

    def fit(self, counts: Mapping[int, int], *, recalibrated: bool) -> Fits:
        """Plan, and re-calibrate where asked for."""
        source, options = self.source, self.options
        sites = self.plans(counts)
        plan = fitted = self._planner.plan({}, source.sha256).model_copy(update={"sites": sites})
        steps: tuple[Step, ...] = ()
        if recalibrated and fitted.sites:
            with self.clock.time("re-calibrate"):
                plan, steps = recalibrate(
                    source,
                    fitted,
                    self.statistics,
                    self.parts["calibrate"],
                    self.held,
                    self.outputs,
                    batch_size=self.batch,
                    seed=options.seed,
                    tunable=self.tunable,
                    stage=self.stage,
                    progress=self.progress,
                )
        return fitted, plan, steps

    def opened(self, fitted: Plan, plan: Plan, steps: tuple[Step, ...]) -> Candidate:
        """A plan carried out, and open for interchange."""
        source, options = self.source, self.options
        with self.clock.time("rewrite"):
            compiled = rewrite(source.model, plan, self.stage.work)
        interchange = None
        if plan.sites:
            with self.clock.time("verify"):
                pair = make_pair(source.scm, compiled.model, plan, compiled.alignment)
                metric = None if options.metric is None else METRICS[options.metric]
                interchange = Interchange(pair, self.parts["choose"], batch_size=self.batch, metric=metric)
        return Candidate(fitted, plan, compiled, interchange, steps)

    def measure(self, candidate: Candidate, part: str, law: Law | None = None, swap: float | None = None) -> Fidelity:
        """Interchange on one part, under the law asked for unless another is given."""
        assert candidate.interchange is not None
        options = self.options
        law, swap = options.law if law is None else law, options.swap if swap is None else swap
        name = f"interchange-{part}-{law}-{swap}-{digest(entry.sha256 for entry in candidate.plan.sites)}"

        def found() -> dict[str, Any]:
            assert candidate.interchange is not None
            measured = candidate.interchange.run(
                self.parts[part], law=law, swap=swap, seed=options.seed, delta=options.delta, progress=self.progress
            )
            return vars(measured)

        with self.clock.time("verify"):
            return Fidelity(**self.stage.recall(name, f"interchange with swap {swap:g}", found))
