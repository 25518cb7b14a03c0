"""Re-calibration and the sweep: fits against the law they are of, candidates against the files they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import mlp, samples

from mscompile import Options, compile_model
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.prediction import site_risks
from mscompile.calibration.windows import view_of
from mscompile.clock import Clock
from mscompile.intake.data import read
from mscompile.models import path as shipped
from mscompile.network.dense import open_dense
from mscompile.planning.drafts import Draft, Folding, drafted
from mscompile.planning.plan import SitePlan
from mscompile.planning.preparation import eliminate, split, what_to_measure
from mscompile.planning.probe import Probe
from mscompile.planning.recalibration import recalibrate
from mscompile.planning.refits import Sums, Target
from mscompile.planning.scores import measured_risk, score
from mscompile.planning.staged import StagedPass
from mscompile.rewrite import rewrite
from mscompile.runs.parcel import Parcel
from mscompile.runs.work import NOWHERE, Stage
from mscompile.runtime import Session, no_progress
from mscompile.search.candidates import Workshop
from mscompile.search.risks import GroupRisks
from mscompile.search.sweep import Sweep
from mscompile.verification.interchange import disjoint_pairs
from mscompile.verification.metrics import METRICS
from mscompile.verification.skeletons import weightless
from mscompile.verification.surgery import WEIGHT
from mscompile.verification.verify import fold_error, make_pair

CLOSE = 1e-4
"""Relative: float32 products of tens of rows."""
SAME = 1e-4
"""Of the outputs' spread: float32 rounding through a few layers."""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mscompile.network.sizes.LATENCY_SECONDS", 0.0)


def workshop(model: Any, data: Any, **fields: Any) -> Workshop:
    """All that candidates are made from."""
    options = Options(**fields)
    source = open_dense(model)
    given = read(data, source.specs)
    parts = split(source, given, options)
    statistics = calibrate(
        source.scm, source.sites, parts["calibrate"], batch_size=64, measure=what_to_measure(source, options)
    )
    scores = score(source.scm, source.sites, statistics, options.objective)
    eliminations = eliminate(source, statistics, scores, options)
    return Workshop(source, statistics, scores, eliminations, parts, options, Clock(), no_progress)


@pytest.fixture(scope="module")
def digits() -> Workshop:
    return workshop(shipped(), shipped().with_suffix(".calib.npz"))


def counts_of(made: Workshop, share: float) -> dict[int, int]:
    return {group: max(2, round(share * len(found.order))) for group, found in made.eliminations.items()}


def target_of(made: Workshop, share: float, number: int) -> Target:
    plan = made.plans(counts_of(made, share))[number]
    site = made.source.scm.site(plan.tensor)
    view = view_of(site, site.readers[0])
    assert view is not None
    return Target(site, site.readers[0], view, plan, made.statistics.moments[plan.tensor].mean)


@pytest.mark.parametrize("number", range(4))
def test_weights_of_a_plan_and_back(digits: Workshop, number: int) -> None:
    target = target_of(digits, 0.5, number)
    weights = target.weights()
    again = Target(target.site, target.reader, target.window, target.planned.model_copy(
        update={"windows": (target.plan(weights),)}), target.centre)  # fmt: skip
    np.testing.assert_allclose(again.weights(), weights, rtol=0, atol=CLOSE * np.abs(weights).max())


