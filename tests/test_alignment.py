"""tau inferred from weights, on pairs whose true tau is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import FEATURES, mlp, samples, set_weight, weight

from mscompile.audit.alignment import infer
from mscompile.audit.pipeline import audit
from mscompile.audit.setup import AuditOptions
from mscompile.errors import UsageError
from mscompile.pipeline import Options, compile_model

SIZES = (FEATURES, 16, 12, 3)


def sliced(model: onnx.ModelProto, kept: list[list[int]]) -> onnx.ModelProto:
    """Units cut out of an `mlp` by slicing its weights, nothing compensated, in the order given."""
    small = mlp((SIZES[0], *map(len, kept), SIZES[-1]))
    for i in range(3):
        w, b = weight(model, f"w{i}"), weight(model, f"b{i}")
        w = w if i == 0 else w[kept[i - 1]]
        set_weight(small, f"w{i}", w[:, kept[i]] if i < 2 else w)
        set_weight(small, f"b{i}", b[kept[i]] if i < 2 else b)
    return small


def pairs(match: Any) -> dict[int, int]:
    return dict(zip(match.kept.tolist(), match.places.tolist(), strict=True))


@pytest.mark.parametrize("order", ["as they were", "shuffled"])
def test_sliced_units_are_found(order: str) -> None:
    rng = np.random.default_rng(4)
    kept = [rng.permutation(16)[:9].tolist(), rng.permutation(12)[:7].tolist()]
    if order == "as they were":
        kept = [sorted(k) for k in kept]
    matches, reasons = infer(mlp(SIZES), sliced(mlp(SIZES), kept))
    assert reasons == []
    assert [(m.dense, m.compiled) for m in matches] == [("h0", "h0"), ("h1", "h1")]
    for match, known in zip(matches, kept, strict=True):
        assert pairs(match) == {channel: place for place, channel in enumerate(known)}


def test_rescaled_units_are_found() -> None:
    """As after folding a batch normalisation: rows scaled, some by negative factors, and columns by their inverse."""
    model, rng = mlp(SIZES), np.random.default_rng(0)
    small = sliced(model, [list(range(0, 16, 2)), list(range(12))])
    scale = rng.uniform(0.2, 5.0, 8) * rng.choice([-1, 1], 8)
    set_weight(small, "w0", (weight(small, "w0") * scale).astype(np.float32))
    set_weight(small, "w1", (weight(small, "w1") / scale[:, None]).astype(np.float32))
    matches, _ = infer(model, small)
    assert pairs(matches[0]) == {2 * place: place for place in range(8)}


def test_folded_readers_are_found(tmp_path: Path) -> None:
    """Affine folds change every reader's weights; without its metadata the compiled model is matched as its plan has it."""
    onnx.save(mlp((FEATURES, 24, 16, 3)), tmp_path / "dense.onnx")
    np.savez(tmp_path / "dense.calib.npz", x=samples(400))
    result = compile_model(tmp_path / "dense.onnx", None, tmp_path / "small.onnx", Options(keep=0.75))
    small = onnx.load(tmp_path / "small.onnx")
    del small.metadata_props[:]
    matches, _ = infer(onnx.load(tmp_path / "dense.onnx"), small)
    planned = {site.tensor: site.kept.tolist() for site in result.plan.sites}
    assert matches
    for match in matches:
        true = {channel: place for place, channel in enumerate(planned[match.dense])}
        assert pairs(match).items() <= true.items()
        assert len(match.kept) >= 0.7 * len(true)


def test_strangers_are_not_matched() -> None:
    for other in (mlp(SIZES, seed=9), mlp((FEATURES, 16, 8, 12, 3)), mlp((FEATURES, 40, 12, 3))):
        matches, reasons = infer(mlp(SIZES), other)
        assert matches == []
        assert reasons


def test_twins_are_left_out() -> None:
    """Two units of the same weights: nothing says which of them was cut."""
    model = mlp(SIZES)
    w, reader = weight(model, "w0"), weight(model, "w1")
    w[:, 3], reader[3] = w[:, 5], reader[5]
    set_weight(set_weight(model, "w0", w), "w1", reader)
    kept = [[0, 1, 3, 7, 9, 10, 11, 12], list(range(12))]
    matches, reasons = infer(model, sliced(model, kept))
    assert set(pairs(matches[0])) == {0, 1, 7, 9, 10, 11, 12}
    assert "1 of 8 units are not clear" in reasons[0]


def convolutional(channels: tuple[int, int], weights: list[np.ndarray]) -> onnx.ModelProto:
    """Conv, Relu, MaxPool, Conv, Relu, Flatten, Gemm on 8 × 8 images."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("MaxPool", ["r0"], ["m0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Flatten", ["r1"], ["f"]),
        helper.make_node("Gemm", ["f", "w2"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", 1, ["N", 1, 8, 8]), helper.make_tensor_value_info("y", 1, ["N", 5])]
    stored = [numpy_helper.from_array(w.astype(np.float32), f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "cnn", [ends[0]], [ends[1]], stored)
    assert weights[2].shape[0] == channels[1] * 16
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_feature_maps_are_followed_through_flattening() -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(8, 1, 3, 3)), rng.normal(size=(12, 8, 3, 3)), rng.normal(size=(12 * 16, 5))
    first, second = [1, 2, 5, 6], [0, 3, 4, 8, 11]
    small = [a[first], b[second][:, first], c.reshape(12, 16, 5)[second].reshape(-1, 5)]
    matches, reasons = infer(convolutional((8, 12), [a, b, c]), convolutional((4, 5), small))
    assert reasons == []
    assert [pairs(m) for m in matches] == [dict(zip(k, range(len(k)), strict=True)) for k in (first, second)]


def test_an_audit_of_a_sliced_model(tmp_path: Path) -> None:
    model = mlp(SIZES)
    onnx.save(model, tmp_path / "dense.onnx")
    onnx.save(sliced(model, [list(range(15)), list(range(12))]), tmp_path / "small.onnx")
    report = audit(
        tmp_path / "dense.onnx", tmp_path / "small.onnx", {"x": samples(600)}, AuditOptions(fidelity=0.6, table=0)
    )
    assert (report.tau_origin, report.verdict) == ("weights", "certified")
    assert "inferred from the weights" in " ".join(report.warnings)
    onnx.save(mlp(SIZES, seed=9), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="cannot be inferred"):
        audit(tmp_path / "dense.onnx", tmp_path / "other.onnx", {"x": samples(600)})
