"""Proof and measurement against numpy: one network, one plan, one interchange written out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import scipy.stats
from golden import plan_for
from onnx import helper
from small_models import FEATURES, mlp, samples, set_weight, weight

from mscompile.errors import UnsupportedError, VerificationError
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, open_dense
from mscompile.planning.plan import Plan, SitePlan
from mscompile.rewrite import rewrite
from mscompile.runtime import Session
from mscompile.verification.certificate import risk_bound
from mscompile.verification.metrics import METRICS, default_metric, kl_divergence
from mscompile.verification.skeletons import weightless
from mscompile.verification.surgery import MASK, SOURCE
from mscompile.verification.verify import FOLD_TOLERANCE, Fidelity, Interchange, Pair, fold_error, make_pair, relative_mse

Array = npt.NDArray[Any]

FLOAT32 = 1e-4
"""Relative, of averages over the outputs of a network run in float32, against the same in float64."""
BATCH, DELTA, SWAP = 32, 0.05, 0.4


def data(count: int = 200, dtype: Any = np.float32) -> Samples:
    return Samples({"x": samples(count, dtype=dtype)}, None, "test")


def planned(model: onnx.ModelProto, kind: str = "affine") -> tuple[Pair, Plan]:
    """Half of the units of each layer replaced at random, and the two models it makes."""
    dense = open_dense(model)
    return paired(dense, plan_for(dense.model, kind, np.random.default_rng(3), lambda size: size // 2))


def paired(dense: DenseModel, plan: Plan) -> tuple[Pair, Plan]:
    compiled = rewrite(dense.model, plan)
    return make_pair(dense.scm, compiled.model, plan, compiled.alignment), plan


def unchanged(model: onnx.ModelProto) -> Pair:
    dense = open_dense(model)
    everything = tuple(
        SitePlan(name=s.tensor, tensor=s.tensor, axis=s.axis, size=s.size, kept=np.arange(s.size), constants=np.zeros(0))
        for s in dense.sites
    )
    plan = Plan(model_sha256="", objective="", replacement="constant", swap=0.0, sites=everything)
    return make_pair(dense.scm, dense.model, plan, {})


def measured(pair: Pair, count: int = 200, law: Any = "one-site", swap: float = SWAP, seed: int = 5) -> Fidelity:
    given = data(count)
    return Interchange(pair, given, batch_size=BATCH).run(given, law=law, swap=swap, seed=seed, delta=DELTA)


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "constant", "parents"])
def test_a_compiled_model_is_the_dense_one_under_the_plan(kind: str) -> None:
    pair, plan = planned(mlp(), kind)
    assert fold_error(pair, plan, data(), BATCH) <= FOLD_TOLERANCE


def damaged(pair: Pair, name: str, change: Any) -> Pair:
    """The pair with one weight of the compiled model changed."""
    copy = pair.compiled.whole()
    return replace(pair, compiled=weightless(set_weight(copy, name, change(weight(copy, name)).astype(np.float32))))


def scaled(array: Array) -> Array:
    """The column that weighs most scaled: one that no sample makes active would change nothing."""
    array[:, np.square(array).sum(axis=0).argmax()] *= 1.01
    return array


def without(array: Array) -> Array:
    array[2] = 0.0
    return array


DEFECTS = {
    "a column is scaled": ("w1", scaled),
    "a unit is dropped": ("w2", without),
    "units are in another order": ("w1", lambda a: a[::-1]),
    "a bias is off": ("b1", lambda a: a + 0.001),
    "a weight is not finite": ("w2", lambda a: np.where(a == a.max(), np.nan, a)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_a_compiled_model_are_found(defect: str) -> None:
    pair, plan = planned(mlp())
    with pytest.raises(VerificationError, match="not the dense graph under the plan"):
        fold_error(damaged(pair, *DEFECTS[defect]), plan, data(), BATCH)


def test_a_network_that_amplifies_rounding_is_measured_by_its_last_bits() -> None:
    """Outputs far from zero: their last bit alone is more than the tolerance."""
    model = mlp()
    set_weight(model, "b2", weight(model, "b2") + np.float32(1e4))
    pair, plan = planned(model)
    found = fold_error(pair, plan, data(), BATCH)
    assert FOLD_TOLERANCE < found < 100 * FOLD_TOLERANCE
    with pytest.raises(VerificationError, match="not the dense graph under the plan"):
        fold_error(damaged(pair, *DEFECTS["units are in another order"]), plan, data(), BATCH)


@pytest.mark.parametrize("field", ["affine", "constants", "kept"])
def test_plans_that_were_not_carried_out_are_found(field: str) -> None:
    """Rows of the map or constants swapped, or other units kept."""
    pair, plan = planned(mlp())
    site = plan.sites[0]
    other = np.sort((site.kept + 1) % site.size) if field == "kept" else np.roll(getattr(site, field), 1, axis=0)
    wrong = plan.model_copy(update={"sites": (site.model_copy(update={field: other}), *plan.sites[1:])})
    with pytest.raises(VerificationError):
        fold_error(pair, wrong, data(), BATCH)


# --- the self-checks --------------------------------------------------------------------------------------------------


def test_sites_on_all_paths_determine_the_outputs() -> None:
    assert Interchange(planned(mlp())[0], data(), batch_size=BATCH).full_source_checked


def test_sites_beside_a_path_do_not() -> None:
    skip = [helper.make_node("MatMul", ["x", "w.skip"], ["s"]), helper.make_node("Add", ["y", "s"], ["z"])]
    model = mlp(extra=skip)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((FEATURES, 3), np.float32), "w.skip"))
    model.graph.output[0].name = "z"
    assert not Interchange(planned(model)[0], data(), batch_size=BATCH).full_source_checked


def random_model() -> onnx.ModelProto:
    noise = [
        helper.make_node("RandomNormalLike", ["y"], ["n"], scale=0.1, mean=0.0),
        helper.make_node("Add", ["y", "n"], ["z"]),
    ]
    model = mlp(extra=noise)
    model.graph.output[0].name = "z"
    return onnx.shape_inference.infer_shapes(model)


def test_random_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="same result each time"):
        unchanged(random_model())
    monkeypatch.setattr("mscompile.intake.loading.check_operators", lambda *_: None)  # were one not known to be random
    with pytest.raises(VerificationError, match="the null patch changes the dense model"):
        Interchange(unchanged(random_model()), data(), batch_size=BATCH)


@pytest.mark.parametrize(("check", "kind"), [("null", False), ("self", True), ("full-source", None)])
def test_patches_that_do_not_do_what_they_should_are_found(check: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that is off by one unit in the last place when, and only when, that check runs."""
    plain, pair = Session.run, unchanged(mlp())
    first = data().inputs["x"][:BATCH]

    def run(self: Session, feed: Mapping[str, Array], outputs: Any = None) -> Any:
        found = plain(self, feed, outputs)
        masks = [array for name, array in feed.items() if name.startswith(MASK)]
        reversed_base = not np.array_equal(feed["x"], first)
        if masks and (reversed_base if kind is None else not reversed_base and bool(masks[0].all()) is kind):
            found["y"] = np.nextafter(found["y"], np.float32(np.inf))
        return found

    monkeypatch.setattr(Session, "run", run)
    with pytest.raises(VerificationError, match=f"the {check} patch"):
        Interchange(pair, data(), batch_size=BATCH)


