"""Claims tested trial by trial, and what is measured beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.audit.report import Claim, Comparison, Convention, LawFound, PlainFound
from mscompile.audit.setup import AuditOptions, Setup
from mscompile.certificate import SequentialTest, betting_bound, hoeffding_bound, risk_bound, risk_floor
from mscompile.errors import UsageError
from mscompile.interchange import Law, Trials, disjoint_pairs
from mscompile.metrics import Difference, Metric, choose_metric, relative_mse
from mscompile.runtime import Progress, no_progress

SWAPS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Swap probabilities of the table of laws."""


@dataclass(frozen=True)
class Tested:
    """A claim decided, and the losses it was decided on."""

    claim: Claim
    losses: npt.NDArray[np.float64]


def decide_claims(setup: Setup, options: AuditOptions, progress: Progress = no_progress) -> list[Tested]:
    """Test every claim; those under one law and swap probability share their trials, and stop when all are decided."""
    metrics = [choose_metric(name, setup.metric) for name in options.metrics]
    count = len(options.laws) * len(options.swaps) * len(options.conventions) * len(metrics)
    delta = options.delta / count
    tested = []
    for law in options.laws:
        for swap in options.swaps:
            tests: dict[tuple[Convention, str], tuple[Metric, SequentialTest, list[npt.NDArray[np.float64]]]] = {
                (convention, metric.name): (metric, SequentialTest(options.fidelity, delta), [])
                for convention in options.conventions
                for metric in metrics
            }
            for trials in stream(setup, options, law, swap, options.trials, progress):
                for (convention, _), (metric, test, losses) in tests.items():
                    answer = trials.matched if convention == "matched" else trials.own
                    assert answer is not None
                    loss = checked(metric, trials.dense, answer)
                    losses.append(loss)
                    test.update(loss)
                if all(test.verdict != "undecided" for _, test, _ in tests.values()):
                    break
            for (convention, name), (_, test, losses) in tests.items():
                used = np.concatenate(losses)[: test.trials] if losses else np.zeros(0)
                tested.append(Tested(_claim(test, used, law, swap, convention, name), used))
    return tested


def checked(metric: Metric, dense: npt.NDArray[Any], compiled: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Losses of a metric, which may be a user's own.

    Raises
    ------
    UsageError
        They are not numbers in [0, 1], one a sample: the certificate would not hold.
    """
    loss = np.asarray(metric.loss(dense, compiled), dtype=np.float64)
    if loss.shape != (len(dense),) or not ((loss >= 0.0) & (loss <= 1.0)).all():
        raise UsageError(
            "the metric cannot be used",
            where=metric.name,
            why=f"of {len(dense)} losses in [0, 1] it gave shape {loss.shape}, the largest {loss.max(initial=-np.inf):g}",
            hint="return one number per sample, 0 where the outputs agree",
        )
    return loss


def stream(
    setup: Setup,
    options: AuditOptions,
    law: Law,
    swap: float,
    most: int | None,
    progress: Progress = no_progress,
    *,
    own: bool | None = None,
) -> Any:
    """Interchanges under a law, in the order that the seed gives."""
    base, source = disjoint_pairs(len(setup.samples), options.seed)
    count = len(base) if most is None else min(most, len(base))
    both = "own" in options.conventions if own is None else own
    batches = setup.engine.trials(
        setup.samples, base[:count], source[:count], law=law, swap=swap, seed=options.seed, own=both
    )
    return progress(batches, f"interchange, {law}, swap {swap:g}", math.ceil(count / setup.engine.batch_size))


def _claim(
    test: SequentialTest, losses: npt.NDArray[np.float64], law: Law, swap: float, convention: Convention, metric: str
) -> Claim:
    total, trials, delta = test.total, test.trials, test.delta
    return Claim(
        law=law,
        swap=swap,
        convention=convention,
        metric=metric,
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
    metric = choose_metric(options.metrics[0], setup.metric)
    found = []
    for law in laws if options.table else ():
        for swap in SWAPS:
            count, matched, own = 0, 0.0, 0.0
            difference = Difference(classes=metric.classes)
            for trials in stream(setup, options, law, swap, options.table, progress, own=True):
                count += len(trials.base)
                matched += float(checked(metric, trials.dense, trials.matched).sum())
                own += float(checked(metric, trials.dense, trials.own).sum())
                difference.add(trials.dense, trials.matched)
            found.append(
                LawFound(
                    law=law,
                    swap=swap,
                    trials=count,
                    iia_matched=1.0 - matched / count,
                    iia_own=1.0 - own / count,
                    logit_mse_relative=difference.relative_mse,
                    kl=difference.kl,
                )
            )
    return found


def measure_plain(setup: Setup, metric: Metric) -> PlainFound:
    """Agreement and accuracies without intervention, over all samples."""
    dense, compiled = setup.engine.plain(setup.samples)
    return PlainFound(
        agreement=1.0 - float(checked(metric, dense, compiled).mean()),
        logit_mse_relative=relative_mse(dense, compiled),
        accuracy_dense=metric.accuracy(dense, setup.samples.labels),
        accuracy_compiled=metric.accuracy(compiled, setup.samples.labels),
    )


def compare(ours: Setup, other: Setup, options: AuditOptions, progress: Progress = no_progress) -> Comparison:
    """How much more often another compiled model disagrees, on the same pairs with the same random numbers.

    With Z and Z' the losses of the two in a trial, W = (1 + Z' − Z) / 2 lies in [0, 1]; E[W] = ½ where neither is better.
    Bounds on E[W] are bounds on the difference 2 E[W] − 1; each end at half of δ.
    """
    law, swap = options.laws[0], options.swaps[0]
    metric = choose_metric(options.metrics[0], ours.metric)
    total, plain, others, count = 0.0, 0.0, 0.0, 0
    streams = [stream(setup, options, law, swap, options.trials, progress, own=False) for setup in (ours, other)]
    for one, two in zip(*(_losses(found, metric) for found in streams), strict=True):
        total += float(((1.0 + two - one) / 2.0).sum())
        plain, others, count = plain + float(one.sum()), others + float(two.sum()), count + len(one)
    delta = options.delta / 2.0
    return Comparison(
        other=other.compiled.file,
        trials=count,
        iia=1.0 - plain / count,
        iia_other=1.0 - others / count,
        difference=2.0 * total / count - 1.0,
        difference_lower=2.0 * risk_floor(total, count, delta) - 1.0,
        difference_upper=2.0 * risk_bound(total, count, delta) - 1.0,
        delta=options.delta,
    )


def _losses(found: Iterable[Trials], metric: Metric) -> Iterable[npt.NDArray[np.float64]]:
    for trials in found:
        yield checked(metric, trials.dense, trials.matched)
