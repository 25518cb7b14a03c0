"""One network written with its samples on this axis or that: what is found of it, and done with it, is the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from golden import canonical, inputs, model, plan_for, proto
from hypothesis import given, settings
from hypothesis import strategies as st

import mscompile
from mscompile.audit.tau import SiteClaim, resolve
from mscompile.calibration import recording
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.statistics import Statistics
from mscompile.errors import UnsupportedError, VerificationError
from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.network.layout import FIRST, ROWS, Layout, reshaped
from mscompile.network.scm import read_scm
from mscompile.planning.recalibration import recalibrate
from mscompile.rewrite import rewrite
from mscompile.runtime import Session
from mscompile.verification.checks import check_full_source, check_patches, check_rows, planted_defects
from mscompile.verification.interchange import Correspondence, Opened, Pair, disjoint_pairs
from mscompile.verification.interventions import Intervened
from mscompile.verification.layouts import observed
from mscompile.verification.skeletons import skeleton_of
from mscompile.verification.surgery import Patch, probe
from mscompile.verification.verify import FOLD_TOLERANCE, fold_error, make_pair, patches_of

BODY = "a = MatMul(g, w1) ab = Add(a, b1) h = Relu(ab) c = MatMul(h, w2) r = Tanh(c) m = MatMul(r, w3) z = Neg(m)"
WEIGHTS = "float[4,8] w1, float[8] b1, float[8,6] w2, float[6,3] w3"
LAST, TURN = "flat = {-1, 4}", "Transpose<perm=[1,0,2]>"
APART = "int64[4] parts = {-1, 2, 3, 4}, int64[4] there = {2, -1, 3, 3}, int64[3] whole = {-1, 6, 3}, "
WRITTEN = {
    "samples first": ("", "g = Identity(x)", "y = Identity(z)", FIRST),
    "samples second": ("", f"g = {TURN}(x)", f"y = {TURN}(z)", Layout(1, 1, 1)),
    "samples, positions": (
        f"int64[2] {LAST}, int64[3] back = {{-1, 6, 3}}, ",
        "g = Reshape(x, flat)",
        "y = Reshape(z, back)",
        Layout(0, 1, 6),
    ),
    "positions, samples": (
        f"int64[2] {LAST}, int64[3] back = {{6, -1, 3}}, ",
        f"t = {TURN}(x) g = Reshape(t, flat)",
        f"u = Reshape(z, back) y = {TURN}(u)",
        Layout(0, 6, 1),
    ),
    "positions, samples, positions": (
        f"int64[2] {LAST}, {APART}",
        "p = Reshape(x, parts) t = Transpose<perm=[1,0,2,3]>(p) g = Reshape(t, flat)",
        "u = Reshape(z, there) v = Transpose<perm=[1,0,2,3]>(u) y = Reshape(v, whole)",
        Layout(0, 2, 3),
    ),
    "positions beside samples and positions": (
        f"int64[3] flat = {{2, -1, 4}}, {APART}",
        "p = Reshape(x, parts) t = Transpose<perm=[1,0,2,3]>(p) g = Reshape(t, flat)",
        "u = Reshape(z, there) v = Transpose<perm=[1,0,2,3]>(u) y = Reshape(v, whole)",
        Layout(1, 1, 3),
    ),
}  # fmt: skip
OTHERS = [name for name in WRITTEN if name != "samples first"]
SITES = ("h", "r")
COUNT, BATCH = 40, 16
FLOAT32 = 2e-5
"""Sums in another order, relative to the largest entry."""


def text(name: str) -> str:
    weights, begin, end, _ = WRITTEN[name]
    return f"(float[N,6,4] x) => (float[N,6,3] y) <{weights}{WEIGHTS}> {{ {begin} {BODY} {end} }}"


def data() -> Samples:
    return Samples(dict(inputs(model(text("samples first")), samples=COUNT)), None, "generated")


def near(found: Any, wanted: Any) -> None:
    if wanted is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32 * max(float(np.abs(wanted).max()), 1e-30))


@pytest.mark.parametrize("name", WRITTEN)
def test_samples_are_followed(name: str):
    scm = read_scm(model(text(name)))
    assert [(site.tensor, site.layout, site.refusal) for site in scm.sites] == [(s, WRITTEN[name][3], None) for s in SITES]
    assert [reader.layout for site in scm.sites for reader in site.readers] == [WRITTEN[name][3]] * 2


MEASURE = Measure(outputs={"y": 1.0}, curvature="identity", probes=3, second=True, shared=True)


@cache
def statistics(name: str, memory: int = 1 << 30) -> Statistics:
    scm = read_scm(model(text(name)))
    return calibrate(scm, scm.sites, data(), batch_size=BATCH, measure=MEASURE, memory=memory)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_statistics_are_the_same(name: str, recorded: bool, monkeypatch: pytest.MonkeyPatch):
    wanted, runs = statistics("samples first"), []
    made = recording.there_and_back
    monkeypatch.setattr(recording, "there_and_back", lambda *given: (runs.append(1), made(*given))[1])
    found = statistics(name, 1000 if recorded else 1 << 30)
    assert len(runs) == recorded
    for tensor in SITES:
        for quantity in ("count", "mean", "squares", "scatter", "shared", "low", "high"):
            near(getattr(found.moments[tensor], quantity), getattr(wanted.moments[tensor], quantity))
        for quantity in ("samples", "s11", "s12", "s22", "second"):
            near(getattr(found.curvature[tensor], quantity), getattr(wanted.curvature[tensor], quantity))


@cache
def compiled(name: str) -> mscompile.Compilation:
    options = mscompile.Options(keep={"h": 5, "r": 4}, probes=3, swap=0.3, batch_size=BATCH)
    x = np.random.default_rng(0).standard_normal((120, 6, 4)).astype(np.float32)
    return mscompile.compile_model(proto(text(name)), {"x": x}, None, options)


@pytest.mark.parametrize("name", OTHERS)
def test_plans_fits_and_fidelity_are_the_same(name: str):
    wanted, found = compiled("samples first"), compiled(name)
    assert found.report.fold_error <= FOLD_TOLERANCE
    for a, b in zip(wanted.plan.sites, found.plan.sites, strict=True):
        assert a.kept.tolist() == b.kept.tolist()
        near(b.affine, a.affine)
        assert b.predicted_risk == pytest.approx(a.predicted_risk, rel=1e-3)
        assert [w.reader for w in a.windows] == [w.reader for w in b.windows]
    a, b = wanted.report.fidelity, found.report.fidelity
    assert (b.trials, b.disagreements) == (a.trials, pytest.approx(a.disagreements, rel=1e-3))
    assert b.logit_mse_relative == pytest.approx(a.logit_mse_relative, rel=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_readers_are_fitted_alike(name: str):
    fitted = {}
    for written in ("samples first", name):
        dense = open_dense(proto(text(written)))
        plan = plan_for(dense.model, "affine", np.random.default_rng(3), lambda size: size // 2)
        plan = plan.model_copy(update={"swap": 0.3})
        done, steps = recalibrate(dense, plan, statistics(written), data(), data(), {"y": 1.0}, batch_size=BATCH)
        fitted[written] = [window for site in done.sites for window in site.windows]
        assert [step.refitted for step in steps] == [("c",), ("m",)]
    for a, b in zip(fitted["samples first"], fitted[name], strict=True):
        np.testing.assert_allclose(b.columns, a.columns, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["constant", "affine"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_compiled_is_the_dense_model_under_the_plan(name: str, kind: str):
    dense = model(text(name))
    scm, plan = read_scm(dense), plan_for(dense, kind, np.random.default_rng(0), lambda size: size // 2)
    small = rewrite(dense, plan)
    pair = make_pair(scm, small.model, plan, small.alignment)
    assert fold_error(pair, plan, data(), BATCH) <= FOLD_TOLERANCE


def opened(dense: str, small: str) -> Opened:
    """A network interchanged with itself, written so and so, four units of each site kept."""
    scms = [read_scm(model(text(name))) for name in (dense, small)]
    ours, theirs = (patches_of(scm) for scm in scms)
    kept = np.array([0, 2, 3, 5])
    sites = [Correspondence(ours[s], theirs[s], size, size, kept, kept) for s, size in zip(SITES, (8, 6), strict=True)]
    return Opened(Pair(*(skeleton_of(scm.model) for scm in scms), tuple(sites)), {"y": "y"}, batch_size=7)


@pytest.mark.parametrize("small", WRITTEN)
@pytest.mark.parametrize("dense", WRITTEN)
def test_interchange_sets_the_same_units(dense: str, small: str):
    pairs = disjoint_pairs(COUNT, 1)
    how: dict[str, Any] = {"law": "all-sites", "swap": 0.5, "seed": 4, "own": True}
    wanted = opened("samples first", "samples first").trials(data(), *pairs, **how)
    for a, b in zip(wanted, opened(dense, small).trials(data(), *pairs, **how), strict=True):
        assert b.own is not None
        for found in (b.dense, b.matched, b.own):
            near(found["y"], a.dense["y"])


@pytest.mark.parametrize("name", WRITTEN)
def test_self_checks_hold(name: str):
    scm = read_scm(model(text(name)))
    batch = next(data().batches(BATCH))
    intervened = Intervened(skeleton_of(scm.model), list(patches_of(scm).values()))
    check_patches("dense", intervened, batch, ["y"])
    check_rows("dense", intervened, batch)
    check_full_source(intervened, batch, ["y"])
    seen = planted_defects(intervened, batch, {"h": np.arange(8), "r": np.arange(6)}, ["y"])
    assert all(tensors == ["h", "r"] for tensors in seen.values())


@pytest.mark.parametrize("stated", [layout for *_, layout in WRITTEN.values()])
@pytest.mark.parametrize("name", OTHERS)
def test_layouts_that_do_not_hold_are_found_out(name: str, stated: Layout):
    scm, true = read_scm(model(text(name))), WRITTEN[name][3]
    patch = replace(patches_of(scm)["h"], layout=stated)
    if stated in (true, FIRST) or stated.axis == patch.axis:  # nothing is asked where samples are first and alone
        return
    with pytest.raises(VerificationError, match="sample by sample"):
        check_rows("dense", Intervened(skeleton_of(scm.model), [patch]), next(data().batches(BATCH)))


@pytest.mark.parametrize("count", [6, 7, 12])
@pytest.mark.parametrize("name", WRITTEN)
def test_experiments_show_where_samples_are(name: str, count: int):
    """Also where there are as many samples as positions, and the first and last of these are the same in all samples."""
    source = model(text(name))
    batch = {"x": np.array(data().inputs["x"][:count])}
    batch["x"][:, [0, -1]] = 0.5
    session = Session(probe(skeleton_of(source), SITES), optimise=False)
    values = session.run(batch)
    sites = [
        SiteClaim(dense=s, dense_axis=-1, compiled_axis=-1, dense_channels=(0, 1), compiled_channels=(0, 1)) for s in SITES
    ]
    patches = [site.dense for site in resolve(sites, "given", values, values).sites]
    assert observed(session.run, batch, values, patches, frozenset()) == dict.fromkeys(SITES, WRITTEN[name][3])


# --- layouts themselves -----------------------------------------------------------------------------------------------

LAYOUTS = [layout for *_, layout in WRITTEN.values()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_brought_to_the_front_comes_back(layout: Layout):
    n, shape = 5, [4, 3, 7]
    shape[layout.axis] = n * (layout.before or 1) * (layout.behind or 1)
    array = np.random.default_rng(0).standard_normal(shape)
    front = layout.front(array, n)
    assert front.shape[0] == n
    assert front.shape[layout.channel(2)] == 7
    np.testing.assert_array_equal(layout.back(front), array)
    marked = np.zeros((n, 7), dtype=bool)
    marked[1, 2] = True
    mask = Patch("t", 3, 2, layout).mask(marked, shape[layout.axis])
    seen = np.moveaxis(layout.front(np.broadcast_to(mask, shape), n), layout.channel(2), 1)
    assert (seen.reshape(n, 7, -1) == marked[:, :, None]).all()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(2, 5),
    st.data(),
)
def test_samples_are_found_behind_a_reshape(before: list[int], behind: list[int], n: int, draw: Any):
    """Any shape of the same elements in which the samples stand on one axis, sizes of that axis known or not."""
    source = (*before, n, *behind)
    number = np.broadcast_to(np.arange(n).reshape(n, *[1] * len(behind)), source)
    cut = sorted(draw.draw(st.sets(st.integers(1, len(source) - 1))))
    groups = [source[a:b] for a, b in zip([0, *cut], [*cut, len(source)], strict=True)]
    target = tuple(int(np.prod(group)) for group in groups)
    free = draw.draw(st.booleans())
    axis = next(i for i, end in enumerate([*cut, len(source)]) if end > len(before))
    stated = tuple("M" if free and i == axis else size for i, size in enumerate(target))
    given_as = (*before, "N" if free else n, *behind)
    found = reshaped(Layout(len(before), 1, 1), given_as, stated)
    assert found is not None
    front = found.front(number.reshape(target), n)
    assert (front.reshape(n, -1) == np.arange(n)[:, None]).all()


def test_sizes_that_are_not_known_say_less():
    flat = reshaped(Layout(0, 1, 1), ("N", "S", 32), (None, 32))
    assert flat == ROWS
    assert reshaped(flat, (None, 32), ("N", "S", 4, 8)) == Layout(0, 1, None)
    assert reshaped(Layout(1, 1, 1), ("S", "N", 4, 8), (None, 32)) == Layout(0, None, 1)
    assert reshaped(Layout(1, 1, 1), ("S", "N", 32), ("S", "N", 4, 8)) == Layout(1, None, 1)
    assert reshaped(Layout(1, 1, 1), ("S", "N", "E"), (None, None, None)) is None


# --- what cannot be ---------------------------------------------------------------------------------------------------

MIXING = """(float[6,N,8] x) => (float[6,N,3] y) <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,3] wo> {
    q = MatMul(x, wq) qt = Transpose<perm=[1,0,2]>(q)
    k = MatMul(x, wk) kt = Transpose<perm=[1,2,0]>(k)
    v = MatMul(x, wv) vt = Transpose<perm=[1,0,2]>(v)
    s = MatMul(qt, kt) p = Softmax<axis=-1>(s) o = MatMul(p, vt) ot = Transpose<perm=[1,0,2]>(o) y = MatMul(ot, wo)
}"""


def test_positions_that_are_taken_for_samples_are_refused():
    """A model exported with positions first: its data have no axis 0 of samples."""
    x = np.random.default_rng(0).standard_normal((120, 6, 8)).astype(np.float32)
    with pytest.raises(UnsupportedError, match="do not go through the model one by one"):
        mscompile.compile_model(proto(MIXING), {"x": x}, None, mscompile.Options(keep=0.5))


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_major", [0, 1])
def test_samples_are_followed_through_recurrent_operators(operator: str, batch_major: int):
    times = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    begin, end = ("t = Identity(x)", "u = Squeeze(q, two)") if batch_major else (f"t = {TURN}(x)", "u = Squeeze(q, one)")
    source = f"""(float[N,5,4] x) => (float[?,?,3] y) <float[1,{8 * times},4] w, float[1,{8 * times},8] r,
        int64[1] one = {{1}}, int64[1] two = {{2}}, float[8,6] w1, float[6,3] w2> {{
        {begin} q = {operator}<hidden_size=8, layout={batch_major}>(t, w, r) {end}
        a = MatMul(u, w1) h = Relu(a) y = MatMul(h, w2)
    }}"""
    (site,) = read_scm(canonical(proto(source))).sites
    assert site.layout == (FIRST if batch_major else Layout(1, 1, 1))
    assert site.refusal is None
