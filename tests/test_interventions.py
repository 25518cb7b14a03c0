"""Reading and setting units of any model, and the checks that stand before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import FEATURES, mlp, samples, weight

from mscompile.errors import VerificationError
from mscompile.verification.checks import check_rows, depends_on_batch, planted_defects
from mscompile.verification.interventions import Intervened
from mscompile.verification.skeletons import weightless
from mscompile.verification.surgery import Patch

COUNT = 12
SIZES = (FEATURES, 400, 8, 3)  # wide enough for its weights to be left out of the graphs
FLOAT32 = 1e-5
"""Absolute, of outputs near 1 computed in float32 and in float64."""


def by_hand(model: onnx.ModelProto, x: np.ndarray, change: Any = lambda _, h: h) -> np.ndarray:
    hidden = x.astype(np.float64)
    for i in range(3):
        hidden = hidden @ weight(model, f"w{i}") + weight(model, f"b{i}")
        if i < 2:
            hidden = change(i, np.maximum(hidden, 0.0))
    return hidden


def test_units_are_set_and_everything_behind_is_recomputed() -> None:
    model, x, other = mlp(SIZES), samples(COUNT), samples(COUNT, seed=5)
    opened = Intervened(model, [Patch("h0", 2, 1), Patch("h1", 2, 1)])
    source = opened.read({"x": other})
    np.testing.assert_allclose(source["y"], by_hand(model, other), atol=FLOAT32)
    mask = np.random.default_rng(0).random((COUNT, 400)) < 0.3
    found = opened.run({"x": x}, {"h0": (mask, source["h0"])})["y"]
    np.testing.assert_allclose(
        found, by_hand(model, x, lambda i, h: np.where(mask, source["h0"], h) if i == 0 else h), atol=FLOAT32
    )
    one = np.zeros((COUNT, 8), dtype=bool)
    one[:, 2] = True
    constant = opened.run({"x": x}, {"h1": (one, np.full((1, 1), 0.25, dtype=np.float32))})["y"]
    np.testing.assert_allclose(constant, by_hand(model, x, lambda i, h: np.where(one, 0.25, h) if i else h), atol=FLOAT32)
    both = opened.run({"x": x}, {"h0": (mask, source["h0"]), "h1": (one, source["h1"])})["y"]
    assert not np.allclose(both, found)
    assert np.array_equal(opened.run({"x": x}, {})["y"], opened.read({"x": x})["y"])


def test_graphs_hold_no_heavy_weights() -> None:
    model = mlp(SIZES)
    before = model.SerializeToString()
    skeleton = weightless(model)
    assert set(skeleton.weights) == {"w0", "w1", "b0"}
    assert skeleton.proto.ByteSize() < 0.2 * len(before)
    assert model.SerializeToString() == before
    for name, array in skeleton.weights.items():
        assert np.array_equal(array, weight(model, name))


def tokens(*, mixed: bool) -> onnx.ModelProto:
    """[N, 4, 3] reshaped to [4 N, 3] rows; `mixed` puts the samples' rows among each other."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2] if mixed else [0, 1, 2]),
        helper.make_node("Reshape", ["t", "rows"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Reshape", ["a", "back"], ["y"]),
    ]
    stored = [
        numpy_helper.from_array(np.array([-1, 3]), "rows"),
        numpy_helper.from_array(np.array([-1, 20] if not mixed else [4, -1, 5]), "back"),
        numpy_helper.from_array(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32), "w"),
    ]
    ends = [helper.make_tensor_value_info("x", 1, ["N", 4, 3]), helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(nodes, "tokens", [ends[0]], [ends[1]], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_rows_of_a_sample_are_set_together() -> None:
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    opened = Intervened(tokens(mixed=False), [Patch("a", 2, 1)])
    check_rows("dense", opened, {"x": x})
    mask = np.zeros((6, 5), dtype=bool)
    mask[2, 1] = True
    plain = opened.read({"x": x})
    found = opened.run({"x": x}, {"a": (mask, plain["a"] + 1.0)})["y"].reshape(6, 4, 5)
    changed = found != plain["y"].reshape(6, 4, 5)
    assert changed[2, :, 1].all()
    assert changed.sum() == 4
    with pytest.raises(VerificationError, match="sample by sample"):
        check_rows("dense", Intervened(tokens(mixed=True), [Patch("a", 2, 1)]), {"x": x})


def test_answers_that_depend_on_the_batch() -> None:
    whole = [helper.make_node("ReduceMax", ["y"], ["m"], keepdims=1), helper.make_node("Div", ["y", "m"], ["z"])]
    model = mlp(extra=whole)
    model.graph.output[0].name = "z"
    x = {"x": samples(COUNT)}
    assert depends_on_batch(Intervened(onnx.shape_inference.infer_shapes(model), [Patch("h0", 2, 1)]), x, "z")
    assert not depends_on_batch(Intervened(mlp(), [Patch("h0", 2, 1)]), x, "y")


def test_defects_that_nothing_shows() -> None:
    """Units that nothing reads: defects there are not seen, and the audit knows."""
    model = mlp()
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "w1"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((16, 8), np.float32), "w1"))
    opened = Intervened(model, [Patch("h0", 2, 1), Patch("h1", 2, 1)])
    kept = {"h0": np.arange(16), "h1": np.arange(8)}
    seen = planted_defects(opened, {"x": samples(COUNT)}, kept, ["y"])
    assert set(seen) == {"a unit is dropped", "a column is scaled", "units are shuffled"}
    assert all("h0" not in tensors for tensors in seen.values())
    healthy = planted_defects(Intervened(mlp(), opened.patches), {"x": samples(COUNT)}, kept, ["y"])
    assert all(tensors == ["h0", "h1"] for tensors in healthy.values())
