"""Goals: how wide each group is to be, at least risk, for a share of the size, the work or the time of the dense model.

All groups share one scale: the risk of the outputs. Predicted risk of a group, by the units that have gone, is brought to
what a few measured candidates show; then that group is cut next whose risk rises least for what it saves, along the lower
convex hull of its curve, until the goal is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mscompile.network.costs import Counts
from mscompile.network.latency import ALIGNED
from mscompile.network.scm import Site
from mscompile.operators import IntArray
from mscompile.planning.selection import Elimination

Array = npt.NDArray[np.float64]
Cost = Callable[[Counts, int | None], float]
"""(counts, group) -> cost; with a group, of what depends on it alone, so that differences are those of the whole."""

MAP_STEP = 4
"""Widths of feature maps are multiples of it: odd ones take a slower path through onnxruntime."""
FEW = 64
"""Channels from which feature maps are cut in steps of `ALIGNED`."""
STEPS = 64
"""Widths tried of a group, at most."""
LEAST = 1 / 32
"""Share of a group's channels that is left at least."""
PROBED = (0.75, 0.5, 0.25, 0.125)
"""Shares of the channels at which predicted risk is compared with measured risk."""


@dataclass(frozen=True)
class Curve:
    """Risk of a group by channels left.

    Attributes
    ----------
    counts
        Channels left, from all of them down, on the lower convex hull.
    risk
        Risk at each.
    beside
        Widths off the hull with their risks, for the last steps to a goal.
    """

    counts: tuple[int, ...]
    risk: tuple[float, ...]
    beside: tuple[tuple[int, float], ...] = ()


def widths(sites: Sequence[Site], units: int, ranks: Mapping[str, int], *, aligned: bool = False) -> IntArray:
    """Channels that a group may be left with, from all of them down.

    Feature maps take multiples of `MAP_STEP`, or of `ALIGNED` where there are many of them or `aligned` asks for it; what
    only matrix products read may be as wide as it likes.
    """
    mapped = any(site.axis == 1 and ranks[site.tensor] > 2 for site in sites)
    step = max(1, units // STEPS)
    if mapped:
        coarse = units >= FEW or (aligned and units >= 2 * ALIGNED)
        step = max(ALIGNED if coarse else MAP_STEP, step // MAP_STEP * MAP_STEP)
    least = max(step, round(LEAST * units), 2)
    found = [units, *range((units - 1) // step * step, least - 1, -step)]
    return np.array(found if units > least else [units], dtype=np.int64)


def distinct(counts: IntArray, left: Sequence[int]) -> IntArray:
    """Of widths asked for that leave as many units (heads go row by row), the one that comes nearest to what is left."""
    nearest: dict[int, int] = {}
    for count, units in zip(counts.tolist(), left, strict=True):
        if units not in nearest or abs(count - units) < abs(nearest[units] - units):
            nearest[units] = count
    return np.array(sorted(nearest.values(), reverse=True), dtype=np.int64)


def probed(counts: IntArray) -> IntArray:
    """The widths at which the risk of a group is measured."""
    near = {int(np.abs(counts - share * counts[0]).argmin()) for share in PROBED} - {0}
    return counts[sorted(near)]


def make_curve(elimination: Elimination, counts: IntArray, carriers: int, measured: Mapping[int, float]) -> Curve:
    """The risk curve of a group.

    Parameters
    ----------
    carriers
        How many of the channels left carry constants.
    measured
        Risk by channels left, where it was measured; between, the ratio to the prediction is interpolated.
    """
    gone = np.minimum(len(elimination.order) - counts + carriers, len(elimination.order))
    predicted = np.where(counts == counts[0], 0.0, elimination.risk[gone])
    measured = {count: risk for count, risk in measured.items() if np.isfinite(predicted[counts == count]).all()}
    if measured:
        at = np.array(sorted(measured))
        foretold = np.interp(at, counts[::-1], predicted[::-1])
        tiny = np.finfo(np.float32).tiny
        ratio = np.log(np.maximum([measured[int(n)] for n in at], tiny)) - np.log(np.maximum(foretold, tiny))
        predicted = np.where(predicted > 0, predicted * np.exp(np.interp(counts, at, ratio)), 0.0)
    possible = np.isfinite(predicted)
    counts, risk = counts[possible], np.maximum.accumulate(predicted[possible])
    hull = _lower_hull(counts.astype(np.float64), risk)
    points = [(int(count), float(value)) for count, value in zip(counts, risk, strict=True)]
    found, values = zip(*(points[i] for i in hull), strict=True)
    return Curve(found, values, tuple(point for i, point in enumerate(points) if i not in hull))


def _lower_hull(x: Array, y: Array) -> list[int]:
    """Indices of the lower convex hull of points of falling x and rising y, first and last among them."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[b] - x[i]) < (y[i] - y[b]) * (x[a] - x[b]):
                break
            hull.pop()
        hull.append(i)
    return hull


def descend(curves: Mapping[int, Curve], cost: Cost) -> Iterator[tuple[dict[int, int], float]]:
    """Widths step by step, from the whole model to the narrowest, with what each costs.

    At each step that group goes to its next width that saves anything for which risk rises least per cost saved.
    """
    at = dict.fromkeys(curves, 0)
    counts = {group: curve.counts[0] for group, curve in curves.items()}
    total = cost(counts, None)
    yield dict(counts), total
    while True:
        best: tuple[float, int, int, float] | None = None
        for group, curve in curves.items():
            whole = cost(counts, group)
            for place in range(at[group] + 1, len(curve.counts)):
                saved = whole - cost({**counts, group: curve.counts[place]}, group)
                if saved > 0:
                    price = (curve.risk[place] - curve.risk[at[group]]) / saved
                    if best is None or price < best[0]:
                        best = price, group, place, saved
                    break
        if best is None:
            return
        _, group, at[group], saved = best
        counts[group] = curves[group].counts[at[group]]
        total -= saved
        yield dict(counts), total


def reach(curves: Mapping[int, Curve], cost: Cost, goal: float) -> dict[int, int] | None:
    """Widths of about least risk whose cost is at most `goal`; None where even the narrowest cost more."""
    for counts, total in descend(curves, cost):
        if total <= goal:
            return _widened(curves, cost, counts, goal)
    return None


def _widened(curves: Mapping[int, Curve], cost: Cost, counts: dict[int, int], goal: float) -> dict[int, int]:
    """Give back what the last steps took beyond the goal, most risk first, up to the width on the hull before at most."""
    counts = dict(counts)
    risks = {group: dict([*zip(curve.counts, curve.risk, strict=True), *curve.beside]) for group, curve in curves.items()}
    while True:
        total, best = cost(counts, None), (0.0, -1, 0)
        for group, curve in curves.items():
            own, least = risks[group], counts[group]
            most = min((count for count in curve.counts if count > least), default=least)
            for wider in (count for count in own if least < count <= most):
                extra = cost({**counts, group: wider}, group) - cost(counts, group)
                relief = own[least] - own[wider]
                if total + extra <= goal and relief > best[0]:
                    best = relief, group, wider
        if best[1] < 0:
            return counts
        counts[best[1]] = best[2]