def test_half_precision() -> None:
    model = mlp(dtype=np.float16)
    given = data(dtype=np.float16)
    interchange = Interchange(unchanged(model), given, batch_size=BATCH)
    assert interchange.full_source_checked
    found = interchange.run(given, law="one-site", swap=SWAP, seed=0, delta=DELTA)
    assert (found.iia, found.logit_mse_relative) == (1.0, 0.0)
    cut = Interchange(planned(model)[0], given, batch_size=BATCH)
    assert 0.0 < cut.run(given, law="one-site", swap=SWAP, seed=0, delta=DELTA).iia < 1.0


# --- the measurement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["one-site", "all-sites"])
def test_where_nothing_is_removed_nothing_differs(law: Any) -> None:
    found = measured(unchanged(mlp()), law=law)
    assert (found.trials, found.disagreements, found.iia, found.logit_mse_relative, found.kl) == (100, 0.0, 1.0, 0.0, 0.0)
    assert found.iia_lower == 1 - risk_bound(0, 100, DELTA)


def by_hand(model: onnx.ModelProto, plan: Plan, x: Array, law: str, swap: float, seed: int) -> tuple[Array, Array]:
    """Outputs of both models over all interchanges, from the weights, the plan and the random numbers alone."""
    w, b = ([weight(model, f"{letter}{i}").astype(np.float64) for i in range(3)] for letter in "wb")

    def values(inputs: Array, patch: Any, compiled: bool) -> list[Array]:
        found, hidden = [], inputs.astype(np.float64)
        for i, site in enumerate(plan.sites):
            hidden = patch(i, np.maximum(hidden @ w[i] + b[i], 0.0))
            found.append(hidden)
            if compiled:
                assert site.affine is not None
                hidden = hidden.copy()
                hidden[:, site.replaced] = hidden[:, site.kept] @ site.affine.T + site.constants
        return [*found, hidden @ w[2] + b[2]]

    order = np.random.default_rng(seed).permutation(len(x))
    trials = len(x) // 2
    drawn, numbers = [], [[] for _ in plan.sites]
    for chunk in range(trials // 64 + 1):  # what is drawn does not depend on the batch size
        rng = np.random.default_rng([seed, chunk])
        drawn += (rng.random(64) * len(plan.sites)).astype(int).tolist()
        for i, site in enumerate(plan.sites):
            numbers[i] += rng.random((64, site.size), dtype=np.float32).tolist()
    outputs: tuple[list[Array], list[Array]] = ([], [])
    for start in range(0, trials, BATCH):
        base, source = (x[part[start : start + BATCH]] for part in (order[:trials], order[trials : 2 * trials]))
        rows = slice(start, start + len(base))
        taken = []
        for i, site in enumerate(plan.sites):
            chosen = np.array(numbers[i])[rows][:, site.kept] < swap
            taken.append(np.zeros((len(base), site.size), dtype=bool))
            taken[i][:, site.kept] = chosen & (np.array(drawn[rows]) == i)[:, None] if law == "one-site" else chosen
        dense_source = values(source, lambda _, h: h, compiled=False)

        def patch(i: int, h: Array, taken: Any = taken, new: Any = dense_source) -> Array:
            return np.where(taken[i], new[i], h)

        for compiled in (False, True):
            outputs[compiled].append(values(base, patch, compiled)[-1])
    return np.concatenate(outputs[0]), np.concatenate(outputs[1])


@pytest.mark.parametrize("law", ["one-site", "all-sites"])
@pytest.mark.parametrize("count", [200, 71])
def test_interchange_by_hand(law: Any, count: int) -> None:
    model = mlp()
    pair, plan = planned(model)
    found = measured(pair, count, law)
    y, z = by_hand(model, plan, samples(count), law, SWAP, 5)
    wrong = float((y.argmax(1) != z.argmax(1)).sum())
    assert wrong > 0
    assert (found.trials, found.disagreements) == (count // 2, wrong)
    assert found.iia == pytest.approx(1 - wrong / (count // 2))
    assert found.iia_lower == pytest.approx(1 - risk_bound(wrong, count // 2, DELTA))
    spread = np.square(y - y.mean(axis=0)).mean()
    assert found.logit_mse_relative == pytest.approx(np.square(y - z).mean() / spread, rel=FLOAT32)
    assert found.kl == pytest.approx(divergence(y, z), rel=FLOAT32)


def divergence(y: Array, z: Array) -> float:
    p, q = (np.exp(a - a.max(-1, keepdims=True)) for a in (y, z))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float(np.mean(scipy.stats.entropy(p, q, axis=-1)))


@pytest.mark.parametrize("law", ["one-site", "all-sites"])
def test_what_is_fed(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample in one pair, each trial at its sites, and the dense model's values in both models."""
    pair, plan = planned(mlp())
    given = data()
    interchange = Interchange(pair, given, batch_size=BATCH)
    plain: Any = Session.run
    fed: list[Mapping[str, Array]] = []

    def run(self: Session, feed: Mapping[str, Array], outputs: Any = None) -> Any:
        fed.append(feed)
        return plain(self, feed, outputs)

    monkeypatch.setattr(Session, "run", run)
    interchange.run(given, law=law, swap=SWAP, seed=1, delta=DELTA)
    monkeypatch.undo()
    source, dense, compiled = (fed[i::3] for i in range(3))
    seen = np.concatenate([feed["x"] for feeds in (source, dense) for feed in feeds])
    assert len(seen) == len(np.unique(seen, axis=0)) == len(given)
    touched = []
    for one, two in zip(dense, compiled, strict=True):
        np.testing.assert_array_equal(one["x"], two["x"])
        for site in plan.sites:
            mask, narrow = one[MASK + site.tensor], two[MASK + site.tensor]
            assert not mask[:, site.replaced].any()
            np.testing.assert_array_equal(narrow, mask[:, site.kept])
            np.testing.assert_array_equal(two[SOURCE + site.tensor], one[SOURCE + site.tensor][:, site.kept])
        touched.append(np.stack([one[MASK + site.tensor].any(axis=1) for site in plan.sites]))
    sites = np.concatenate(touched, axis=1)
    assert sites.any(axis=1).all()
    both = (sites.sum(axis=0) == len(plan.sites)).mean()
    assert both == 0.0 if law == "one-site" else both > 0.5  # with several units at each site, few are left out by chance


@pytest.mark.parametrize("law", ["one-site", "all-sites"])
def test_where_nothing_is_swapped_it_is_plain_agreement(law: Any) -> None:
    pair, _ = planned(mlp())
    given = data()
    interchange = Interchange(pair, given, batch_size=BATCH)
    swapped = [interchange.run(given, law=law, swap=p, seed=0, delta=DELTA) for p in (0.0, 0.5)]
    order = np.random.default_rng(0).permutation(len(given))[:100]
    assert swapped[0].iia == pytest.approx(interchange.plain(given.take(order))["agreement"])
    assert swapped[0].logit_mse_relative != swapped[1].logit_mse_relative


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_losses() -> None:
    a = np.array([[[3, 1], [0, 2]], [[1, 2], [0, 4]]], dtype=np.float32)  # [samples, places, classes]
    b = np.array([[[1, 3], [0, 1]], [[1, 2], [0, 4]]], dtype=np.float32)
    assert METRICS["argmax"].loss(a, b).tolist() == [0.5, 0.0]
    assert METRICS["distance"].loss(a, b) == pytest.approx([9 / 14, 0.0])
    assert METRICS["distance"].loss(a, -a).tolist() == [1.0, 1.0]  # four times the norm, at most 1
    assert METRICS["cosine"].loss(a, -2 * a) == pytest.approx([1.0, 1.0])
    assert METRICS["cosine"].loss(a, 2 * a) == pytest.approx([0.0, 0.0])
    assert METRICS["cosine"].loss(np.eye(2), np.eye(2)[::-1]) == pytest.approx([0.5, 0.5])
    assert METRICS["equality"].loss(a.astype(int), b.astype(int)).tolist() == [0.75, 0.0]
    zero = np.zeros((2, 3))
    assert METRICS["distance"].loss(zero, zero).tolist() == [0.0, 0.0]
    for name in ("distance", "cosine"):
        assert (METRICS[name].loss(zero, zero + 1) <= 1).all()


def test_divergence_as_a_loss() -> None:
    y, z = np.random.default_rng(0).normal(0.0, 2.0, (2, 50, 4))
    p, q = (np.exp(a) / np.exp(a).sum(axis=1, keepdims=True) for a in (y, z))
    loss = METRICS["kl"].loss(y, z)
    assert loss == pytest.approx(1 - np.exp(-scipy.stats.entropy(p, q, axis=1)))
    assert ((loss >= 0) & (loss <= 1)).all()
    assert (np.abs(p - q).sum(axis=1) / 2 <= np.sqrt(loss)).all()  # total variation
    assert METRICS["kl"].loss(y, y + 100) == pytest.approx(0.0, abs=1e-12)


def test_the_metric_follows_the_output() -> None:
    assert default_metric(np.zeros((4, 3))).name == "argmax"
    assert default_metric(np.zeros((4, 7, 3))).name == "argmax"
    assert default_metric(np.zeros((4, 1))).name == "distance"
    assert default_metric(np.zeros(4)).name == "distance"
    for dtype in (np.int64, np.uint8, np.bool_):
        assert default_metric(np.zeros((4, 3), dtype)).name == "equality"


def test_accuracy() -> None:
    scores, argmax = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), METRICS["argmax"]
    assert argmax.accuracy(scores, np.array([1, 0, 0, 0])) == 0.75
    assert argmax.accuracy(scores, None) is None
    assert argmax.accuracy(scores, np.array([1, 0])) is None
    assert METRICS["distance"].accuracy(scores, np.array([1, 0, 0, 0])) is None
    pair, given = unchanged(mlp()), data()
    labels = Session(pair.dense).run({"x": given.inputs["x"]})["y"].argmax(axis=1)
    labels[:50] = (labels[:50] + 1) % 3
    plain = Interchange(pair, given, batch_size=BATCH).plain(Samples(given.inputs, labels, "test"))
    assert plain == {"agreement": 1.0, "logit_mse_relative": 0.0, "accuracy_dense": 0.75, "accuracy_compiled": 0.75}


def test_divergence_and_relative_distance() -> None:
    y, z = np.random.default_rng(0).normal(0.0, 3.0, (2, 20, 4, 5))
    assert kl_divergence(y, z) == pytest.approx(divergence(y, z), rel=1e-12)
    assert kl_divergence(y, y + 1000.0) == pytest.approx(0.0, abs=1e-9)
    assert np.isfinite(kl_divergence(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])))
    assert relative_mse(y, np.broadcast_to(y.mean(axis=0), y.shape)) == pytest.approx(1.0)
    assert relative_mse(y, y) == 0.0
