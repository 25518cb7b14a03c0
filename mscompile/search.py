"""From data or weights to a verified candidate: calibrate, plan, rewrite, prove, measure, certify."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from mscompile import data as data_module
from mscompile.anchors import Anchors, with_scales
from mscompile.calibration import calibrate
from mscompile.data import Samples
from mscompile.dense import DenseModel, generated_inputs
from mscompile.errors import DataError, GoalError, UnsupportedError
from mscompile.instrument import Measure
from mscompile.metrics import METRICS
from mscompile.operators import IntArray
from mscompile.options import Options
from mscompile.plan import Keep, Plan, make_plan, resolve_keep
from mscompile.prediction import imbalance, site_risks
from mscompile.replacements import CONSTANT, WINDOWED
from mscompile.report import (
    CandidateReport,
    FidelityReport,
    LawReport,
)
from mscompile.rewrite import Compiled, rewrite
from mscompile.runtime import Progress
from mscompile.scm import Site
from mscompile.scores import OBJECTIVES, Scores, score
from mscompile.selection import additive_order, joint_order
from mscompile.sizes import count_parameters
from mscompile.statistics import Statistics
from mscompile.verify import Fidelity, Interchange, Law, fold_error, make_pair
from mscompile.weights import exact_plan

SHARES = {"calibrate": 0.5, "choose": 0.1, "certify": 0.4}
"""How data is split. Fitting wants the most; certifying wants pairs, two samples each."""
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Keep ratios that the search for a fidelity tries, from large to small: an order fixed before any data is seen."""
MAP_STEP = 4
"""Widths of feature maps that the search tries are multiples of it: others take a slower path through onnxruntime."""
STRESS: tuple[tuple[Law, float], ...] = tuple((law, p) for law in get_args(Law) for p in (0.1, 0.5, 1.0))
"""Laws and swap probabilities reported beside the certified ones."""
FEWEST = 16
"""Samples below which nothing is fitted or certified."""
OLDEST_INTERVENTION = 9
"""Opset of the operator Where."""
PROOF_SAMPLES = 256
"""Samples on which the fold error is measured, at most."""


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Result:
    """A verified candidate, with all that the report says of it.

    Attributes
    ----------
    fold_check
        On what the fold error was measured.
    measured
        Measured risk by site tensor, of the quantity that the plan predicts.
    parts
        The data by what it was used for.
    """

    plan: Plan
    compiled: Compiled
    fold_error: float | None
    fold_check: str
    fidelity: FidelityReport | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[CandidateReport, ...] = ()
    parts: Mapping[str, Samples] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def compile_from_weights(source: DenseModel, clock: Clock) -> Result:
    """Compile without data: only what the weights prove."""
    with clock.time("plan"):
        plan = exact_plan(source.scm, source.groups, model_sha256=source.sha256)
    if not plan.sites:
        raise GoalError(
            "without data there is nothing to do",
            where=str(source.path or "model"),
            why="its weights alone prove no unit constant, duplicate or unread",
            hint="give calibration data with --calib\n"
            + data_module.recipe(source.specs, source.path or Path("model.onnx")),
        )
    with clock.time("rewrite"):
        compiled = rewrite(source.model, plan)
    probes = generated_inputs(source.specs)
    error = None
    if probes is not None:
        with clock.time("prove"):
            pair = make_pair(source.model, compiled.model, plan, source.ranks, compiled.alignment)
            error = fold_error(pair, plan, probes, len(probes))
    check = "on generated standard-normal inputs" if probes is not None else "not run: no data, and no inputs to generate"
    warning = "no data: only what the weights prove was done, and fidelity was not measured"
    return Result(plan, compiled, error, check, warnings=(warning,))


