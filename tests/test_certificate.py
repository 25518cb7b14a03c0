"""The certificate against quadrature, and against looking after every trial at a risk that just fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from mscompile.verification.certificate import (
    SequentialTest,
    betting_bound,
    betting_capital,
    hoeffding_bound,
    log_evidence,
    risk_bound,
    risk_floor,
)

DELTA = 0.05
TARGET = math.log(1 / DELTA)
RUNS, TRIALS = 2000, 1000
QUADRATURE = 1e-7
"""Absolute, of a logarithm: well above the error that adaptive quadrature reports."""


@pytest.mark.parametrize(
    ("total", "trials", "risk"), [(0, 1, 0.5), (0, 40, 0.1), (3, 50, 0.2), (2.5, 20, 0.3), (9, 10, 0.4)]
)
def test_evidence_is_a_mixture_of_likelihood_ratios(total: float, trials: int, risk: float) -> None:
    prior = scipy.stats.beta(0.5, 0.5)

    def ratio(q: float) -> float:
        return float((q / risk) ** total * ((1 - q) / (1 - risk)) ** (trials - total) * prior.pdf(q))

    mixture = scipy.integrate.quad(ratio, 0, risk, epsrel=1e-10)[0] / prior.cdf(risk)
    assert log_evidence(total, trials, risk) == pytest.approx(math.log(mixture), abs=QUADRATURE)


@pytest.mark.parametrize(("fidelity", "floor", "trials"), [(0.90, 29, 36), (0.95, 59, 74), (0.99, 299, 377)])
def test_trials_without_an_error_that_certify(fidelity: float, floor: int, trials: int) -> None:
    assert math.ceil(math.log(DELTA) / math.log(fidelity)) == floor <= trials  # no test certifies earlier
    assert 1 - risk_bound(0, trials, DELTA) >= fidelity
    assert 1 - risk_bound(0, trials - 1, DELTA) < fidelity
    assert log_evidence(0, trials, 1 - fidelity) >= TARGET > log_evidence(0, trials - 1, 1 - fidelity)


def test_the_bound_moves_with_errors_trials_and_confidence() -> None:
    by_errors = [risk_bound(total, 200, DELTA) for total in np.arange(0, 200, 2.5)]
    assert (np.diff(by_errors) > 0).all()
    by_trials = [risk_bound(0, trials, DELTA) for trials in range(4, 300)]
    assert (np.diff(by_trials) < 0).all()
    by_share = [risk_bound(0.1 * trials, trials, DELTA) for trials in (10, 100, 1000, 10_000, 100_000)]
    assert (np.diff(by_share) < 0).all()
    by_delta = [risk_bound(5, 200, delta) for delta in (1e-6, 1e-3, 0.05, 0.5)]
    assert (np.diff(by_delta) < 0).all()


@pytest.mark.parametrize(
    ("total", "trials"), [(0, 10), (1, 10), (0.3, 12), (7.25, 90), (30, 100), (1000, 10**6), (500_000, 10**6)]
)
def test_the_bound_is_where_the_evidence_suffices(total: float, trials: int) -> None:
    bound = risk_bound(total, trials, DELTA)
    assert total / trials < bound < 1
    assert log_evidence(total, trials, bound * (1 + 1e-6)) >= TARGET
    assert log_evidence(total, trials, bound * (1 - 1e-6)) < TARGET


@pytest.mark.parametrize(("total", "trials"), [(0, 0), (1, 1), (50, 50), (0, 1), (10**6, 10**6)])
def test_where_nothing_is_ruled_out(total: float, trials: int) -> None:
    assert risk_bound(total, trials, DELTA) == (1.0 if total or not trials else pytest.approx(1.0, abs=DELTA))


def test_evidence_that_underflows_is_none() -> None:
    assert log_evidence(500_000, 1_000_000, 0.01) == -math.inf
    assert log_evidence(0, 10**7, 0.5) > 10**6
    assert risk_bound(10**6, 10**7, DELTA) == pytest.approx(0.1, rel=0.01)
    assert 0 < risk_bound(0, 10**8, DELTA) < 1e-6
    assert 0.999 < risk_bound(10**7 - 1, 10**7, DELTA) <= 1.0


def certifying(risk: float, step: float) -> np.ndarray:
    """[trials]: largest sum of losses, in steps, at which `risk` is ruled out; −1 for none."""
    most, edge = -step, np.empty(TRIALS)
    for trials in range(1, TRIALS + 1):
        while most + step <= trials and log_evidence(most + step, trials, risk) >= TARGET:
            most += step
        edge[trials - 1] = most if most >= 0 else -1
    return edge


@pytest.mark.parametrize("risk", [0.05, 0.01])
@pytest.mark.parametrize("loss", [1.0, 0.5])
def test_a_model_that_fails_is_rarely_certified(risk: float, loss: float) -> None:
    """At the boundary, looking after every trial and stopping when it suits; losses of a half are twice as frequent."""
    rng, edge = np.random.default_rng(0), certifying(risk, loss)

    def certified(rate: float) -> float:
        losses = loss * (rng.random((RUNS, TRIALS)) < rate / loss)
        return float((losses.cumsum(axis=1) <= edge).any(axis=1).mean())

    assert certified(risk) <= DELTA
    assert certified(risk / 10) > 0.5  # a model well within the bound is


# --- rare errors, looked for after every trial ------------------------------------------------------------------------

ERRORS = 100
"""Errors of a run, on average: at a risk of 5e-4 it takes 200 000 trials."""


def arrivals(rate: float, trials: float, seed: int = 0) -> np.ndarray:
    """[runs, errors]: the trials at which errors come, from geometric gaps; as cheap as there are errors."""
    return np.random.default_rng(seed).geometric(rate, (RUNS, round(2 * trials * rate) + 20)).cumsum(axis=1)


def first_trials(risk: float, most: int) -> np.ndarray:
    """[errors]: the first trial at which so many errors still rule `risk` out."""
    trials, first, far = 1, [], ERRORS / risk
    for errors in range(most):
        while trials < far and log_evidence(errors, trials, risk) < TARGET:
            step = max(trials // 1000, 1)
            trials += step
        while trials > 1 and log_evidence(errors, trials - 1, risk) >= TARGET:
            trials -= 1
        first.append(trials if trials < far else np.inf)
    return np.array(first)


@pytest.mark.parametrize("risk", [0.05, 5e-4])
def test_rare_errors_are_rarely_certified_away(risk: float) -> None:
    come = arrivals(risk, ERRORS / risk)
    first = first_trials(risk, come.shape[1])
    # With k errors seen, the run certifies if the next error comes after the first trial at which k rule the risk out.
    assert 0.002 < (come > first).any(axis=1).mean() <= DELTA
    assert (arrivals(risk / 20, ERRORS / risk, seed=1)[:, 0] > first[0]).mean() > 0.5  # and a better model is certified


def test_where_nothing_ever_fails() -> None:
    """R = 0: never refuted, however low the bound; and no bound says more than the data can."""
    test = SequentialTest(1 - 5e-4, DELTA)
    for _ in range(20):
        test.update(np.zeros(1000))
    assert test.verdict == "certified"
    assert 299 * 20 < test.trials < 10_000  # no test could stop before ln(1/δ)/r = 5990
    for trials in (1, 100, 10**5):
        bounds = risk_bound(0, trials, DELTA), hoeffding_bound(0, trials, DELTA), betting_bound(np.zeros(trials), DELTA)
        assert all(bound > 1 - DELTA ** (1 / trials) for bound in bounds)  # the exact bound at a fixed time
        assert risk_floor(0, trials, DELTA) == 0.0


# --- the sequential test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_stops_at_the_same_trial_however_trials_come(size: int) -> None:
    for rate, verdict in ((0.01, "certified"), (0.4, "refuted"), (0.1, "undecided")):
        losses = (np.random.default_rng(3).random(500) < rate).astype(float)
        test, whole = SequentialTest(0.9, DELTA), SequentialTest(0.9, DELTA)
        whole.update(losses)
        for start in range(0, 500, size):
            test.update(losses[start : start + size])
        assert (test.verdict, test.trials, test.total) == (whole.verdict, whole.trials, whole.total)
        assert test.verdict == verdict
        assert test.total == losses[: test.trials].sum()
        bound = risk_bound(test.total, test.trials, DELTA)
        assert (bound <= 0.1) == (verdict == "certified")
        assert (risk_floor(test.total, test.trials, DELTA) >= 0.1) == (verdict == "refuted")


@pytest.mark.parametrize(("fidelity", "trials"), [(0.90, 36), (0.95, 74), (0.99, 377)])
def test_stopping_times_without_an_error(fidelity: float, trials: int) -> None:
    test = SequentialTest(fidelity, DELTA)
    test.update(np.zeros(1000))
    assert (test.verdict, test.trials) == ("certified", trials)


@pytest.mark.parametrize("rate", [0.05, 0.15])
def test_either_verdict_is_rarely_wrong(rate: float) -> None:
    """At the boundary both verdicts are wrong; each comes in at most a share δ of the runs."""
    rng, found = np.random.default_rng(1), {"certified": 0, "refuted": 0, "undecided": 0}
    for _ in range(RUNS):
        test = SequentialTest(1 - rate, DELTA)
        test.update((rng.random(TRIALS) < rate).astype(float))
        found[test.verdict] += 1
    assert max(found["certified"], found["refuted"]) <= DELTA * RUNS
    assert min(found["certified"], found["refuted"]) > 0  # the test can fail


def test_neither_of_two_equal_models_is_called_better() -> None:
    """The paired test: where two models differ, either is as likely to be wrong; both verdicts share δ."""
    rng, decided = np.random.default_rng(4), 0
    for _ in range(RUNS):
        test = SequentialTest(0.5, DELTA / 2)
        decided += test.update((rng.random(TRIALS) < 0.5).astype(float)) != "undecided"
    assert 0 < decided <= DELTA * RUNS


# --- for comparison ---------------------------------------------------------------------------------------------------

PUBLISHED = 0.1
"""Relative: published stopping times of betting depend on the stakes chosen."""


@pytest.mark.parametrize(("fidelity", "betting", "hoeffding"), [(0.90, 64, 889), (0.95, 125, 4172), (0.99, 613, None)])
def test_stopping_times_of_the_others(fidelity: float, betting: int, hoeffding: int | None) -> None:
    capital = betting_capital(np.zeros(1000), 1 - fidelity, DELTA)
    assert int(np.argmax(capital >= TARGET)) + 1 == pytest.approx(betting, rel=PUBLISHED)
    reached = [n for n in range(1, 60_000, 1 if hoeffding else 997) if hoeffding_bound(0, n, DELTA) <= 1 - fidelity]
    assert (reached[0] if reached else None) == (hoeffding if hoeffding is None else pytest.approx(hoeffding, rel=0.01))


@pytest.mark.parametrize(("risk", "trials"), [(0.05, 2000), (2e-3, 4000)])
def test_betting_is_rarely_wrong(risk: float, trials: int) -> None:
    losses = (np.random.default_rng(2).random((RUNS, trials)) < risk).astype(float)
    assert 0 < (betting_capital(losses, risk, DELTA).max(axis=1) >= TARGET).mean() <= DELTA


def test_the_beta_mixture_is_the_tightest() -> None:
    losses = (np.random.default_rng(5).random(2000) < 0.02).astype(float)
    total = float(losses.sum())
    ours = risk_bound(total, 2000, DELTA)
    assert total / 2000 < ours < betting_bound(losses, DELTA) < hoeffding_bound(total, 2000, DELTA)
