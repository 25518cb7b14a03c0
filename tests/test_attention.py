"""Attention as one operator, of the standard and of onnxruntime: heads, value channels and query-key pairs go exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import pytest
from golden import canonical, inputs, plan_for, run

from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.rewrite import rewrite
from mscompile.verification.verify import FOLD_TOLERANCE, fold_error, make_pair

PROJECTIONS = "qm = MatMul(x, wq)\n q = Add(qm, bq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)\n"
PACKED = PROJECTIONS + "a = {op}(q, k, v)"
APART = f"""{PROJECTIONS}
    qs = Reshape(q, all_heads)
    ks = Reshape(k, key_heads)
    vs = Reshape(v, key_heads)
    qt = Transpose<perm=[0,2,1,3]>(qs)
    kt = Transpose<perm=[0,2,1,3]>(ks)
    vt = Transpose<perm=[0,2,1,3]>(vs)
    at = {{op}}(qt, kt, vt)
    ab = Transpose<perm=[0,2,1,3]>(at)
    a = Reshape(ab, joined)
"""
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""Projections apart sum in another order than packed ones."""


def network(
    body: str, operator: str, more: str = "", *, width: int = 4, shared: int = 2, values: int = 4, opset: int = 23
) -> onnx.ModelProto:
    """Queries of two heads, keys and values of `shared`, from one input; ``y`` reads what they attend to."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g (float[N,5,6] x{more}) => (float[N,5,3] y) {{
    {body.format(op=operator)}
    y = MatMul(a, wo)
    }}"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(1)
    queries, keys, attended = 2 * width, shared * width, 2 * max(width, 4) * values // 4
    packed = 2 * queries + attended
    sizes = {"wq": (6, queries), "bq": (queries,), "wk": (6, keys), "wv": (6, keys), "wo": (attended, 3)}
    sizes |= {"wqkv": (6, packed), "bqkv": (packed,), "added": (1, 2, 5, 5)}
    stored = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    stored |= {"all_heads": np.array([0, 0, 2, width]), "key_heads": np.array([0, 0, shared, width])}
    stored |= {"joined": np.array([0, 0, queries]), "five": np.array(5, dtype=np.int32)}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in stored.items() if name in used)
    return model


FUSED, ATTENTION = "com.microsoft.MultiHeadAttention<num_heads=2{}>", "com.microsoft.Attention<num_heads=2{}>"
MASK, LENGTHS = ", int32[N,5] mask", ", int32[N] count"
HALF = {"wq": [6, 4], "bq": [4], "wk": [6, 4], "wv": [6, 4], "wo": [4, 3]}
SHARED = HALF | {"wk": [6, 2], "wv": [6, 2]}
APART_WEIGHTS = {"a.q.weight": [6, 4], "a.k.weight": [6, 4], "a.v.weight": [6, 4], "wo": [4, 3]}
APART_BIASES = {"a.q.bias": [4], "a.k.bias": [4], "a.v.bias": [4]}
CASES = {
    "standard, packed": (network(PACKED, "Attention<q_num_heads=2, kv_num_heads=2>"), HALF),
    "standard, causal": (network(PACKED, "Attention<q_num_heads=2, kv_num_heads=2, is_causal=1>"), HALF),
    "standard, apart": (network(APART, "Attention"), HALF),
    "standard, packed, shared keys": (network(PACKED, "Attention<q_num_heads=2, kv_num_heads=1>", shared=1), SHARED),
    "standard, apart, shared keys": (network(APART, "Attention", shared=1), SHARED),
    "onnxruntime's": (network(PACKED, FUSED.format("")), HALF),
    "onnxruntime's, biased and masked": (
        network(PROJECTIONS + "a = {op}(q, k, v, bqkv, mask, added)", FUSED.format(""), MASK),
        HALF | APART_BIASES,
    ),
    "onnxruntime's, causal, of any length": (
        network(PROJECTIONS + "a = {op}(q, k, v, , count)", FUSED.format(", unidirectional=1"), LENGTHS),
        HALF,
    ),
    "projections inside": (network("a = {op}(x, wqkv)", ATTENTION.format("")), APART_WEIGHTS),
    "projections inside, biased and masked": (
        network("a = {op}(x, wqkv, bqkv, mask, , added)", ATTENTION.format(", unidirectional=1"), MASK),
        APART_WEIGHTS | APART_BIASES,
    ),
    "projections inside, of any length": (
        network("a = {op}(x, wqkv, , count)", ATTENTION.format(""), LENGTHS),
        APART_WEIGHTS,
    ),
    "projections inside, of two widths": (
        network("a = {op}(x, wqkv)", ATTENTION.format(", qkv_hidden_sizes=[8, 8, 4]"), values=2),
        APART_WEIGHTS | {"a.v.weight": [6, 2], "wo": [2, 3]},
    ),
    "grouped": (
        network(
            PROJECTIONS + "a = {op}(q, k, v, , , count, five)",
            "com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>",
            LENGTHS,
            width=16,
            shared=1,
            opset=18,
        ),
        {"wq": [6, 16], "bq": [16], "wk": [6, 8], "wv": [6, 8], "wo": [16, 3]},
    ),
}


def feed(model: onnx.ModelProto, samples: int = 40) -> Mapping[str, np.ndarray]:
    found, rng = dict(inputs(canonical(model), samples=samples, seed=2)), np.random.default_rng(3)
    if "mask" in found:
        found["mask"] = (np.arange(5) <= rng.integers(0, 5, (samples, 1))).astype(np.int32)
    if "count" in found:  # grouped attention counts keys less one, and takes them all
        every = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
        found["count"] = np.full(samples, 4, np.int32) if every else rng.integers(1, 6, samples).astype(np.int32)
    return found


@pytest.mark.parametrize("name", CASES)
def test_canonical_form_computes_the_same(name: str) -> None:
    model, _ = CASES[name]
    given = feed(model)
    np.testing.assert_allclose(run(canonical(model), given)["y"], run(model, given)["y"], **ROUNDING)


@pytest.mark.parametrize("kind", ["constant", "affine"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_cut_exactly(name: str, kind: str) -> None:
    model, expected = CASES[name]
    dense = open_dense(model)
    found = sorted((len(site.readers), len(site.pairings)) for site in dense.sites)
    assert found == [(0, 1), (1, 0)]  # keys, which meet queries, and what is attended to
    plan = plan_for(dense.model, kind, np.random.default_rng(3), lambda size: size // 2)
    compiled = rewrite(dense.model, plan)
    pair = make_pair(dense.scm, compiled.model, plan, compiled.alignment)
    assert fold_error(pair, plan, Samples(dict(feed(model)), None, "test"), 8) <= FOLD_TOLERANCE
    left = {name: list(value.shape) for name, value in compiled.model.graph.initializers.items() if name in expected}
    assert left == expected