def compile_from_data(source: DenseModel, samples: Samples, options: Options, clock: Clock, progress: Progress) -> Result:
    """Compile with data: calibrate, search or take the plan asked for, prove, certify."""
    if len(samples) < FEWEST:
        raise DataError(
            "there are too few samples",
            where=samples.source,
            why=f"{len(samples)} samples; fitting and verifying take at least {FEWEST}",
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
    parts = _split(source, samples, options)
    with clock.time("calibrate"):
        statistics = calibrate(
            source.scm,
            source.sites,
            parts["calibrate"],
            batch_size=options.batch_size,
            measure=what_to_measure(source, options),
            progress=progress,
        )
        source, warnings = _finite(source, statistics)
        if options.replacement == CONSTANT:
            statistics = with_scales(
                source.scm,
                source.sites,
                statistics,
                options.objective,
                parts["calibrate"],
                Anchors(options.anchors, options.seed),
                measure=what_to_measure(source, options),
                batch_size=options.batch_size,
                progress=progress,
            )
        scores = score(source.scm, source.sites, statistics, options.objective, seed=options.seed)
        batch = next(parts["calibrate"].batches(options.batch_size))
        warnings += imbalance(source.model, source.weighted_outputs(options), batch)
    _enough(source, statistics, options)
    with clock.time("plan"):
        orders = order_units(source, statistics, scores, options)
    search = Search(source, statistics, scores, orders, parts, options, clock, progress)
    result = search.smallest() if options.keep is None else search.fixed(options.keep)
    return replace(result, warnings=(*warnings, *result.warnings))


def order_units(source: DenseModel, statistics: Statistics, scores: Scores, options: Options) -> dict[int, IntArray]:
    """Units of each group in the order they go."""
    return {
        group: joint_order(sites, statistics, options.swap) if options.joint else additive_order(sites, scores)
        for group, sites in source.groups.items()
    }


def _split(source: DenseModel, samples: Samples, options: Options) -> dict[str, Samples]:
    """Split as `SHARES` says; where the model takes batches of a fixed size, each part is a multiple of two of them."""
    parts = dict(zip(SHARES, samples.split(tuple(SHARES.values()), options.seed), strict=True))
    if source.batch is None:
        return parts
    whole = 2 * source.batch  # pairs of batches: interchange meets each sample with another
    even = {name: part.take(slice(len(part) // whole * whole)) for name, part in parts.items()}
    for name, part in even.items():
        if not len(part):
            needed = math.ceil(whole / SHARES[name])
            raise DataError(
                "there are too few samples",
                where=samples.source,
                why=f"{len(samples)} samples; with batches of exactly {source.batch} it takes about {needed} to {name}",
                hint="give more data, or export the model with a symbolic batch dimension",
            )
    return even


def _finite(source: DenseModel, statistics: Statistics) -> tuple[DenseModel, tuple[str, ...]]:
    """Leave sites alone where an activation or a reader's weight is NaN or infinite, and say so."""
    groups: dict[int, list[Site]] = {}
    warnings: list[str] = []
    for group, sites in source.groups.items():
        ill = [site.tensor for site in sites if not _is_finite(site, statistics)]
        if ill:
            warnings.append(
                f"site {ill[0]!r} is left alone: its activations or the weights that read it are NaN or infinite"
            )
        else:
            groups[group] = sites
    if not groups:
        raise GoalError(
            "nothing in this model can be cut",
            where=str(source.path or "model"),
            why="activations on the data, or weights, are NaN or infinite at every site",
            hint="look for NaN and infinities in the model and in its data",
        )
    return replace(source, groups=groups), tuple(warnings)


def _is_finite(site: Site, statistics: Statistics) -> bool:
    weights = [reader.weight.const_value for reader in site.readers]
    arrays = [weight.numpy().astype(np.float64) for weight in weights if weight is not None]
    return all(np.isfinite(array).all() for array in (statistics.moments[site.tensor].variance, *arrays))


def what_to_measure(source: DenseModel, options: Options) -> Measure:
    """What the objective and the replacement need to know."""
    objective, outputs = OBJECTIVES[options.objective], source.weighted_outputs(options)
    return Measure(
        covariance=options.replacement != CONSTANT,
        shared=options.swap > 0 and options.replacement not in (CONSTANT, "affine-parents"),
        windows=options.replacement == WINDOWED,
        extremes=True,
        outputs=outputs,
        curvature=objective.curvature if outputs else "none",
        gradient=objective.gradient,
        probes=options.probes,
        seed=options.seed,
        second=objective.curvature != "none",
    )


def _enough(source: DenseModel, statistics: Statistics, options: Options) -> None:
    for site in source.sites:
        count = statistics.moments[site.tensor].count
        if options.replacement != "constant" and count <= site.size:
            raise DataError(
                "there are too few samples for affine replacement",
                where=f"site {site.tensor!r}",
                why=f"{count} observations (samples × positions) for {site.size} channels leave the fit undetermined",
                hint="give more data, leave the site out with --freeze, or use --replacement constant",
            )


@dataclass(frozen=True)
class Candidate:
    """One size, rewritten; `interchange` is None where nothing was cut."""

    keep: float
    plan: Plan
    compiled: Compiled
    interchange: Interchange | None
    params: int


@dataclass(frozen=True)
class Search:
    """Candidates from one calibration."""

    source: DenseModel
    statistics: Statistics
    scores: Scores
    orders: Mapping[int, IntArray]
    parts: Mapping[str, Samples]
    options: Options
    clock: Clock
    progress: Progress

    def fixed(self, keep: Keep | Mapping[str, Keep]) -> Result:
        """The plan that was asked for."""
        return self._finish(self._candidate(keep), (), attempts=1)

    def smallest(self) -> Result:
        """The smallest candidate of the grid whose fidelity is certified.

        Candidates are measured on the `choose` part from large to small until two in a row fall short. Those that did not
        are then tested on the `certify` part in the same order, each at the full δ, up to the first that fails. A wrong
        certificate needs the first untrue claim in that fixed order to pass, so that its probability stays below δ however
        many are tested (fixed-sequence testing; Maurer, Hothorn and Lehmacher 1995).
        """
        tried: list[tuple[Candidate, Fidelity]] = []
        misses = 0
        for keep in self.progress(GRID, "search", len(GRID)):
            candidate = self._candidate(keep, step=MAP_STEP)
            if candidate.interchange is None:
                continue
            fidelity = self._measure(candidate, "choose", self.options.delta)
            tried.append((candidate, fidelity))
            misses = misses + 1 if fidelity.iia < self.options.fidelity else 0
            if misses == 2:
                break
        entries = tuple(CandidateReport(keep=c.keep, params=c.params, iia=f.iia, iia_lower=f.iia_lower) for c, f in tried)
        certified: Candidate | None = None
        attempts, bound = 0, 0.0
        for candidate, chosen in tried:
            if chosen.iia < self.options.fidelity:
                continue
            attempts += 1
            bound = self._measure(candidate, "certify", self.options.delta).iia_lower
            if bound < self.options.fidelity:
                break
            certified = candidate
        if certified is not None:
            return self._finish(certified, entries, attempts=attempts)
        best = max((f.iia for _, f in tried), default=0.0)
        raise GoalError(
            f"no candidate is certified to reach an IIA of {self.options.fidelity:g}",
            where=f"{len(tried)} candidates, {len(self.parts['certify']) // 2} pairs held out to certify",
            why=f"the best IIA measured was {best:.4f}"
            + (f", certified to be at least {bound:.4f}; fewer pairs need a larger margin" if attempts else ""),
            hint="give more data, ask for less with --fidelity, or fix a size with --keep",
        )

    def _candidate(self, keep: Keep | Mapping[str, Keep], *, step: int = 1) -> Candidate:
        """Plan and rewrite; widths of feature maps are rounded up to multiples of `step`."""
        source, options = self.source, self.options
        counts = resolve_keep(source.scm, source.groups, keep)
        for group in counts:
            if any(site.axis == 1 and source.ranks[site.tensor] > 2 for site in source.groups[group]):
                counts[group] = min(math.ceil(counts[group] / step) * step, len(self.orders[group]))
        with self.clock.time("plan"):
            plan = make_plan(
                source.scm,
                self.statistics,
                self.scores,
                source.groups,
                self.orders,
                counts,
                model_sha256=source.sha256,
                replacement=options.replacement,
                swap=options.swap,
            )
        with self.clock.time("rewrite"):
            compiled = rewrite(source.model, plan)
        interchange = None
        if plan.sites:
            with self.clock.time("verify"):
                pair = make_pair(source.model, compiled.model, plan, source.ranks, compiled.alignment)
                metric = None if options.metric is None else METRICS[options.metric]
                interchange = Interchange(pair, self.parts["choose"], batch_size=options.batch_size, metric=metric)
        ratio = float(keep) if isinstance(keep, float) else float("nan")
        return Candidate(ratio, plan, compiled, interchange, count_parameters(compiled.model))

    def _measure(
        self, candidate: Candidate, part: str, delta: float, law: Law | None = None, swap: float | None = None
    ) -> Fidelity:
        """Interchange on one part, under the law asked for unless another is given."""
        assert candidate.interchange is not None
        law = self.options.law if law is None else law
        swap = self.options.swap if swap is None else swap
        with self.clock.time("verify"):
            return candidate.interchange.run(
                self.parts[part], law=law, swap=swap, seed=self.options.seed, delta=delta, progress=self.progress
            )

    def _finish(self, candidate: Candidate, entries: tuple[CandidateReport, ...], *, attempts: int) -> Result:
        """Prove the fold, measure everything on the `certify` part."""
        options = self.options
        if candidate.interchange is None:
            return Result(
                candidate.plan,
                candidate.compiled,
                0.0,
                "nothing was replaced",
                candidates=entries,
                parts=self.parts,
                warnings=("nothing was cut: the goal keeps every unit",),
            )
        interchange = candidate.interchange
        batch = self.source.batch or 1
        proof = self.parts["choose"].take(slice(max(PROOF_SAMPLES // batch, 1) * batch))
        with self.clock.time("prove"):
            error = fold_error(interchange.pair, candidate.plan, proof, options.batch_size)
        with self.clock.time("check"):
            source = self.source
            outputs = source.weighted_outputs(options)
            risks = site_risks(source.model, candidate.plan, source.ranks, outputs, proof, options.batch_size)
        main = self._measure(candidate, "certify", options.delta)
        stress = [
            self._measure(candidate, "certify", options.delta, law, swap)
            for law, swap in STRESS
            if (law, swap) != (options.law, options.swap) and (law == options.law or len(candidate.plan.sites) > 1)
        ]
        with self.clock.time("verify"):
            plain = interchange.plain(self.parts["certify"])
        fidelity = FidelityReport(
            metric=interchange.metric.name,
            iia=main.iia,
            # Where candidates were tested in turn, what holds with probability 1 − δ is that each reaches the goal.
            iia_lower=options.fidelity if entries else main.iia_lower,
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
            stress=[
                LawReport(
                    law=s.law, swap=s.swap, trials=s.trials, iia=s.iia, logit_mse_relative=s.logit_mse_relative, kl=s.kl
                )
                for s in stress
            ],
        )
        warnings = self.scores.warnings if options.replacement == CONSTANT else ()
        if candidate.compiled.unfolded:
            listed = ", ".join(candidate.compiled.unfolded)
            warnings = (*warnings, f"not folded, and so not as small as planned: {listed}")
        check = f"on {len(proof)} samples that took no part in calibration"
        return Result(candidate.plan, candidate.compiled, error, check, fidelity, risks, entries, self.parts, warnings)
