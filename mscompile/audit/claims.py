"""Claims tested trial by trial, and what is measured beside them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mscompile.audit.outputs import Measure, largest
from mscompile.audit.report import Claim, Comparison, Convention, LawFound, PlainFound
from mscompile.audit.setup import AuditOptions, Setup
from mscompile.runs.work import Stage
from mscompile.runtime import Progress, no_progress
from mscompile.verification.certificate import SequentialTest, betting_bound, hoeffding_bound, risk_bound, risk_floor
from mscompile.verification.interchange import Law, Trials, disjoint_pairs
from mscompile.verification.metrics import Difference, relative_mse
from mscompile.verification.trials import Design, Shards, run_trials

SWAPS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Swap probabilities of the table of laws."""


@dataclass(frozen=True)
class Tested:
    """A claim decided, and the losses it was decided on."""

    claim: Claim
    losses: npt.NDArray[np.float64]


def decide_claims(setup: Setup, options: AuditOptions, progress: Progress = no_progress) -> list[Tested]:
    """Test every claim; those under one law and swap probability share their trials, and stop when all are decided."""
    measures = setup.measures
    count = len(options.laws) * len(options.swaps) * len(options.conventions) * len(measures)
    delta = options.delta / count
    tested = []
    for law in options.laws:
        for swap in options.swaps:
            tests = [
                (convention, measure, SequentialTest(options.fidelity, delta), list[npt.NDArray[np.float64]]())
                for convention in options.conventions
                for measure in measures
            ]
            with contextlib.closing(stream(setup, options, law, swap, options.trials, progress)) as found:
                for trials in found:
                    for convention, measure, test, losses in tests:
                        answer = trials.matched if convention == "matched" else trials.own
                        assert answer is not None
                        losses.append(measure.loss(trials.dense, answer))
                        test.update(losses[-1])
                    if all(test.verdict != "undecided" for _, _, test, _ in tests):
                        break
            for convention, measure, test, losses in tests:
                used = np.concatenate(losses)[: test.trials] if losses else np.zeros(0)
                tested.append(Tested(_claim(test, used, law, swap, convention, measure), used))
    return tested


def stream(
    setup: Setup,
    options: AuditOptions,
    law: Law,
    swap: float,
    most: int | None,
    progress: Progress = no_progress,
    *,
    own: bool | None = None,
) -> Generator[Trials, None, None]:
    """Interchanges under a law, in the order that the seed gives."""
    base, source = disjoint_pairs(len(setup.samples), options.seed)
    count = len(base) if most is None else min(most, len(base))
    both = "own" in options.conventions if own is None else own
    design, size = Design(law, float(swap), options.seed, both), setup.engine.batch_size
    trial_bytes = setup.engine.answer_bytes * (3 if both else 2)
    shards = Shards(setup.samples, base[:count], source[:count], design, size, trial_bytes)
    with contextlib.closing(run_trials(setup.task, shards, run=setup.run, stage=_stage(setup, options))) as batches:
        yield from progress(batches, f"interchange, {law}, swap {swap:g}", math.ceil(count / size))


def _stage(setup: Setup, options: AuditOptions) -> Stage:
    """Where trials are kept, under all that their outputs depend on beside the law."""
    return setup.run.work.stage(
        "interchange",
        dense=setup.dense.sha256,
        compiled=setup.compiled.sha256,
        tau=[site.model_dump(mode="json", exclude={"alike"}) for site in setup.sites],
        data=setup.samples.sha256,
        seed=options.seed,
        batch_size=setup.engine.batch_size,
        outputs=setup.engine.answers,
    )


def _claim(
    test: SequentialTest,
    losses: npt.NDArray[np.float64],
    law: Law,
    swap: float,
    convention: Convention,
    measure: Measure,
) -> Claim:
    total, trials, delta = test.total, test.trials, test.delta
    return Claim(
        outputs=list(measure.outputs),
        law=law,
        swap=swap,
        convention=convention,
        metric=measure.metric,
        fidelity=test.fidelity,
        delta=delta,
        verdict=test.verdict,
        trials=trials,
        disagreements=total,
        iia=1.0 - total / max(trials, 1),
        iia_lower=1.0 - risk_bound(total, trials, delta),
        iia_upper=1.0 - risk_floor(total, trials, delta),
        hoeffding_lower=1.0 - hoeffding_bound(total, trials, delta),
        betting_lower=1.0 - betting_bound(losses, delta),
    )


