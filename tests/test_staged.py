"""A forward pass in stages, against one in one go."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from mscompile.intake.samples import Samples
from mscompile.planning.staged import StagedPass
from mscompile.runtime import Session
from mscompile.verification.skeletons import Skeleton, weightless

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,4,6] x, float[N,6] z, bool far, float[I,J] a, float[K,L] b, float[M,O] c) => (float[N,2] y, float[N,6] w)
<int64[1] one = {1}, int64[1] minus = {-1}>
{
  bt = Transpose<perm = [1, 0]>(b)
  h = MatMul(x, a)
  r = Relu(h)
  n = Shape(r)
  first = Gather<axis = 0>(n, one)
  s = ReduceMean<axes = [1], keepdims = 0>(r)
  t = Add(s, z)
  wide = MatMul(t, bt)
  g = Sigmoid(wide)
  rows = Concat<axis = 0>(minus, first)
  folded = Reshape(g, rows)
  back = ReduceSum<keepdims = 0>(folded, minus)
  p = If (far) <
    then_branch = yes () => (float[N,6] u) { u = Mul(t, t) },
    else_branch = no () => (float[N,6] v) { v = Neg(s) }
  >
  w = Add(p, t)
  ct = Transpose<perm = [1, 0]>(c)
  y = MatMul(w, ct)
}
"""
PLACES = ("h", "r", "t", "wide", "g", "p", "w")
CLOSE = 1e-5
"""Of float32 through ten operators, fused in other ways."""


SHAPES = {"a": (6, 6), "b": (8, 6), "c": (2, 6)}


def network(text: str = GRAPH, **shapes: tuple[int, ...]) -> Skeleton:
    """The graph with random weights, which are not in it."""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {**SHAPES, **shapes}.items()}
    return weightless(model).with_weights(given)


@pytest.fixture
def data() -> Samples:
    rng = np.random.default_rng(1)
    inputs = {"x": rng.standard_normal((11, 4, 6)), "z": rng.standard_normal((11, 6))}
    cast = {name: array.astype(np.float32) for name, array in inputs.items()}
    return Samples({**cast, "far": np.array(True)}, None, "made up", (), frozenset({"far"}))


def whole(graph: Skeleton, names: tuple[str, ...], samples: Samples) -> dict[str, np.ndarray]:
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    return Session(graph.with_graph(proto)).run_all(samples.batches(4), list(names))


@pytest.mark.parametrize("places", [PLACES, PLACES[1::2], PLACES[-1:]])
def test_every_place_is_as_in_one_pass_and_nothing_is_computed_twice(
    places: tuple[str, ...], data: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, run = network(), Counter()
    make = StagedPass._session

    def counting(self, numbers, *rest):
        run.update(self._nodes[i].output[0] for i in numbers)
        return make(self, numbers, *rest)

    monkeypatch.setattr(StagedPass, "_session", counting)
    expected = whole(graph, (*places, "y"), data)
    stages = StagedPass(graph, data, 4)
    for place in places:
        found = np.concatenate([batch[place] for batch in stages.advance([place], {})])
        np.testing.assert_allclose(found, expected[place], rtol=CLOSE, atol=CLOSE)
    assert {name for name, times in run.items() if times > 1} <= {"bt", "ct"}, "only what depends on no input"
    assert "back" not in run, "what leads nowhere"
    for _ in range(2):
        np.testing.assert_allclose(stages.outputs(["y"], {})["y"], expected["y"], rtol=CLOSE, atol=CLOSE)


def test_weights_ahead_may_change_and_those_behind_do_not_count(data: Samples) -> None:
    graph, rng = network(), np.random.default_rng(2)
    stages = StagedPass(graph, data, 4)
    for _ in stages.advance(["t"], {}):
        pass
    other = {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in ("a", "c")}
    found, old = stages.outputs(["y", "w"], other), whole(graph, ("y", "w"), data)
    expected = whole(graph.with_graph(graph.proto, {"c": other["c"]}), ("y",), data)["y"]
    np.testing.assert_allclose(found["y"], expected, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(found["w"], old["w"], rtol=CLOSE, atol=CLOSE)
    assert np.abs(found["y"] - old["y"]).max() > 0.1


def test_what_leads_to_given_tensors_is_not_run(data: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, rng, opened = network(), np.random.default_rng(2), []
    make = StagedPass._session
    monkeypatch.setattr(StagedPass, "_session", lambda self, *rest: opened.append(rest[0]) or make(self, *rest))
    stages, maker = StagedPass(graph, data, 4), [node.output[0] for node in graph.proto.graph.node].index("t")
    given = rng.standard_normal((11, 6)).astype(np.float32)
    old, found = (
        stages.outputs(["y"], {}),
        stages.outputs(["y", "t"], {}, [{"t": given[:4]}, {"t": given[4:8]}, {"t": given[8:]}]),
    )
    assert [maker in numbers for numbers in opened] == [True, False]
    np.testing.assert_array_equal(found["t"], given)
    np.testing.assert_allclose(found["y"], (given**2 + given) @ graph.weights["c"].T, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_array_equal(stages.outputs(["y"], {})["y"], old["y"], "it is made again where it is not given")
    assert len(opened) == 2, "each has its session"


def test_weights_that_are_inputs_take_one_session(data: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, rng, opened = network(), np.random.default_rng(2), []
    make = StagedPass._session
    monkeypatch.setattr(StagedPass, "_session", lambda self, *rest: opened.append(rest) or make(self, *rest))
    text = onnx.parser.parse_model(GRAPH)
    left = {name: array for name, array in graph.weights.items() if name != "c"}
    stages = StagedPass(weightless(text).with_weights(left), data, 4)
    assert stages.follows("t", {})
    assert not stages.follows("y", {})
    assert stages.follows("y", {"c": graph.weights["c"]})
    for _ in stages.advance(["t"], {}):
        pass
    opened.clear()
    for _ in range(3):
        other = {"c": rng.standard_normal(SHAPES["c"]).astype(np.float32)}
        expected = whole(graph.with_graph(graph.proto, other), ("y",), data)["y"]
        np.testing.assert_allclose(stages.outputs(["y"], other)["y"], expected, rtol=CLOSE, atol=CLOSE)
        ahead = stages.ahead(["y"], {})
        found = np.concatenate([ahead.run(number, other)["y"] for number in range(3)])
        np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)
    assert len(opened) == 1
    for _ in range(2):
        other = {"b": rng.standard_normal(SHAPES["b"]).astype(np.float32)}
        expected = whole(graph.with_graph(graph.proto, other), ("g",), data)["g"]
        np.testing.assert_allclose(stages.outputs(["g"], other)["g"], expected, rtol=CLOSE, atol=CLOSE)
    assert len(opened) == 3, "one that is no input is laid out in its session"


def test_what_is_no_array_is_not_held(data: Samples) -> None:
    text = GRAPH.replace("t = Add(s, z)", "q = SequenceConstruct(s, z)\n  t = ConcatFromSequence<axis = 1>(q)")
    graph = network(
        text.replace("v = Neg(s)", "v = Neg(z)").replace("Mul(t, t)", "Mul(s, s)").replace("(p, t)", "(p, z)"), b=(8, 12)
    )
    expected, stages = whole(graph, ("t", "g", "y"), data), StagedPass(graph, data, 4)
    for place in ("t", "g"):
        found = np.concatenate([batch[place] for batch in stages.advance([place], {})])
        np.testing.assert_allclose(found, expected[place], rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(stages.outputs(["y"], {})["y"], expected["y"], rtol=CLOSE, atol=CLOSE)
