"""The certificate against quadrature, and against looking after every trial at a risk that just fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from mscompile.certificate import log_evidence, risk_bound

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


@pytest.mark.parametrize(("fidelity", "trials"), [(0.90, 36), (0.95, 74), (0.99, 377)])
def test_trials_without_an_error_that_certify(fidelity: float, trials: int) -> None:
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