# --- what is measured beside ------------------------------------------------------------------------------------------


def measure_laws(setup: Setup, options: AuditOptions, progress: Progress = no_progress) -> list[LawFound]:
    """IIA by law and swap probability in both conventions; trials of all lines share their random numbers."""
    laws: tuple[Law, ...] = ("one-site", "all-sites") if len(setup.tau.sites) > 1 else ("one-site",)
    measure, output = setup.measures[0], setup.engine.output
    found = []
    for law in laws if options.table else ():
        for swap in SWAPS:
            count, matched, own = 0, 0.0, 0.0
            each = dict.fromkeys(measure.outputs, 0.0)
            difference = Difference(classes=measure.first.classes)
            for trials in stream(setup, options, law, swap, options.table, progress, own=True):
                assert trials.own is not None
                count += len(trials.base)
                losses = measure.by_output(trials.dense, trials.matched)
                matched += float(largest(losses.values()).sum())
                own += float(measure.loss(trials.dense, trials.own).sum())
                each = {name: total + float(losses[name].sum()) for name, total in each.items()}
                difference.add(trials.dense[output], trials.matched[output])
            found.append(
                LawFound(
                    law=law,
                    swap=swap,
                    trials=count,
                    iia_matched=1.0 - matched / count,
                    iia_own=1.0 - own / count,
                    by_output=_by_output(each, count),
                    logit_mse_relative=difference.relative_mse,
                    kl=difference.kl,
                )
            )
    return found


def _by_output(losses: dict[str, float], count: int) -> dict[str, float]:
    """Mean agreement of each of several outputs."""
    return {name: 1.0 - total / count for name, total in losses.items()} if len(losses) > 1 else {}


def measure_plain(setup: Setup) -> PlainFound:
    """Agreement and accuracies without intervention, over all samples."""
    measure, output, labels = setup.measures[0], setup.engine.output, setup.samples.labels
    dense, compiled = setup.engine.plain(setup.samples)
    losses = measure.by_output(dense, compiled)
    return PlainFound(
        agreement=1.0 - float(largest(losses.values()).mean()),
        by_output=_by_output({name: float(loss.sum()) for name, loss in losses.items()}, len(setup.samples)),
        logit_mse_relative=relative_mse(dense[output], compiled[output]),
        accuracy_dense=measure.first.accuracy(dense[output], labels),
        accuracy_compiled=measure.first.accuracy(compiled[output], labels),
    )


def compare(ours: Setup, other: Setup, options: AuditOptions, progress: Progress = no_progress) -> Comparison:
    """How much more often another compiled model disagrees, on the same pairs with the same random numbers.

    With Z and Z' the losses of the two in a trial, W = (1 + Z' − Z) / 2 lies in [0, 1]; E[W] = ½ where neither is better.
    Bounds on E[W] are bounds on the difference 2 E[W] − 1; each end at half of δ.

    The paired test is a sign test on the trials in which Z and Z' differ, as McNemar's is, but may be looked at after every
    one: the chance that Z' is the larger is ½ where neither is better, and is tested to both sides at half of δ.
    """
    law, swap = options.laws[0], options.swaps[0]
    total, plain, others, count = 0.0, 0.0, 0.0, 0
    test = SequentialTest(0.5, options.delta / 2.0)
    streams = [(stream(s, options, law, swap, options.trials, progress, own=False), s.measures[0]) for s in (ours, other)]
    measured = [[measure.loss(trials.dense, trials.matched) for trials in found] for found, measure in streams]
    for one, two in zip(*measured, strict=True):
        total += float(((1.0 + two - one) / 2.0).sum())
        plain, others, count = plain + float(one.sum()), others + float(two.sum()), count + len(one)
        test.update((two > one)[two != one].astype(np.float64))
    delta = options.delta / 2.0
    against = round(test.total)
    return Comparison(
        other=other.compiled.file,
        trials=count,
        iia=1.0 - plain / count,
        iia_other=1.0 - others / count,
        difference=2.0 * total / count - 1.0,
        difference_lower=2.0 * risk_floor(total, count, delta) - 1.0,
        difference_upper=2.0 * risk_bound(total, count, delta) - 1.0,
        for_other=test.trials - against,
        against_other=against,
        verdict={"certified": "better", "refuted": "worse", "undecided": "undecided"}[test.verdict],  # type: ignore[arg-type]
        delta=options.delta,
    )
