"""Which units go first, against eliminations that compute every step afresh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mscompile.calibration.statistics import Curvature, Moments, Statistics
from mscompile.network.scm import Site
from mscompile.network.sites import Reader
from mscompile.network.units import Block
from mscompile.operators.axes import Signature
from mscompile.planning.replacements import RIDGE, fit_affine, interchanged, stabilise
from mscompile.planning.scores import Scores
from mscompile.planning.selection import eliminate_by_score, eliminate_jointly, retained_units

Array = npt.NDArray[np.float64]

SAMPLES = 500
"""The counts do not matter: curvature and moments are divided by them."""
RIDGES = 100 * RIDGE
"""Relative; the ridge moves a risk by about its share times the condition of a covariance, here below 100."""


def random_covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> Array:
    """Correlated channels of variances that span three orders of magnitude."""
    factor = rng.standard_normal((size, rank or 2 * size)) * 10.0 ** rng.uniform(-1.5, 0, (size, 1))
    return factor @ factor.T / factor.shape[1]


def site(name: str, units: Any, *, last: bool = False) -> Site:
    """A site, and whether an output reads it."""
    here = np.asarray(units)
    node = ir.node("MatMul", [], outputs=[ir.val("y")])
    reader = Reader(node, Signature(), node, 1, 0, np.arange(len(here)), here)
    return Site(name, 1, here, (reader,) if last else (), 0, None)


def statistics(
    covariances: dict[str, Array], curvatures: dict[str, Array], common: dict[str, Array] | None = None
) -> Statistics:
    moments, curvature = {}, {}
    for name, sigma in covariances.items():
        zero, shared = np.zeros(len(sigma)), (common or {}).get(name)
        scatter, between = sigma * SAMPLES, None if shared is None else shared * SAMPLES
        moments[name] = Moments(SAMPLES, zero, np.diagonal(scatter), scatter, between, zero - np.inf, zero + np.inf)
        curvature[name] = Curvature(SAMPLES, zero, zero, zero, zero, zero, curvatures[name] * SAMPLES)
    return Statistics(moments, curvature, {}, {}, SAMPLES, (), "", "identity", {"y": 1.0})


def afresh(sites: list[Site], known: Statistics, swap: float) -> list[int]:
    """Backward elimination, H⁻¹, B, M and what interchange hides from their definitions at each step."""
    alpha = (1 - swap) / ((1 - swap) ** 2 + swap**2)
    units = sorted({int(u) for s in sites for u in s.units})
    order: list[int] = []
    while len(units) > 1:
        costs = dict.fromkeys(units, 0.0)
        for s in sites:
            moments, second = known.moments[s.tensor], known.curvature[s.tensor].second
            assert second is not None
            h = interchanged(moments.covariance, moments.common, swap)
            share = alpha**2 if s.readers else 1.0
            hidden = second / SAMPLES * (moments.covariance - share * h) if s.readers else np.zeros_like(h)
            stabilise(h)
            k, p = (np.flatnonzero(np.isin(s.units, units, invert=away)) for away in (False, True))
            inverse = np.linalg.inv(h[np.ix_(k, k)])
            stacked = np.vstack([np.eye(len(k)), h[np.ix_(p, k)] @ inverse])
            kept_first = np.concatenate([k, p])
            m = stacked.T @ (second / SAMPLES)[np.ix_(kept_first, kept_first)] @ stacked
            pairs = np.maximum(np.diagonal(hidden)[k], 0.0) + 2 * hidden[np.ix_(p, k)].sum(axis=0)
            added = 0.5 * (share * np.diagonal(m) / np.diagonal(inverse) + pairs)
            for unit, cost in zip(s.units[k].tolist(), added, strict=True):
                costs[unit] += cost
        gone = min(units, key=costs.__getitem__)
        order.append(gone)
        units.remove(gone)
    return order + units


@pytest.mark.parametrize("swap", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("place", ["last", "inside", "positions"])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_joint_order_of_one_site(size: int, place: str, swap: float) -> None:
    rng = np.random.default_rng(size)
    sigma = random_covariance(rng, size)
    common = {"h": random_covariance(rng, size, 3) * 0.1}
    known = statistics(
        {"h": sigma + common["h"]}, {"h": random_covariance(rng, size)}, common if place == "positions" else None
    )
    sites = [site("h", np.arange(size) + 3, last=place == "last")]
    assert eliminate_jointly(sites, known, swap).order.tolist() == afresh(sites, known, swap)


@pytest.mark.parametrize("swap", [0.0, 0.1])
def test_joint_order_of_two_sites(swap: float) -> None:
    """The units of a group may be read at several sites, in another order, and not all of them at each."""
    rng = np.random.default_rng(5)
    sites = [site("h", np.arange(30)), site("g", rng.permutation(np.arange(10, 40)))]
    known = statistics(*({name: random_covariance(rng, 30) for name in ("h", "g")} for _ in range(2)))
    order = eliminate_jointly(sites, known, swap).order
    assert order.tolist() == afresh(sites, known, swap)
    assert order.tolist() != eliminate_jointly(sites[:1], known, swap).order.tolist()


@pytest.mark.parametrize("swap", [0.0, 0.5, 0.7])
def test_joint_order_goes_by_the_increase_of_the_risk(swap: float) -> None:
    """½ tr(G_PP R_PP), R the error of the fit when what it is made of is interchanged, grows by least at each step."""
    rng, size = np.random.default_rng(2), 16
    sigma, second = random_covariance(rng, size), random_covariance(rng, size)
    known = statistics({"h": sigma}, {"h": second})
    swapped = interchanged(sigma, np.zeros_like(sigma), swap)

    def risk(removed: list[int]) -> float:
        p, k = np.array(removed), np.setdiff1d(np.arange(size), removed)
        matrix = fit_affine(known.moments["h"], k, p, swap).matrix
        assert matrix is not None
        cross = (1 - swap) * sigma[np.ix_(p, k)] @ matrix.T
        error = sigma[np.ix_(p, p)] - cross - cross.T + matrix @ swapped[np.ix_(k, k)] @ matrix.T
        return 0.5 * float(np.sum(second[np.ix_(p, p)] * error))

    found = eliminate_jointly([site("h", np.arange(size), last=True)], known, swap)
    order = found.order.tolist()
    for step in range(size - 1):
        least = min(risk([*order[:step], other]) for other in order[step:])
        assert risk(order[: step + 1]) <= least * (1 + RIDGES)
        assert found.risk[step + 1] == pytest.approx(risk(order[: step + 1]), rel=RIDGES)


def test_many_units_go_in_blocks() -> None:
    rng, size = np.random.default_rng(3), 400
    known = statistics({"h": random_covariance(rng, size)}, {"h": random_covariance(rng, size)})
    order = eliminate_jointly([site("h", np.arange(size))], known, 0.1).order
    assert sorted(order) == list(range(size))
    bracket = interchanged(known.moments["h"].covariance, np.zeros((size, size)), 0.1)
    stabilise(bracket)
    second = known.curvature["h"].second
    assert second is not None
    costs = np.diagonal(second) / np.diagonal(np.linalg.inv(bracket))
    assert order[:3].tolist() == np.argsort(costs)[:3].tolist()  # 400 / 128 at a time


@pytest.mark.parametrize("swap", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(10))
def test_rescaled_units_are_chosen_alike(seed: int, swap: float) -> None:
    """relu(α x) / α = relu(x): weights before and after a unit may be rescaled without changing the network."""
    rng, size = np.random.default_rng(seed), 64
    sigma, second = random_covariance(rng, size), random_covariance(rng, size)
    alpha = 10.0 ** rng.uniform(-1, 1, size)
    scale = np.outer(alpha, alpha)
    sites = [site("h", np.arange(size))]
    plain = eliminate_jointly(sites, statistics({"h": sigma}, {"h": second}), swap).order
    rescaled = eliminate_jointly(sites, statistics({"h": sigma * scale}, {"h": second / scale}), swap).order
    for keep in range(8, size, 8):
        a, b = set(plain[-keep:].tolist()), set(rescaled[-keep:].tolist())
        assert len(a & b) / len(a | b) == 1.0


@pytest.mark.parametrize(
    ("death", "swap"), [("constant", 0.0), ("constant", 0.1), ("unread", 0.0), ("unread", 0.1), ("redundant", 0.0)]
)
def test_dead_units_go_first(death: str, swap: float) -> None:
    """Units that never vary, that nothing reads or that others determine; under interchange a copy is no such stand-in."""
    rng, size, dead = np.random.default_rng(4), 20, np.array([3, 8, 17])
    sigma, second = random_covariance(rng, size), random_covariance(rng, size)
    if death == "unread":
        second[dead] = second[:, dead] = 0.0
    elif death == "constant":
        sigma[dead] = sigma[:, dead] = 0.0
    else:
        mixture = np.eye(size)
        mixture[dead] = 0.0
        mixture[dead, dead - 1] = 2.0
        sigma = mixture @ sigma @ mixture.T
    order = eliminate_jointly([site("h", np.arange(size))], statistics({"h": sigma}, {"h": second}), swap).order
    gone = set(order[: len(dead)].tolist())
    if death == "redundant":  # either of the two may go
        assert {min(abs(dead - u)) for u in gone} <= {0, 1}
        assert len({int(np.argmin(abs(dead - u))) for u in gone}) == len(dead)
    else:
        assert gone == set(dead.tolist())


def test_additive_order_sums_scores_over_sites() -> None:
    sites = [site("h", [4, 5, 6, 7]), site("g", [7, 6, 5])]
    risk = {"h": np.array([3.0, 1.0, 2.0, 0.5]), "g": np.array([4.0, 0.0, 1.0])}
    scores = Scores("random", risk, {}, {})
    assert eliminate_by_score(sites, scores).order.tolist() == [
        5,
        6,
        4,
        7,
    ]  # 2, 2, 3 and 4.5; ties in the order of the units
    assert eliminate_by_score(sites[:1], scores).order.tolist() == [7, 5, 6, 4]


# --- dependent units --------------------------------------------------------------------------------------------------


def with_copies() -> tuple[list[Site], Statistics]:
    """Six independent channels, a copy of the first, and the sum of two others."""
    rng = np.random.default_rng(0)
    maps = np.vstack([np.eye(6), np.eye(6)[:1], np.eye(6)[1:2] + np.eye(6)[2:3]])
    sigma = maps @ random_covariance(rng, 6) @ maps.T
    return [site("h", np.arange(8))], statistics({"h": sigma}, {"h": random_covariance(rng, 8)})


@pytest.mark.parametrize("swap", [0.0, 0.1])
def test_dependent_units_go_first_and_no_more_of_them_than_there_are(swap: float) -> None:
    sites, known = with_copies()
    found = eliminate_jointly(sites, known, swap)
    assert found.lossless == 2
    first = set(found.order[:2].tolist())
    assert len(first & {0, 6}) == 1
    assert len(first & {1, 2, 7}) == 1
    assert sorted(found.order.tolist()) == list(range(8))
    if swap == 0.0:
        assert found.risk[2] <= 1e-4 * found.risk[3]


def test_a_unit_that_depends_at_one_site_only_stays() -> None:
    sites, known = with_copies()
    rng = np.random.default_rng(1)
    other = statistics({"g": random_covariance(rng, 8)}, {"g": random_covariance(rng, 8)})
    both = replace(known, moments={**known.moments, **other.moments}, curvature={**known.curvature, **other.curvature})
    assert eliminate_jointly([*sites, site("g", np.arange(8))], both, 0.1).lossless == 0


def test_few_observations_prove_no_dependence() -> None:
    sites, known = with_copies()
    moments = known.moments["h"]
    few = replace(moments, count=31, scatter=moments.covariance * 31, squares=moments.variance * 31)
    assert eliminate_jointly(sites, replace(known, moments={"h": few}), 0.1).lossless == 0


# --- rows that stay equally large -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(), (3,)])
@pytest.mark.parametrize("count", [4, 10, 16, 23, 30])
def test_every_block_gets_its_share(count: int, frozen: tuple[int, ...]) -> None:
    """Keys in rows of six and values in rows of four that always go last, beside six units in no row."""
    keys, values, others = np.arange(12), np.arange(12, 20), np.arange(20, 30)
    blocks = [Block(u.reshape(2, -1), np.array([-1, -1])) for u in (keys, values, keys[::-1])]
    rng = np.random.default_rng(0)
    order = np.concatenate([np.setdiff1d(rng.permutation(np.r_[keys, others]), frozen), values, np.array(frozen, int)])
    kept = retained_units(order, count, blocks, frozen)
    share = count / 30
    for rows in (keys.reshape(2, -1), values.reshape(2, -1)):
        left = np.isin(rows, kept).sum(axis=1)
        assert left[0] == left[1] == max(1, round(share * rows.shape[1]))
        for row in rows:  # and of each row those that go last
            places = np.flatnonzero(np.isin(order, row))
            assert set(order[places[-left[0] :]].tolist()) == set(row.tolist()) & set(kept.tolist())
    assert np.isin(frozen, kept).all()
    assert abs(len(kept) - count) <= 2
