"""How sure a fidelity is: tests and bounds that hold at every moment one may choose to look.

The Beta mixture decides; Hoeffding's bound and betting are there to compare it with.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special

Verdict = Literal["certified", "refuted", "undecided"]
_HALF = 0.5  # parameters of the Beta mixture: Jeffreys' prior, tight where errors are rare


def log_evidence(total: Any, trials: Any, risk: float) -> Any:
    """Logarithm of the Beta-mixture e-process against the hypothesis that the risk is at least `risk`.

    With S the sum of `trials` losses in [0, 1] and r the hypothesised risk,

        ln E = ln B(a+S, b+n−S) − ln B(a, b) + ln F_{a+S, b+n−S}(r) − ln F_{a,b}(r) − S ln r − (n−S) ln(1−r),

    the mixture over q ~ Beta(a, b) truncated to q < r of the likelihood ratios Π (q/r)^Z ((1−q)/(1−r))^(1−Z). Each ratio is
    at most linear in Z, so that E has expectation at most 1 under the hypothesis for losses anywhere in [0, 1], and by
    Ville's inequality P(E ≥ 1/δ at any time) ≤ δ. Numbers or arrays; −∞ where F underflows, which is far from any decision.
    """
    total, trials = np.asarray(total, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    a, b = _HALF + total, _HALF + trials - total
    with np.errstate(divide="ignore"):
        inside = np.log(scipy.special.betainc(a, b, risk))
    result = (
        scipy.special.betaln(a, b)
        - scipy.special.betaln(_HALF, _HALF)
        + inside
        - math.log(scipy.special.betainc(_HALF, _HALF, risk))
        - total * math.log(risk)
        - (trials - total) * math.log1p(-risk)
    )
    return float(result) if result.ndim == 0 else result


def risk_bound(total: float, trials: int, delta: float) -> float:
    """Upper bound on the expected loss, valid with probability at least 1 − `delta` whenever one looks.

    Parameters
    ----------
    total
        Sum of the losses, each in [0, 1].
    trials
        Their number.
    delta
        Error probability.

    Returns
    -------
    float
        The smallest risk that the evidence rules out, in (0, 1]; 1 where nothing is ruled out.
    """
    if trials == 0:
        return 1.0
    target = math.log(1.0 / delta)
    low, high = max(total / trials, 1e-12), 1.0 - 1e-12
    if low >= high or log_evidence(total, trials, high) < target:
        return 1.0
    if log_evidence(total, trials, low) >= target:
        return low
    return float(scipy.optimize.brentq(lambda r: log_evidence(total, trials, r) - target, low, high, xtol=1e-12))


def risk_floor(total: float, trials: int, delta: float) -> float:
    """Lower bound on the expected loss, the mirror image of `risk_bound`: losses become gains."""
    return 1.0 - risk_bound(trials - total, trials, delta)


class SequentialTest:
    """Is the fidelity at least `fidelity`? Looks after every trial, and stops as soon as either answer is sure.

    Certified: the risk 1 − fidelity or more is ruled out; refuted: that or less is. Each is wrong with probability at most
    `delta`, at whatever moment the test stops. Where it stops does not depend on how trials come in batches.

    Attributes
    ----------
    trials, total
        Trials taken in until the test stopped, and the sum S of their losses.
    verdict
        Undecided until it stops.
    """

    def __init__(self, fidelity: float, delta: float) -> None:
        self.fidelity, self.delta = fidelity, delta
        self.trials, self.total = 0, 0.0
        self.verdict: Verdict = "undecided"

    def update(self, losses: npt.NDArray[np.float64]) -> Verdict:
        """Take in losses in order; those behind the decision are left out."""
        if self.verdict != "undecided" or not len(losses):
            return self.verdict
        totals = self.total + np.cumsum(losses)
        trials = self.trials + np.arange(1, len(losses) + 1)
        target = math.log(1.0 / self.delta)
        good = log_evidence(totals, trials, 1.0 - self.fidelity) >= target
        bad = log_evidence(trials - totals, trials, self.fidelity) >= target
        decided = np.flatnonzero(good | bad)
        last = int(decided[0]) if len(decided) else len(losses) - 1
        self.trials, self.total = int(trials[last]), float(totals[last])
        if len(decided):
            self.verdict = "certified" if good[last] else "refuted"
        return self.verdict


# --- for comparison ---------------------------------------------------------------------------------------------------


def hoeffding_bound(total: float, trials: int, delta: float) -> float:
    """Upper bound on the expected loss by Hoeffding's inequality with spending δ_n = 6δ/(π²n²), whenever one looks."""
    if trials == 0:
        return 1.0
    spent = 6.0 * delta / (math.pi * trials) ** 2
    return min(total / trials + math.sqrt(math.log(2.0 / spent) / (2.0 * trials)), 1.0)


def betting_capital(losses: npt.NDArray[np.float64], risk: float, delta: float) -> npt.NDArray[np.float64]:
    """Logarithm after every trial of the capital Π (1 − λ_t (Z_t − r)) of one who bets that the risk is below r.

    λ_t = min(½, √(2 ln(1/δ) / (σ²_{t−1} t ln(1+t)))), the predictable plug-in of Waudby-Smith and Ramdas (2024), with
    σ²_{t−1} from earlier losses alone. As λ < 1/(1−r), the capital is a non-negative supermartingale while the risk is at
    least r, for every r down to 0: no clamp is needed. Along the last axis of `losses`.
    """
    trials = np.arange(1, losses.shape[-1] + 1)
    mean = (_HALF + np.cumsum(losses, axis=-1)) / (trials + 1)
    spread = (0.25 + np.cumsum(np.square(losses - mean), axis=-1)) / (trials + 1)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), spread[..., :-1]], axis=-1)
    stake = np.minimum(0.5, np.sqrt(2.0 * math.log(1.0 / delta) / (before * trials * np.log1p(trials))))
    capital: npt.NDArray[np.float64] = np.cumsum(np.log1p(-stake * (losses - risk)), axis=-1)
    return capital


def betting_bound(losses: npt.NDArray[np.float64], delta: float) -> float:
    """Upper bound on the expected loss: the smallest risk against which the capital has ever reached 1/δ."""
    target = math.log(1.0 / delta)

    def excess(risk: float) -> float:
        return float(betting_capital(losses, risk, delta).max(initial=-math.inf)) - target

    if not len(losses) or excess(1.0) < 0.0:
        return 1.0
    return 0.0 if excess(0.0) >= 0.0 else float(scipy.optimize.brentq(excess, 0.0, 1.0, xtol=1e-9))
