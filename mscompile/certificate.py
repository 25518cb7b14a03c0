"""How sure a fidelity is: a confidence bound that holds at every moment one may choose to look."""

from __future__ import annotations

import math

import scipy.optimize
import scipy.special

_HALF = 0.5  # parameters of the Beta mixture: Jeffreys' prior, tight where errors are rare


def log_evidence(total: float, trials: int, risk: float) -> float:
    """Logarithm of the Beta-mixture e-process against the hypothesis that the risk is at least `risk`.

    With S the sum of `trials` losses in [0, 1] and r the hypothesised risk,

        ln E = ln B(a+S, b+n−S) − ln B(a, b) + ln F_{a+S, b+n−S}(r) − ln F_{a,b}(r) − S ln r − (n−S) ln(1−r),

    the mixture over q ~ Beta(a, b) truncated to q < r of the likelihood ratios Π (q/r)^Z ((1−q)/(1−r))^(1−Z). Each ratio is
    at most linear in Z, so that E has expectation at most 1 under the hypothesis for losses anywhere in [0, 1], and by
    Ville's inequality P(E ≥ 1/δ at any time) ≤ δ.
    """
    a, b = _HALF + total, _HALF + trials - total
    inside = float(scipy.special.betainc(a, b, risk))
    if inside <= 0.0:
        return -math.inf
    return float(
        scipy.special.betaln(a, b)
        - scipy.special.betaln(_HALF, _HALF)
        + math.log(inside)
        - math.log(scipy.special.betainc(_HALF, _HALF, risk))
        - total * math.log(risk)
        - (trials - total) * math.log1p(-risk)
    )


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
