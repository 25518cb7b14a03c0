"""Goals: what widths cost, which are chosen, and what a compile reaches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import inputs, model, site_plan
from graphs import GRAPHS
from small_models import mlp, samples

from mscompile import Options, compile_model
from mscompile.calibration.calibration import calibrate
from mscompile.errors import GoalError, UsageError
from mscompile.intake.data import read
from mscompile.models import path as shipped
from mscompile.network.costs import Costs
from mscompile.network.dense import DenseModel, open_dense
from mscompile.network.latency import LatencyTable
from mscompile.network.scm import read_scm
from mscompile.network.sizes import count_macs, count_parameters
from mscompile.network.units import Block
from mscompile.operators.backward import FLOATS
from mscompile.planning.plan import Plan, selectable
from mscompile.planning.planner import Planner
from mscompile.planning.preparation import eliminate, what_to_measure
from mscompile.planning.scores import score
from mscompile.planning.selection import Elimination, retained_units, without_carriers
from mscompile.rewrite import rewrite
from mscompile.search.frontier import ENOUGH, ladder
from mscompile.search.goals import Curve, descend, distinct, make_curve, probed, reach, widths


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mscompile.network.sizes.LATENCY_SECONDS", 0.0)


def known(model: Any, data: Any) -> tuple[DenseModel, Any, Any, Any, Any]:
    """A model with its statistics, scores and eliminations."""
    dense, options = open_dense(model), Options()
    given = read(data, dense.specs)
    statistics = calibrate(dense.scm, dense.sites, given, batch_size=64, measure=what_to_measure(dense, options))
    scores = score(dense.scm, dense.sites, statistics, options.objective)
    return dense, given, statistics, scores, eliminate(dense, statistics, scores, options)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("shipped_model", [True, False])
def test_costs_are_those_of_the_compiled_model(shipped_model: bool, share: float) -> None:
    given = (shipped(), shipped().with_suffix(".calib.npz")) if shipped_model else (mlp(), {"x": samples()})
    dense, data, statistics, scores, eliminations = known(*given)
    orders = {group: elimination.order for group, elimination in eliminations.items()}
    inputs = {name: array.shape for name, array in next(data.batches(4)).items()}
    costs = Costs(dense.scm, orders, inputs)
    counts = {group: max(2, round(share * len(order))) for group, order in orders.items()}
    plan = Planner(dense.scm, statistics, scores, dense.groups, orders, "affine", 0.1).plan(counts, "")
    compiled = rewrite(dense.model, plan).model
    assert costs.params({}) == count_parameters(dense.model)
    assert costs.macs({}) == 4 * (count_macs(dense.model, inputs) or 0)
    assert costs.macs(counts) == 4 * (count_macs(compiled, inputs) or 0)
    added = sum(
        v.const_value.size for n, v in compiled.graph.initializers.items() if n not in dense.model.graph.initializers
    )  # type: ignore[union-attr]
    assert costs.params(counts) == count_parameters(compiled) - added
    for group in counts:  # what depends on a group is all that its width changes
        wider = {**counts, group: len(orders[group])}
        for cost in (costs.params, costs.macs):
            assert cost(wider) - cost(counts) == cost(wider, group) - cost(counts, group)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("case", GRAPHS)
def test_widths_foretold_are_those_of_the_compiled_graph(case: str, share: float) -> None:
    dense, rng = model(GRAPHS[case][0], opset=21), np.random.default_rng(0)
    scm, orders, counts, sites = read_scm(dense), {}, {}, []
    for group, members in selectable(scm).items():
        units = np.unique(np.concatenate([site.units for site in members]))
        stay = np.unique(np.concatenate([site.units[~site.free] for site in members]))
        orders[group] = np.concatenate([rng.permutation(np.setdiff1d(units, stay)), stay])
        counts[group] = max(1, round(share * len(units)))
        left = retained_units(orders[group], counts[group], scm.blocks, scm.frozen, members)
        kept = without_carriers(left, orders[group], scm.blocks, members)
        if len(kept) == len(units) or not all(np.isin(site.units, kept).any() for site in members):
            counts[group] = len(units)
            continue
        cut = [site for site in members if not np.isin(site.units, kept).all()]
        sites += [site_plan(scm, site, np.isin(site.units, kept), "constant", rng) for site in cut]
    place = {site.tensor: i for i, site in enumerate(scm.sites)}
    sites.sort(key=lambda entry: place[entry.tensor])
    plan = Plan(model_sha256="", objective="", replacement="constant", swap=0.0, sites=tuple(sites))
    costs = Costs(scm, orders, {name: array.shape for name, array in inputs(dense, samples=4).items()})
    compiled = rewrite(dense, plan).model
    named = dense.graph.initializers
    added = [v for n, v in compiled.graph.initializers.items() if re.sub(r"(\.\d+)+$", "", n) not in named]  # biases
    extra = sum(v.const_value.size for v in added if v.dtype in FLOATS)
    assert costs.params(counts) == count_parameters(compiled) - extra


def test_a_curve_is_the_lower_convex_hull_of_what_was_measured() -> None:
    elimination = Elimination(np.arange(8), np.array([0.0, 1, 1, 1, 8, 9, 20, 21, np.inf]))
    counts = np.array([8, 7, 6, 5, 4, 3, 2, 1])
    plain = make_curve(elimination, counts, 0, {})
    assert plain.counts == (8, 5, 3, 1)
    assert plain.risk == (0.0, 1.0, 9.0, 21.0)
    scaled = make_curve(elimination, counts, 0, {3: 90.0})
    assert dict(zip(scaled.counts, scaled.risk, strict=True))[3] == pytest.approx(90.0)
    carried = make_curve(elimination, counts, 1, {})  # one channel carries constants: one more unit has gone
    assert carried.counts[0] == 8
    assert carried.risk[0] == 0.0
    assert 1 not in carried.counts  # all units would have gone


CURVES = {0: Curve((8, 4, 2), (0.0, 1.0, 5.0)), 1: Curve((6, 3), (0.0, 4.0))}


def weight(counts: Any, group: int | None) -> float:
    """Parameters of a two-layer network: a product of widths, as costs are."""
    a, b = counts.get(0, 8), counts.get(1, 6)
    return {None: 10 * a + a * b + 3 * b, 0: 10 * a + a * b, 1: a * b + 3 * b}[group]


def test_descent_goes_where_risk_rises_least_for_what_is_saved() -> None:
    path = list(descend(CURVES, weight))
    assert [counts for counts, _ in path] == [{0: 8, 1: 6}, {0: 4, 1: 6}, {0: 2, 1: 6}, {0: 2, 1: 3}]
    assert [total for _, total in path] == [weight(counts, None) for counts, _ in path]


def test_descent_passes_over_widths_that_save_nothing() -> None:
    curves = {0: Curve((8, 7, 6, 5, 4), (0.0, 1.0, 1.5, 3.0, 4.0)), 1: Curve((8, 4), (0.0, 100.0))}

    def paired(counts: Any, group: int | None) -> float:  # of group 0 two go at a time
        parts = {0: -(-counts.get(0, 8) // 2), 1: counts.get(1, 8)}
        return float(sum(parts.values()) if group is None else parts[group])

    path = [counts for counts, _ in descend(curves, paired)]
    assert path == [{0: 8, 1: 8}, {0: 6, 1: 8}, {0: 4, 1: 8}, {0: 4, 1: 4}]


def test_widths_that_leave_as_many_units_are_one() -> None:
    heads = [Block(np.arange(12).reshape(3, 4), np.arange(3))]
    asked = np.arange(12, 1, -1)
    left = [len(retained_units(np.arange(12), int(count), heads, [])) for count in asked]
    assert left == [12, 12, 9, 9, 9, 6, 6, 6, 3, 3, 3]  # rows stay equally large: three units go at a time
    assert distinct(asked, left).tolist() == [12, 9, 6, 3]


@pytest.mark.parametrize("goal", [146, 82, 81, 60, 50, 35])
def test_a_goal_is_reached_and_no_width_can_be_given_back(goal: float) -> None:
    counts = reach(CURVES, weight, goal)
    assert counts is not None
    assert weight(counts, None) <= goal
    for group, curve in CURVES.items():
        place = curve.counts.index(counts[group])
        if place:
            assert weight({**counts, group: curve.counts[place - 1]}, None) > goal


def test_the_last_step_may_end_beside_the_hull() -> None:
    """As wide as the goal allows, where the hull only has a width far below."""
    curves = {0: Curve((64, 16), (0.0, 4.0), ((48, 2.0), (32, 3.5), (24, 3.9)))}
    assert reach(curves, lambda counts, _: counts.get(0, 64) / 64, 0.6) == {0: 32}
    assert reach(curves, lambda counts, _: counts.get(0, 64) / 64, 0.3) == {0: 16}


def test_a_goal_below_the_narrowest_is_out_of_reach() -> None:
    assert reach(CURVES, weight, 34) is None


def test_widths_that_runtimes_like() -> None:
    dense = open_dense(shipped())
    for sites in dense.groups.values():
        units = sites[0].size
        found = widths(sites, units, dense.ranks)
        assert found[0] == units
        assert (np.diff(found) < 0).all()
        mapped = dense.ranks[sites[0].tensor] > 2
        assert all(n % (16 if mapped and units >= 64 else 4 if mapped else 1) == 0 for n in found[1:])
        assert set(probed(found)) <= set(found) - {units}
        if mapped:
            assert all(n % 16 == 0 for n in widths(sites, units, dense.ranks, aligned=True)[1:])


@pytest.mark.parametrize(("kind", "share"), [("params", 0.5), ("params", 0.25), ("macs", 0.5), ("macs", 0.8)])
def test_a_cost_is_reached(kind: str, share: float) -> None:
    report = compile_model(shipped(), None, None, Options(**{kind: share})).report
    assert report.goal_reached is not None
    assert (report.goal_reached.kind, report.goal_reached.asked) == (kind, share)
    reached = getattr(report.sizes.compiled, kind) / getattr(report.sizes.dense, kind)
    assert report.goal_reached.reached == reached
    assert share - 0.06 < reached <= share  # feature maps of this small model go in steps of 4 to 16 channels
    assert report.fidelity is not None
    assert report.fidelity.agreement > 0.95


def test_the_frontier_is_reported() -> None:
    report = compile_model(shipped(), None, None, Options(macs=0.6)).report
    assert len(report.candidates) >= 15  # of 24 asked for: feature maps go in steps
    sizes = [entry.size for entry in report.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert all(0 < e.iia_lower < e.iia <= 1 and e.size == pytest.approx((e.params + e.macs) / 2) for e in report.candidates)
    assert report.candidates[0].iia > report.candidates[-1].iia


def test_a_latency_is_measured_until_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing that another test has measured
    asked: list[int] = []

    def slow(dense: Any, compiled: Any, data: Any, batch: int) -> tuple[float, float]:
        asked.append(count_parameters(compiled))
        return 1.0, 0.9 - 0.2 * len(asked)

    def foretold(view: Any) -> float:  # by size, and far above what the model really takes: the same on any machine
        return float(sum(np.prod(view.shape(i) or 1) for i in range(len(view.node.inputs))))

    monkeypatch.setattr("mscompile.network.latency._measure", foretold)
    monkeypatch.setattr("mscompile.search.search.measure_latency", slow)
    report = compile_model(shipped(), None, None, Options(latency=0.55)).report
    assert len(asked) == 2  # 0.7 is too slow, 0.5 is not
    assert asked[0] >= asked[1]
    assert report.goal_reached is not None
    assert report.goal_reached.kind == "latency"
    assert all(site.width % 16 == 0 for site in report.sites if len(site.name) and "relu_3" not in site.name)


@pytest.mark.parametrize("goal", [{"params": 0.001}, {"macs": 1e-4}])
def test_goals_out_of_reach(goal: Any) -> None:
    with pytest.raises(GoalError, match="cannot be reached"):
        compile_model(mlp(), {"x": samples()}, None, Options(**goal))


def test_a_latency_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mscompile.search.search.measure_latency", lambda *_: (1.0, 1.0))
    with pytest.raises(GoalError, match="latency"):
        compile_model(shipped(), None, None, Options(latency=0.5))


@pytest.mark.parametrize("fields", [{"params": 0.0}, {"macs": 1.5}, {"latency": -1.0}, {"params": 0.5, "macs": 0.5}])
def test_goals_that_make_no_sense(fields: Any) -> None:
    with pytest.raises(UsageError):
        Options(**fields)


# --- the latency table ------------------------------------------------------------------------------------------------


def test_latencies_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_model(mlp(), {"x": samples()}, None, Options(params=0.7))
    (file,) = (tmp_path / "mscompile").iterdir()
    table = LatencyTable.open()
    assert table.path == file
    assert table.entries
    assert all(milliseconds > 0 for milliseconds in table.entries.values())
    monkeypatch.setattr("mscompile.network.latency._measure", lambda _: pytest.fail("measured again"))
    compile_model(mlp(), {"x": samples()}, None, Options(params=0.7))


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', "null", "\0"])
def test_tables_that_cannot_be_read_count_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = LatencyTable.open().path
    assert path is not None
    path.parent.mkdir()
    path.write_text(content)
    assert LatencyTable.open().entries == {}


def test_no_cache_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_model(mlp(), {"x": samples()}, None, Options(params=0.7, cache=False))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = compile_model(mlp(), {"x": samples()}, None, Options(params=0.7))
    assert any("latency table" in warning for warning in result.report.warnings)


@pytest.mark.parametrize(("steps", "expected"), [(1000, 24), (40, 24), (23, 22), (6, 5)])
def test_a_ladder_has_enough_rungs_where_there_are_as_many_steps(steps: int, expected: int) -> None:
    sizes = np.linspace(1.0, 0.03, steps).tolist()
    found = ladder(sizes)
    assert found == sorted(set(found))
    assert 0 not in found
    assert len(found) == expected
    assert len(found) >= min(ENOUGH, steps - 1)
