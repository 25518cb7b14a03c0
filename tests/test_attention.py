"""Attention as one operator, of the standard and of onnxruntime: heads, value channels and query-key pairs go exactly."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from golden import plan_for

from mscompile.data import Samples
from mscompile.dense import open_dense
from mscompile.rewrite import rewrite
from mscompile.verify import FOLD_TOLERANCE, fold_error, make_pair

PACKED = "a = {op}(q, k, v)\n"
APART = """qs = Reshape(q, split)
    ks = Reshape(k, split)
    vs = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(qs)
    kt = Transpose<perm=[0,2,1,3]>(ks)
    vt = Transpose<perm=[0,2,1,3]>(vs)
    at = {op}(qt, kt, vt)
    ab = Transpose<perm=[0,2,1,3]>(at)
    a = Reshape(ab, join)
"""
OPERATORS = {
    "standard, packed": (PACKED, "Attention<q_num_heads=2, kv_num_heads=2>"),
    "standard, heads apart": (APART, "Attention"),
    "onnxruntime's": (PACKED, "com.microsoft.MultiHeadAttention<num_heads=2>"),
}
WEIGHTS = {"wq": (6, 8), "bq": (8,), "wk": (6, 8), "wv": (6, 8), "wo": (8, 3)}


def network(name: str) -> onnx.ModelProto:
    body, operator = OPERATORS[name]
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    g (float[N,5,6] x) => (float[N,5,3] y) {{
    qm = MatMul(x, wq)
    q = Add(qm, bq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    {body.format(op=operator)}
    y = MatMul(a, wo)
    }}"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(1)
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    stored |= {"split": np.array([0, 0, 2, 4]), "join": np.array([0, 0, 8])} if body is APART else {}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in stored.items())
    return model


@pytest.mark.parametrize("kind", ["constant", "affine"])
@pytest.mark.parametrize("name", OPERATORS)
def test_attention_is_cut_exactly(name: str, kind: str) -> None:
    dense = open_dense(network(name))
    assert {site.tensor: (len(site.readers), len(site.pairings)) for site in dense.sites} == {"k": (0, 1), "a": (1, 0)}
    plan = plan_for(dense.model, kind, np.random.default_rng(3), lambda size: size // 2)
    compiled = rewrite(dense.model, plan)
    pair = make_pair(dense.model, compiled.model, plan, dense.ranks, compiled.alignment)
    x = np.random.default_rng(2).standard_normal((40, 5, 6)).astype(np.float32)
    assert fold_error(pair, plan, Samples({"x": x}, None, "test"), 8) <= FOLD_TOLERANCE
    left = {name: list(value.shape) for name, value in compiled.model.graph.initializers.items() if name in WEIGHTS}
    assert left == {"wq": [6, 4], "bq": [4], "wk": [6, 4], "wv": [6, 4], "wo": [4, 3]}