@pytest.mark.parametrize("swap", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("number", [0, 2])
def test_sums_are_expectations_under_the_law(digits: Workshop, number: int, swap: float) -> None:
    """Against every mask of a few units, each with its probability."""
    target = target_of(digits, 0.1, number)
    rng = np.random.default_rng(0)
    size, taps, marks = target.site.size, target.window.taps, target.window.marks
    kept, replaced, weight = target.planned.kept, target.planned.replaced, target.weight
    shape = (3, 2, size, taps)
    compiled, dense = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    ones = np.ones((2, marks), np.float32)
    sums = Sums(target, swap)
    sums.add(compiled, dense, ones)
    few = min(len(kept), 6)
    features = np.zeros_like(sums.features)
    crossed, spread = np.zeros_like(sums.crossed), 0.0
    other = np.roll(dense, 1, axis=0)
    for mask in product((0, 1), repeat=few):
        full = np.zeros((size, 1))
        full[kept[:few], 0] = mask
        full[kept[few:], 0] = 0.0
        chance = swap ** sum(mask) * (1 - swap) ** (few - sum(mask))
        if chance == 0:
            continue
        e, d = (full * other + (1 - full) * own for own in (compiled, dense))
        h = np.concatenate([e[:, :, kept].reshape(6, -1), np.ones((6, marks))], axis=1)
        d[:, :, replaced] = dense[:, :, replaced]
        t = d.reshape(6, -1) @ weight.reshape(size * taps, -1)
        features += chance * h.T @ h
        crossed += chance * t.T @ h
        spread += chance * float(np.square(t).sum())
    if few < len(kept):
        pytest.skip("too many units to go through all masks")
    np.testing.assert_allclose(sums.features, features, rtol=0, atol=CLOSE * np.abs(features).max())
    np.testing.assert_allclose(sums.crossed, crossed, rtol=0, atol=CLOSE * np.abs(crossed).max())
    assert sums.spread == pytest.approx(spread, rel=CLOSE)
    weights = sums.solver(target.weights())(0.0)
    assert sums.error(weights) <= sums.error(target.weights()) * (1 + CLOSE)
    assert sums.error(weights) == pytest.approx(
        spread - 2 * np.sum(crossed.T * weights) + np.sum(weights * (features @ weights)), rel=1e-2, abs=1e-3 * spread
    )


@pytest.mark.parametrize("replacement", ["affine", "constant", "affine-parents"])
def test_re_calibration_lowers_the_risk_and_stays_exact(replacement: str) -> None:
    made = workshop(shipped(), shipped().with_suffix(".calib.npz"), replacement=replacement)
    plan = made.make(counts_of(made, 0.4), recalibrated=False).plan
    found, steps = recalibrate(
        made.source, plan, made.statistics, made.parts["calibrate"], made.held, made.outputs, batch_size=64
    )
    assert [step.tensor for step in steps] == [site.tensor for site in plan.sites]
    assert any(step.refitted for step in steps)
    test = made.parts["certify"]
    wanted = Session(made.source.model).run_all(test.batches(64))[made.source.output]
    errors = []
    for one in (plan, found):
        compiled = rewrite(made.source.model, one)
        pair = make_pair(made.source.scm, compiled.model, one, compiled.alignment)
        fold_error(pair, one, test, 64)
        errors.append(np.square(Session(compiled.model).run_all(test.batches(64))[made.source.output] - wanted).mean())
    assert errors[1] < 0.9 * errors[0]


def test_constants_at_all_sites_no_longer_collapse() -> None:
    options = {"replacement": "constant", "keep": 0.5}
    plain, found = (
        compile_model(shipped(), None, None, Options(recalibrate=again, **options)).report.fidelity
        for again in (False, True)
    )
    assert plain is not None
    assert found is not None
    assert plain.agreement < 0.7
    assert found.agreement > 0.95


def test_no_re_calibration_leaves_the_plan() -> None:
    made = workshop(mlp(), {"x": samples()})
    candidate = made.make(counts_of(made, 0.5), recalibrated=False)
    assert candidate.plan == candidate.fitted
    assert candidate.steps == ()


def test_new_weights_that_do_worse_are_taken_back(digits: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(targets: Any, *_: Any) -> Any:
        return [t.plan(0.0 * t.weights()) for t in targets]

    monkeypatch.setattr("mscompile.planning.recalibration._refits", spoilt)
    plan = digits.make(counts_of(digits, 0.75), recalibrated=False).plan
    found, steps = recalibrate(
        digits.source, plan, digits.statistics, digits.parts["calibrate"], digits.held, digits.outputs, batch_size=64
    )
    assert all(step.rolled_back and not step.refitted for step in steps)
    assert found == plan


class Kept(Stage):
    """Keeps the first so many parcels."""

    def __init__(self, most: int) -> None:
        super().__init__(NOWHERE, None)
        self.most, self.parcels = most, dict[str, Parcel]()

    def parcel(self, name: str) -> Parcel | None:
        return self.parcels.get(name)

    def keep(self, name: str, content: Parcel) -> None:
        if len(self.parcels) < self.most:
            self.parcels[name] = content


@pytest.mark.parametrize("done", [1, 2, 3])
def test_going_on_gives_the_same_bytes(digits: Workshop, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever onnxruntime fuses within a stage, stages are the same whether what they led to was kept or not."""
    stages, advance = [], StagedPass.advance

    def watched(self: StagedPass, names: Any, weights: Any) -> Any:
        stages.append(tuple(names))
        return advance(self, names, weights)

    monkeypatch.setattr(StagedPass, "advance", watched)
    plan, stage = digits.make(counts_of(digits, 0.4), recalibrated=False).plan, Kept(done)
    args = digits.source, plan, digits.statistics, digits.parts["calibrate"], digits.held, digits.outputs
    first, second = (recalibrate(*args, batch_size=64, stage=stage) for _ in range(2))
    assert len(stage.parcels) == done < len(plan.sites)
    assert [site.sha256 for site in first[0].sites] == [site.sha256 for site in second[0].sites]
    assert first[1] == second[1]
    assert stages[: len(stages) // 2] == stages[len(stages) // 2 :]


# --- the sweep --------------------------------------------------------------------------------------------------------


def tuned(digits: Workshop, plans: Sequence[SitePlan]) -> np.ndarray:
    """Output on the held part of a candidate that is not compiled."""
    passing = StagedPass(digits.tunable.graph, digits.parts["choose"], 64)
    return passing.outputs([digits.source.output], digits.tunable.weights(plans))[digits.source.output]


@pytest.mark.parametrize("share", [0.3, 0.75])
@pytest.mark.parametrize("law", ["one-site", "all-sites"])
def test_a_candidate_does_what_its_file_does(digits: Workshop, share: float, law: Any) -> None:
    counts, held = counts_of(digits, share), digits.parts["choose"]
    sweep = Sweep(digits.source, held, batch_size=64)
    candidate = digits.make(counts, recalibrated=False)
    assert candidate.interchange is not None
    name = digits.source.output
    found = tuned(digits, digits.plans(counts))
    wanted = Session(candidate.compiled.model, optimise=False).run_all(held.batches(64))[name]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=SAME * wanted.std())
    point = sweep.measure(digits.plans(counts), held, law=law, swap=0.1, seed=0)
    fidelity = candidate.interchange.run(held, law=law, swap=0.1, seed=0, delta=0.05)
    assert (point.trials, point.iia) == (fidelity.trials, pytest.approx(fidelity.iia, abs=1.5 / fidelity.trials))
    bases = held.take(disjoint_pairs(len(held), 0)[0])
    assert point.agreement == pytest.approx(candidate.interchange.plain(bases)["agreement"], abs=1.5 / len(bases))
    assert sweep.measure(digits.plans(counts), held, law=law, swap=0.1, seed=0) == point


def test_a_candidate_of_nothing_is_the_dense_model(digits: Workshop) -> None:
    held = digits.parts["choose"]
    wanted = Session(digits.source.model).run_all(held.batches(64))[digits.source.output]
    np.testing.assert_allclose(tuned(digits, ()), wanted, rtol=0, atol=SAME * 10)


def test_risks_of_groups_are_those_of_whole_passes_wherever_the_graph_is_entered(
    digits: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mscompile.search.risks.FEWEST", len(digits.held))
    risks, name, found = GroupRisks(digits), digits.source.output, {}
    for group in risks.places:
        half = len(digits.eliminations[group].order) // 2
        found = risks.measure(group, np.array([half]))
        plans = digits.plans({group: half})
        dense, changed = ({name: tuned(digits, entry)[: len(digits.held)]} for entry in ((), plans))
        risk = measured_risk(plans[0].basis, dense, changed, digits.outputs) / len(digits.held)
        assert found == {half: pytest.approx(risk, rel=CLOSE)}
    assert len(risks.places) > 1
    assert GroupRisks(digits).measure(group, np.array([half])) == found, "the others were kept: to the bit"


def test_a_site_alone_is_replaced_for_all_that_uses_it() -> None:
    """A residual sum sees replaced channels, too: derivatives that predict count it."""
    rng = np.random.default_rng(0)
    first, second, third = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((8, 16), (16, 16), (16, 3)))
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[N,8] x, float[8,16] a, float[16,16] b, float[16,3] c)
        => (float[N,3] y) { h = MatMul(x, a)  r = Relu(h)  t = MatMul(r, b)  s = Add(r, t)  y = MatMul(s, c) }"""
    graph = weightless(onnx.parser.parse_model(text)).with_weights({"a": first, "b": second, "c": third})
    made = workshop(graph.whole(), {"x": rng.standard_normal((400, 8)).astype(np.float32)}, recalibrate=False)
    plan = made.fit(counts_of(made, 0.5), recalibrated=False)[0]
    entry = next(site for site in plan.sites if site.tensor == "r")
    assert entry.affine is not None
    risks = site_risks(made.source.model, plan, made.source.ranks, made.outputs, made.held, 64)
    r = np.maximum(made.held.inputs["x"] @ first, 0)
    change = np.zeros_like(r)
    change[:, entry.replaced] = r[:, entry.kept] @ entry.affine.T + entry.constants - r[:, entry.replaced]
    moved = (change + change @ second) @ third
    assert risks["r"] == pytest.approx(0.5 * float((moved**2).sum(axis=1).mean()), rel=CLOSE)


def dense_layers(kind: str = "float") -> Workshop:
    """Two hidden layers of 24 units: weights that lie either way, one scaled, and a site with two readers."""
    rng, text = (
        np.random.default_rng(0),
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[N,8] x, float[8,24] a, float[24,24] b, float[24] c, float[24,3] d, float[3,24] e) => (float[N,3] y) {
        h = MatMul(x, a)  r = Relu(h)  t = Gemm <alpha = 0.5, transB = 1> (r, b, c)  s = Relu(t)
        u = MatMul(s, d)  v = Gemm <transB = 1> (s, e)  y = Add(u, v) }""",
    )
    shapes = {"a": (8, 24), "b": (24, 24), "c": (24,), "d": (24, 3), "e": (3, 24)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    dtype = np.float16 if kind == "float16" else np.float32
    graph = weightless(onnx.parser.parse_model(text.replace("float[", f"{kind}["))).with_weights(
        {name: weight.astype(dtype) for name, weight in weights.items()}
    )
    return workshop(graph.whole(), {"x": rng.standard_normal((600, 8)).astype(dtype)})


@pytest.mark.parametrize(("kind", "close"), [("float", CLOSE), ("float16", 2e-3)])
def test_drafts_fold_what_plans_fold_whatever_was_tried_before(kind: str, close: float) -> None:
    """To `close` of the largest weight: the floor of the ridge, and a few units in the last of eleven places."""
    made, readers = dense_layers(kind), 0
    dense = made.tunable.weights(())
    for count in (20, 7, 2, 15, 23, 7):
        counts = dict.fromkeys(made.eliminations, count)
        drafts, plans = made.drafts(counts), made.plans(counts)
        assert [type(entry) for entry in drafts] == [Draft, Draft]
        for draft, plan in zip(drafts, plans, strict=True):
            assert (draft.tensor, draft.basis) == (plan.tensor, plan.basis)
            np.testing.assert_array_equal(draft.kept, plan.kept)
        found, wanted = made.tunable.weights(drafts), made.tunable.weights(plans)
        assert found.keys() == wanted.keys()
        most = max(float(np.abs(weight).max()) for weight in wanted.values())
        for name, weight in wanted.items():
            np.testing.assert_allclose(found[name], weight, rtol=0, atol=close * most)
            assert found[name].dtype == weight.dtype
            readers += name.startswith(WEIGHT) and not np.allclose(weight, dense[name])
    assert readers == 6 * 3, "all of them lose rows"


@pytest.mark.parametrize(("kind", "close"), [("float", CLOSE), ("float16", 2e-3)])
def test_what_readers_give_goes_on_from_any_number_of_channels_to_any_other(kind: str, close: float) -> None:
    """To `close` of the largest output: of 16 bits, weights are rounded to eleven places, too, which here they are not."""
    made, read = dense_layers(kind), set()
    for tensor, foldings in made.read_by_rows.items():
        passing = StagedPass(made.tunable.graph, made.held, 64)
        dense = passing.outputs([tensor, *foldings], made.tunable.weights(()))
        readings = drafted(foldings, dense[tensor], dense)
        for count in (20, 7, 2, 15, 24, 7):
            drafts = made.drafts({made.source.scm.site(tensor).group: count})
            wanted = passing.outputs([*foldings], made.tunable.weights(drafts))
            for name, reading in readings.items():
                found = reading.at(count)
                np.testing.assert_allclose(found, wanted[name], rtol=0, atol=close * float(np.abs(dense[name]).max()))
                assert found.dtype == dense[name].dtype
        read |= {name for name in foldings if not np.allclose(wanted[name], dense[name])}
    assert read == {"t", "u", "v"}


@pytest.mark.parametrize("metric", ["argmax", "distance"])
def test_interchanges_go_on_from_one_candidate_to_the_next(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, lost, loss = dense_layers(), set(), METRICS[metric]
    open_sweep = partial(Sweep, made.source, made.parts["certify"], batch_size=16, metric=loss, tunable=made.tunable)
    streamed, run, full = (open_sweep(foldings=foldings) for foldings in (made.read_by_rows, {}, made.read_by_rows))
    monkeypatch.setattr("mscompile.search.sweep.STREAM_BYTES", 0)
    full._bench(made.parts["certify"], 0)
    monkeypatch.undo()
    first, second = made.eliminations
    entries = [made.drafts(dict.fromkeys(made.eliminations, count)) for count in (20, 7, 2, 15, 23)]
    entries += [
        made.drafts({first: 5}),
        made.drafts({second: 5}),
        made.plans({first: 5, second: 9}),
        made.drafts({first: 5}),
    ]
    for law, swap in (("one-site", 0.1), ("all-sites", 0.1), ("all-sites", 0.5)):
        for plans in entries:
            found, wanted, without = (
                sweep.measure(plans, made.parts["certify"], law=law, swap=swap, seed=0) for sweep in (streamed, run, full)
            )
            assert found.trials == wanted.trials > 100
            assert (found.disagreements, found.agreement) == (
                pytest.approx(wanted.disagreements, rel=CLOSE, abs=CLOSE),
                pytest.approx(wanted.agreement, rel=CLOSE),
            )
            assert without == wanted
            lost.add(wanted.disagreements)
    assert len(lost) > 10
    assert streamed._bench(made.parts["certify"], 0).streams[0].keys() == {"r"}, "the other follows it"
    assert not any(sweep._bench(made.parts["certify"], 0).streams[0] for sweep in (run, full))


def test_risks_are_those_of_readers_that_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, few = dense_layers(), slice(20)
    assert few.stop < made.source.scm.sites[0].size <= len(made.held), "of many samples readers are run in any case"
    probes = [
        Probe(made.tunable, made.outputs, made.held.take(taken), 8, foldings=foldings)
        for taken, foldings in ((few, made.read_by_rows), (few, {}), (slice(None), made.read_by_rows), (slice(None), {}))
    ]
    folded: list[str] = []
    arrays = Folding.arrays
    monkeypatch.setattr(Folding, "arrays", lambda self, count: folded.append("") or arrays(self, count))
    for group, place in GroupRisks(made).places.items():
        for probe in probes:
            probe.advance(place)
        for count in (20, 7, 2, 15):
            risks, times = [], []
            for probe in probes:
                made.tunable.weights(made.drafts({group: 24 - count}))  # so that none is remembered
                folded.clear()
                risks.append(probe.risk(plans := made.drafts({group: count}), plans[0].basis))
                times.append(len(folded))
            assert risks[::2] == [pytest.approx(risk, rel=CLOSE) for risk in risks[1::2]]
            assert times[0] == 0 < times[1] == times[2] == times[3]
            assert risks[0] > 0
            made.tunable.weights(plans := made.plans({group: count}))
            assert probes[0].risk(plans, plans[0].basis) == pytest.approx(risks[0], rel=CLOSE), "and of what is no draft"


def test_what_does_not_nest_is_planned_to_be_tried(digits: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in digits.drafts(counts_of(digits, 0.5)):
        kind = Draft if len(digits.source.scm.shapes[entry.tensor]) == 2 else SitePlan
        assert type(entry) is kind, "convolutions have positions, and windows"
    monkeypatch.setattr("mscompile.search.candidates.FOLDED_BYTES", 0)
    made = dense_layers()
    assert {type(entry) for entry in made.drafts(counts_of(made, 0.5))} == {SitePlan}, "no room"
