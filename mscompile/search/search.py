"""From data or weights to a verified candidate: calibrate, choose widths for the goal, rewrite, prove, measure, certify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

from mscompile.calibration.anchors import Anchors, with_scales
from mscompile.calibration.batches import fitting_batch, is_large
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.prediction import imbalance, site_risks
from mscompile.calibration.statistics import Statistics
from mscompile.clock import Clock
from mscompile.errors import DataError, GoalError, UnsupportedError
from mscompile.intake import data as data_module
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, generated_inputs
from mscompile.network.sizes import measure_latency
from mscompile.options import Options, what_candidates_depend_on
from mscompile.planning.plan import Plan, resolve_keep
from mscompile.planning.preparation import eliminate, finite_sites, split, what_to_measure
from mscompile.planning.recalibration import Step
from mscompile.planning.replacements import CONSTANT
from mscompile.planning.scores import score
from mscompile.planning.shrinkage import with_shrinkage
from mscompile.planning.weights import exact_plan
from mscompile.report import FidelityReport, LawReport
from mscompile.rewrite import Compiled, rewrite
from mscompile.runs.run import Run
from mscompile.runtime import Progress, sparing
from mscompile.search.candidates import Candidate, Fits, Workshop
from mscompile.search.frontier import Frontier, Tried
from mscompile.verification.certificate import risk_bound
from mscompile.verification.verify import Fidelity, Law, fold_error, make_pair

STRESS: tuple[tuple[Law, float], ...] = tuple((law, p) for law in get_args(Law) for p in (0.1, 0.5, 1.0))
"""Laws and swap probabilities reported beside the certified ones."""
FEWEST = 16
"""Samples below which nothing is fitted or certified."""
OLDEST_INTERVENTION = 9
"""Opset of the operator Where."""
PLAIN = 1 / 3
"""Share of the candidates that reach a fidelity, the largest of them, that are tested without re-calibrating them first."""
NEAR = 2
"""Candidates next larger than the smallest that is expected to be certified, which are tested before it."""
MISSES = 2
"""Candidates in a row that fall short of a fidelity before the search stops."""
ATTEMPTS = 6
"""Candidates measured for a latency: the table foretells, and what it missed moves the aim."""


@dataclass(frozen=True)
class Result:
    """A verified candidate, with all that the report says of it.

    Attributes
    ----------
    fold_check
        On what the fold error was measured.
    measured
        Measured risk by site tensor, of the quantity that the plan predicts.
    steps
        What re-calibration found, site by site.
    tried
        Candidates along the frontier of size and fidelity.
    parts
        The data by what it was used for.
    batch
        Samples at a time.
    """

    plan: Plan
    compiled: Compiled
    fold_error: float | None
    fold_check: str
    fidelity: FidelityReport | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    tried: tuple[Tried, ...] = ()
    parts: Mapping[str, Samples] = field(default_factory=dict)
    batch: int | None = None
    warnings: tuple[str, ...] = ()


def compile_from_weights(source: DenseModel, options: Options, clock: Clock) -> Result:
    """Compile without data: only what the weights prove.

    Raises
    ------
    GoalError
        They prove nothing, or the goal is a size.
    """
    with clock.time("plan"):
        plan = exact_plan(source.scm, source.groups, model_sha256=source.sha256)
    recipe = data_module.recipe(source.specs, source.path or Path("model.onnx"))
    if not plan.sites:
        raise GoalError(
            "without data there is nothing to do",
            where=str(source.path or "model"),
            why="its weights alone prove no unit constant, duplicate or unread",
            hint=f"give calibration data with --calib\n{recipe}",
        )
    if options.sized:
        removed = sum(site.size - len(site.kept) for site in plan.sites)
        raise GoalError(
            f"without data the goal {options.goal} cannot be pursued",
            where=str(source.path or "model"),
            why=f"its weights alone prove {removed} units constant, duplicate or unread, whatever the goal",
            hint=f"leave the goal out to remove those alone, or give calibration data with --calib\n{recipe}",
        )
    with clock.time("rewrite"):
        compiled = rewrite(source.model, plan)
    probes = generated_inputs(source.specs)
    error = None
    if probes is not None:
        with clock.time("prove"):
            pair = make_pair(source.scm, compiled.model, plan, compiled.alignment)
            error = fold_error(pair, plan, probes, len(probes))
    check = "on generated standard-normal inputs" if probes is not None else "not run: no data, and no inputs to generate"
    warning = "no data: only what the weights prove was done, and fidelity was not measured"
    return Result(plan, compiled, error, check, warnings=(warning,))


def compile_from_data(
    source: DenseModel, samples: Samples, options: Options, clock: Clock, run: Run, progress: Progress
) -> Result:
    """Compile with data: calibrate, choose widths for the goal, prove, certify."""
    if len(samples) < FEWEST:
        raise DataError(
            "there are too few samples",
            where=samples.source,
            why=f"number of samples: {len(samples)}; fitting and verifying take at least {FEWEST}",
            hint="give more data; some hundred samples are a good start",
        )
    opset = source.model.opset_imports.get("", OLDEST_INTERVENTION)
    if opset < OLDEST_INTERVENTION:
        raise UnsupportedError(
            "the model's opset is too old for interventions",
            where=str(source.path or "model"),
            why=f"it imports opset {opset}; they take the operator Where, which there is from {OLDEST_INTERVENTION} on",
            hint="convert it with onnx.version_converter, or export it again",
        )
    parts = split(source, samples, options)
    with clock.time("calibrate"):
        measure = what_to_measure(source, options)
        batch = fitting_batch(source.scm, source.sites, parts["calibrate"], measure, options.batch_size, run)
        options = replace(options, batch_size=batch)
        statistics = calibrate(
            source.scm,
            source.sites,
            parts["calibrate"],
            batch_size=batch,
            measure=measure,
            run=run,
            progress=progress,
        )
        source, warnings = finite_sites(source, statistics)
        if options.replacement == CONSTANT:
            statistics = with_scales(
                source.scm,
                source.sites,
                statistics,
                options.objective,
                parts["calibrate"],
                Anchors(options.anchors, options.seed),
                measure=measure,
                batch_size=batch,
                run=run,
                progress=progress,
            )
        scores = score(source.scm, source.sites, statistics, options.objective, seed=options.seed)
        warnings += imbalance(source.model, source.weighted_outputs(options), next(parts["calibrate"].batches(batch)))
    with clock.time("plan"):
        statistics, shares = with_shrinkage(
            source,
            statistics,
            scores,
            parts["choose"],
            replacement=options.replacement,
            swap=options.swap,
            batch_size=batch,
            run=run,
            progress=progress,
        )
        eliminations = eliminate(source, statistics, scores, options)
    stage = run.work.stage("search", data=samples.sha256, options=what_candidates_depend_on(options))
    search = Search(Workshop(source, statistics, scores, eliminations, parts, options, clock, progress, stage))
    with sparing(is_large(source.scm, source.sites, parts["calibrate"], measure, batch)):
        result = search.run()
    return replace(result, batch=batch, warnings=(*warnings, *_few(shares, statistics), *result.warnings))


def _few(shares: Mapping[str, float], statistics: Statistics) -> tuple[str, ...]:
    """What is to be said of sites with few observations."""
    if not shares:
        return ()
    worst = min(shares, key=lambda tensor: statistics.moments[tensor].count / len(statistics.moments[tensor].mean))
    moments, changed = statistics.moments[worst], [share for share in shares.values() if share]
    shrunk = f"; covariances of {len(changed)} of them were shrunk, by λ up to {max(changed):g}" if changed else ""
    return (
        f"there is little data for {len(shares)} of {len(statistics.moments)} sites (site {worst!r}: {moments.count} "
        f"observations of {len(moments.mean)} channels): more would fit better{shrunk}",
    )


@dataclass(frozen=True)
class Search:
    """The goals."""

    workshop: Workshop

    @cached_property
    def frontier(self) -> Frontier:
        """Risk curves and candidates over all groups."""
        return Frontier(self.workshop)

    @property
    def options(self) -> Options:
        """What was asked for."""
        return self.workshop.options

    def run(self) -> Result:
        """Reach the goal.

        Raises
        ------
        GoalError
            It cannot be reached.
        """
        options, source = self.options, self.workshop.source
        if options.keep is not None:
            counts = resolve_keep(source.scm, source.groups, options.keep)
            return self._finish(self.workshop.make(counts, recalibrated=options.recalibrate))
        if options.latency is not None:
            return self._fast(options.latency)
        for kind, share in (("params", options.params), ("macs", options.macs)):
            if share is not None:
                candidate = self.workshop.make(self._reach(kind, share), recalibrated=options.recalibrate)
                return self._finish(candidate)
        return self._smallest(options.fidelity)

    def _reach(self, kind: str, share: float) -> dict[int, int]:
        """Widths for a share of the dense model's cost."""
        counts, least = self.frontier.reach(kind, share)
        if counts is None:
            raise GoalError(
                f"the goal --{kind} {share:g} cannot be reached",
                where=f"{len(self.workshop.source.groups)} groups of channels that can be cut",
                why=f"with all of them at their narrowest {least:.1%} of the dense model are left",
                hint="ask for more, or see `mscompile inspect MODEL` for what is left alone and why",
            )
        return counts

    def _fast(self, goal: float) -> Result:
        """The candidate of least risk whose latency, measured beside that of the dense model, is within the goal."""
        workshop, batch = self.workshop, self.workshop.batch
        samples, aim, best = workshop.parts["calibrate"], goal, 1.0
        for _ in range(ATTEMPTS):
            counts, _ = self.frontier.reach("latency", aim)
            if counts is None:
                break
            candidate = workshop.make(counts, recalibrated=False)
            with workshop.clock.time("measure"):
                dense, compiled = measure_latency(workshop.source.model, candidate.compiled.model, samples, batch)
            best = min(best, compiled / dense)
            if compiled <= goal * dense:
                return self._finish(workshop.make(counts, recalibrated=self.options.recalibrate))
            aim *= 0.98 * goal * dense / compiled
        raise GoalError(
            f"the goal --latency {goal:g} cannot be reached",
            where=f"batches of {min(batch, len(samples))} on this machine",
            why=f"the fastest candidate measured takes {best:.1%} of the dense model's time",
            hint="ask for more, or try another --batch-size: some operators gain little from fewer channels",
        )

    def _smallest(self, goal: float) -> Result:
        """The smallest candidate of the frontier whose fidelity is certified.

        Candidates that reach the goal on the `choose` part are tested on the `certify` part from large to small, each at the
        full δ, up to the first that fails: the first `PLAIN` of them as fitted, then re-calibrated, see `_recalibrated`.
        A wrong certificate needs the first untrue claim in that order, which `choose` alone determines, to pass: its
        probability stays below δ however many are tested (fixed-sequence testing; Maurer, Hothorn and Lehmacher 1995).
        """
        workshop, options, frontier = self.workshop, self.options, self.frontier
        tried = frontier.tried()
        good = [entry for entry in tried if entry.point.iia >= goal]
        plain = good[: int(PLAIN * len(good))] if options.recalibrate else good
        best = max((entry.point.iia for entry in tried), default=0.0)
        attempts, bound = 0, 1.0
        last: Candidate | Tried | None = None
        for entry in plain:
            attempts += 1
            point = frontier.measure(entry.counts, "certify")
            bound = 1.0 - risk_bound(point.disagreements, point.trials, options.delta)
            if bound < goal:
                break
            last = entry
        if bound >= goal and options.recalibrate:
            seen: dict[int, float] = {}
            for fits in self._recalibrated(tried[tried.index(plain[-1]) + 1 if plain else 0 :], goal, seen):
                attempts += 1
                candidate = workshop.opened(*fits)
                bound = workshop.measure(candidate, "certify").iia_lower
                if bound < goal:
                    break
                last = candidate
            best = max(best, *seen.values(), 0.0)
        if last is None:
            raise GoalError(
                f"no candidate is certified to reach an IIA of {goal:g}",
                where=f"{len(tried)} candidates, {len(workshop.parts['certify']) // 2} pairs held out to certify",
                why=f"the best IIA measured was {best:.4f}"
                + (f", certified to be at least {bound:.4f}; fewer pairs need a larger margin" if attempts else ""),
                hint="give more data, ask for less with --fidelity, or fix a size with --keep",
            )
        candidate = last if isinstance(last, Candidate) else workshop.make(last.counts, recalibrated=False)
        return self._finish(candidate, attempts=attempts, certified=goal)

    def _recalibrated(self, entries: Sequence[Tried], goal: float, seen: dict[int, float]) -> Iterator[Fits]:
        """Re-calibrated fits that reach a goal on `choose`, from large to small.

        Bisection finds the smallest that can be expected to be certified, at the mean of the rate of disagreement that its
        trials on `choose` leave possible: half of one more in one more. First come those larger ones that it has met, then,
        from `NEAR` before that one on (all, where there is none), one after the other until `MISSES` in a row fall short.

        Parameters
        ----------
        seen
            IIA on `choose` by number of those re-calibrated, filled here.
        """
        workshop = self.workshop
        chosen, pairs = (len(workshop.parts[part]) // 2 for part in ("choose", "certify"))
        found: dict[int, Fits] = {}

        def measured(number: int) -> float:
            if number not in seen:
                found[number] = workshop.fit(entries[number].counts, recalibrated=True)
                seen[number] = workshop.measure(workshop.opened(*found[number]), "choose").iia
            return seen[number]

        low, high = -1, len(entries)
        while high - low > 1:
            middle = (low + high) // 2
            rate = ((1.0 - measured(middle)) * chosen + 0.5) / (chosen + 1)
            certified = 1.0 - risk_bound(rate * pairs, pairs, self.options.delta) >= goal
            low, high = (middle, high) if certified else (low, middle)
        start = max(low - NEAR, 0)
        yield from (found[number] for number in sorted(found) if number < start and seen[number] >= goal)
        misses = 0
        for number in range(start, len(entries)):
            misses = 0 if measured(number) >= goal else misses + 1
            if misses == MISSES:
                return
            if not misses:
                yield found.pop(number)

    def _finish(self, candidate: Candidate, *, attempts: int = 1, certified: float | None = None) -> Result:
        """Prove the fold, measure everything on the `certify` part; `certified` is the goal that tests in turn proved."""
        workshop, options = self.workshop, self.options
        tried: tuple[Tried, ...] = ()
        kept: tuple[str, ...] = ()
        if options.keep is None:
            tried, kept = self.frontier.tried(), self.frontier.keep_table()
        if candidate.interchange is None:
            warnings = (*kept, "nothing was cut: the goal keeps every unit")
            done = "nothing was replaced"
            return Result(
                candidate.plan, candidate.compiled, 0.0, done, tried=tried, parts=workshop.parts, warnings=warnings
            )
        interchange, source, proof = candidate.interchange, workshop.source, workshop.held
        with workshop.clock.time("prove"):
            error = fold_error(interchange.pair, candidate.plan, proof, workshop.batch)
        with workshop.clock.time("check"):
            outputs = source.weighted_outputs(options)
            opened = interchange.engine.dense
            risks = site_risks(source.model, candidate.fitted, source.ranks, outputs, proof, workshop.batch, opened)
        main = workshop.measure(candidate, "certify")
        stress = [
            workshop.measure(candidate, "certify", law, swap)
            for law, swap in STRESS
            if (law, swap) != (options.law, options.swap) and (law == options.law or len(candidate.plan.sites) > 1)
        ]
        with workshop.clock.time("verify"):
            plain = interchange.plain(workshop.parts["certify"])
        fidelity = FidelityReport(
            metric=interchange.metric.name,
            iia=main.iia,
            # Where candidates were tested in turn, what holds with probability 1 − δ is that each reaches the goal; those
            # tested as the sweep ran them have yet to show it as files.
            iia_lower=min(main.iia_lower, 1.0 if certified is None else certified),
            law=main.law,
            swap=main.swap,
            delta=main.delta,
            attempts=attempts,
            trials=main.trials,
            disagreements=main.disagreements,
            agreement=plain["agreement"] or 0.0,
            logit_mse_relative=main.logit_mse_relative,
            kl=main.kl,
            accuracy_dense=plain["accuracy_dense"],
            accuracy_compiled=plain["accuracy_compiled"],
            full_source_checked=interchange.full_source_checked,
            stress=[_law_report(entry) for entry in stress],
        )
        warnings = (*kept, *(workshop.scores.warnings if options.replacement == CONSTANT else ()))
        if (misfit := interchange.misfit(workshop.parts["certify"])) is not None:
            warnings = (*warnings, misfit)
        if candidate.compiled.unfolded:
            listed = ", ".join(candidate.compiled.unfolded)
            warnings = (*warnings, f"not folded, and so not as small as planned: {listed}")
        return Result(
            candidate.plan,
            candidate.compiled,
            error,
            f"on {len(proof)} samples that took no part in calibration",
            fidelity,
            risks,
            candidate.steps,
            tried,
            workshop.parts,
            warnings=warnings,
        )


def _law_report(found: Fidelity) -> LawReport:
    return LawReport(
        law=found.law,
        swap=found.swap,
        trials=found.trials,
        iia=found.iia,
        logit_mse_relative=found.logit_mse_relative,
        kl=found.kl,
    )
