"""Re-calibration: readers fitted once more, site by site, on the network as compiled so far.

A plan fits each site as if all before it were dense. Behind several sites the retained channels take other values, and what
was fitted to the dense ones no longer is the best. Here the readers of each planned site are fitted again, in the order of
the graph, from what they see in the network compiled up to there to what the dense readers give (`planning.refits`). After
each site the risk of the outputs is measured on data held out, and new weights that do worse than predicted are taken back.
Both networks are gone through once, in stages, by plans (`planning.tuning`): nothing is rewritten on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mscompile.calibration.statistics import Statistics
from mscompile.calibration.windows import FEATURES, view_of
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.planning.plan import Plan, SitePlan, WindowPlan
from mscompile.planning.probe import Probe
from mscompile.planning.refits import Sums, Target, refit
from mscompile.planning.scores import SQUARED_OUTPUTS, predictable
from mscompile.planning.staged import StagedPass
from mscompile.planning.tuning import Tunable
from mscompile.runs.parcel import Parcel
from mscompile.runs.work import FORGET, Stage, digest
from mscompile.runtime import Arrays, Progress, no_progress

ROLLBACK = 1.5
"""New weights are compared with the plan's where the risk measured exceeds the risk before plus this many times that
predicted for the site; the better ones stay."""
PASSES = 16
"""Forward passes per sample fitted on that measuring risks after every site may cost, or so."""
FEWEST_HELD = 32
"""Samples that a risk is measured on, at least."""


@dataclass(frozen=True)
class Step:
    """What replacing one more site does to the outputs, on samples held out.

    Attributes
    ----------
    tensor
        The site.
    refitted
        Readers with new weights; none where that does not pay or was rolled back.
    predicted
        Risk measured before this site plus its own predicted one; None where the plan predicts no risk of the outputs.
    measured
        Risk of all sites up to this one.
    rolled_back
        New weights went beyond the prediction and did worse than the plan's.
    """

    tensor: str
    refitted: tuple[str, ...]
    predicted: float | None
    measured: float
    rolled_back: bool


def recalibrate(
    source: DenseModel,
    plan: Plan,
    statistics: Statistics,
    samples: Samples,
    held: Samples,
    outputs: Mapping[str, float],
    *,
    batch_size: int,
    seed: int = 0,
    tunable: Tunable | None = None,
    stage: Stage = FORGET,
    progress: Progress = no_progress,
) -> tuple[Plan, tuple[Step, ...]]:
    """Fit the readers of a plan's sites once more, each behind those before it.

    Costs two forward passes over `samples`, and for each site what lies behind it over `held`, once or twice.

    Parameters
    ----------
    samples
        To fit on.
    held
        To measure the risk of the outputs on; of many sites on fewer of them.
    outputs
        Weight by name of the outputs.
    tunable
        Of the same source, where there is one.
    stage
        Where each step is kept.
    """
    batch = source.batch or 1
    basis = next((entry.basis for entry in plan.sites if predictable(entry.basis)), SQUARED_OUTPUTS)
    held = held.take(slice(max(FEWEST_HELD, PASSES * len(samples) // max(len(plan.sites), 1)) // batch * batch))
    tunable, work = tunable or Tunable(source), stage.work
    dense, compiled = (StagedPass(tunable.graph, samples, batch_size, work) for _ in range(2))
    probe = Probe(tunable, dict(outputs) or {source.output: 1.0}, held, batch_size, work)

    def targets_of(entry: SitePlan) -> list[Target]:
        return _targets(source, entry, statistics.moments[entry.tensor].mean)

    def go(entry: SitePlan, targets: Sequence[Target], before: Sequence[SitePlan]) -> Iterator[tuple[Arrays, Arrays]]:
        """Take all that is run up to one site, or to its readers: what these see in both networks."""
        so_far, places = tunable.weights(before), list(dict.fromkeys(target.reader.data for target in targets))
        if places:
            yield from zip(dense.advance(places, tunable.weights(())), compiled.advance(places, so_far), strict=True)
        probe.advance(entry.tensor, before)

    done: list[SitePlan] = []
    steps: list[Step] = []
    before, reused = 0.0, 0
    for entry in progress(plan.sites, "re-calibrate", len(plan.sites)):
        name = f"refit-{digest(known.sha256 for known in (*done, entry))}"
        kept = stage.parcel(name)
        if kept is not None:
            stage.reuse(name, "sites re-calibrated")
            step, windows = _unpacked(kept)
            steps.append(step)
            done.append(entry.model_copy(update={"windows": windows}))
            before, reused = step.measured, reused + 1
            continue
        # By the same stages as without what was kept: other ones round otherwise.
        for i in range(reused):
            for _ in go(done[i], targets_of(done[i]), done[:i]):
                pass
        reused, targets = 0, targets_of(entry)
        fitted = tuple(_refits(targets, go(entry, targets, done), len(samples), batch_size, plan.swap, seed))
        given = {window.reader: window for window in (*entry.windows, *fitted)}
        chosen = entry.model_copy(update={"windows": tuple(given.values())})
        measured, rolled_back = probe.risk([*done, chosen], basis), False
        own = entry.predicted_risk if entry.basis == basis else None
        if fitted and (own is None or measured > before + ROLLBACK * own):
            plain = probe.risk([*done, entry], basis)
            if plain < measured:
                chosen, measured, fitted, rolled_back = entry, plain, (), True
        predicted = None if own is None else before + own
        steps.append(Step(entry.tensor, tuple(w.reader for w in fitted), predicted, measured, rolled_back))
        done.append(chosen)
        before = measured
        stage.keep(name, _packed(steps[-1], chosen.windows))
    return plan.model_copy(update={"sites": tuple(done)}), tuple(steps)


def _packed(step: Step, windows: Sequence[WindowPlan]) -> Parcel:
    """A step and the new weights that it left, to be kept."""
    arrays = {
        f"{i}-{part}": array
        for i, window in enumerate(windows)
        for part in ("places", "columns", "response")
        if (array := getattr(window, part)) is not None
    }
    return Parcel({"step": vars(step), "readers": [window.reader for window in windows]}, arrays)


def _unpacked(kept: Parcel) -> tuple[Step, tuple[WindowPlan, ...]]:
    step = Step(**{**kept.header["step"], "refitted": tuple(kept.header["step"]["refitted"])})
    parts = ("places", "columns", "response")
    windows = (
        WindowPlan.model_validate({"reader": reader, **{part: kept.arrays.get(f"{i}-{part}") for part in parts}})
        for i, reader in enumerate(kept.header["readers"])
    )
    return step, tuple(windows)


def _targets(source: DenseModel, entry: SitePlan, centre: np.ndarray) -> list[Target]:
    site = source.scm.site(entry.tensor)
    if site.rows is not None:  # what its readers see is mixed by attention, or in groups: the law does not hold there
        return []
    views = ((reader, view_of(site, reader)) for reader in site.readers if reader.layout is not None)
    targets = [Target(site, reader, view, entry, centre) for reader, view in views if view is not None]
    return [target for target in targets if target.features <= FEATURES]


def _refits(
    targets: Sequence[Target], seen: Iterable[tuple[Arrays, Arrays]], samples: int, batch: int, swap: float, seed: int
) -> list[WindowPlan]:
    """New weights of the readers of one site, for those where they pay, from what dense and compiled ones see, by batch."""
    halves = [(Sums(target, swap), Sums(target, swap)) for target in targets]
    rng = np.random.default_rng(seed)
    for number, (there, here) in enumerate(seen):
        for target, pair in zip(targets, halves, strict=True):
            name = target.reader.data
            (e, d), marks = target.rows((here[name], there[name]), min(batch, samples - number * batch), samples, rng)
            pair[number % 2].add(e, d, marks)
    found = (refit(pair) for pair in halves)
    return [window for window in found if window is not None]
