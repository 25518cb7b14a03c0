"""Passes preserve the function, and compiled graphs are the golden texts at a smaller width.

Every pass but `WriteReplacements` is checked by running the graph before and after; what `WriteReplacements` writes is
checked against the same intervention made by graph surgery.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import KINDS, Arrays, canonical, inputs, model, plan_at, plan_for, run, shapes, under_do

from mscompile.network.scm import read_scm
from mscompile.passes import (
    CANONICALISE,
    FoldCarriers,
    FoldReplacements,
    LowerReplacements,
    RemoveDeadUnits,
    WriteReplacements,
    compiling,
)
from mscompile.planning.plan import Plan
from mscompile.rewrite import rewrite

TOLERANCE = {"float": 2e-5, "double": 1e-12, "float16": 2e-2}
"""Largest difference over the largest output: some hundred roundings of the type."""
WIDTHS = {"h": 8, "k": 6}
KEPT = {"h": 5, "k": 3}


@dataclass(frozen=True)
class Case:
    """A graph of widths $h and $k ($p is 16·$h), and the widths at which constants need a carrier."""

    text: str
    carried: str = ""
    types: tuple[str, ...] = ("float",)

    def dense(self, opset: int = 17, kind: str = "float") -> ir.Model:
        return self.at(WIDTHS, opset, kind)

    def compiled(self, opset: int = 17, kind: str = "float") -> ir.Model:
        return self.at({name: KEPT[name] + (name in self.carried) for name in KEPT}, opset, kind)

    def at(self, widths: dict[str, int], opset: int, kind: str) -> ir.Model:
        return model(self.text.replace("float[", f"{kind}["), opset=opset, p=16 * widths["h"], **widths)


PRODUCTS = ("float", "double", "float16")
MAPS = ("float", "float16")  # onnxruntime has no convolution in double
CASES = {
    "gemm": Case(
        """(float[N,4] x) => (float[N,3] y) <float[4,$h] w1, float[$h] b1, float[$h,3] w2, float[3] b2> {
            a = Gemm(x, w1, b1)
            h = Relu(a)
            y = Gemm(h, w2, b2)
        }""",
        types=PRODUCTS,
    ),
    "gemm in every dress": Case(
        """(float[4,4] x) => (float[4,3] y1, float[4,3] y2, float[4,3] y3, float[4,3] y4, float[4,3] y5, float[4,3] y6)
        <float[$h,4] w1, float[1,$h] b1, float[3,$h] w2, float[$h,3] w3, float[1,3] b3, float[$h,3] w4, float[] b4,
         float[$h,3] w5, float[4,3] b5, float[$h,3] w6, float[$h,3] w7, float[3] b7> {
            a = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w1, b1)
            h = Tanh(a)
            y1 = Gemm<transB=1, alpha=0.5, beta=-3.0>(h, w2)
            y2 = Gemm<alpha=2.0, beta=0.5>(h, w3, b3)
            y3 = Gemm<alpha=2.0, beta=0.5>(h, w4, b4)
            y4 = Gemm<beta=0.5>(h, w5, b5)
            y5 = Gemm<beta=0.0>(h, w6)
            y6 = Gemm<beta=0.0>(h, w7, b7)
        }""",
        types=PRODUCTS,
    ),
    "product and addition": Case(
        """(float[N,4] x) => (float[N,3] y, float[N,3] z, float[N,3] u)
        <float[4,$h] w1, float[$h] b1, float[$h,3] w2, float[1,3] b2, float[$h,3] w3, float[$h,3] w4> {
            p1 = MatMul(x, w1)
            a = Add(b1, p1)
            h = Relu(a)
            p2 = MatMul(h, w2)
            y = Add(p2, b2)
            z = MatMul(h, w3)
            p4 = MatMul(h, w4)
            q = Sigmoid(p4)
            u = Add(q, p4)
        }""",
        types=PRODUCTS,
    ),
    "product behind a product": Case(
        """(float[N,5,4] x) => (float[N,5,3] y) <float[4,$h] w1, float[$h,$k] w2, float[$k,3] w3> {
            h = MatMul(x, w1)
            k = MatMul(h, w2)
            y = MatMul(k, w3)
        }""",
        types=PRODUCTS,
    ),
    "weight from the left": Case(
        """(float[N,5,4] x) => (float[N,3,4] y) <float[$h,5] w1, float[$h,1] b1, float[3,$h] w2> {
            p = MatMul(w1, x)
            a = Add(p, b1)
            h = Relu(a)
            y = MatMul(w2, h)
        }""",
        types=PRODUCTS,
    ),
    "residual layers of a perceptron": Case(
        """(float[N,4] x) => (float[N,3] y)
        <float[4,$h] w0, float[$h,$k] w1, float[$k] b1, float[$k,$h] w2, float[$h,3] w3> {
            r0 = MatMul(x, w0)
            a = Gemm(r0, w1, b1)
            k = Relu(a)
            b = MatMul(k, w2)
            r1 = Add(b, r0)
            y = MatMul(r1, w3)
        }""",
        types=PRODUCTS,
    ),
    "one group, read behind Relu and behind Sigmoid": Case(
        """(float[N,4] x) => (float[N,3] y, float[N,2] z) <float[4,$h] w1, float[$h,3] w2, float[$h,2] w3> {
            a = MatMul(x, w1)
            h = Relu(a)
            s = Sigmoid(a)
            y = MatMul(h, w2)
            z = MatMul(s, w3)
        }""",
        types=PRODUCTS,
    ),
    "padded convolution with a bias": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y)
        <float[$h,3,3,3] w1, float[$h] b1, float[4,$h,3,3] w2, float[4] b2> {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)
            h = Relu(a)
            y = Conv<pads=[1,1,1,1]>(h, w2, b2)
        }""",
        carried="h",
        types=MAPS,
    ),
    "padded convolution without a bias": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[$h,3,3,3] w1, float[4,$h,3,3] w2> {
            a = Conv(x, w1)
            h = Relu(a)
            y = Conv<pads=[2,2,2,2]>(h, w2)
        }""",
        carried="h",
    ),
    "convolution without padding": Case(
        """(float[N,3,7,6] x) => (float[N,4,1,2] y) <float[$h,3,3,2] w1, float[4,$h,3,2] w2> {
            a = Conv<strides=[1,2]>(x, w1)
            h = LeakyRelu(a)
            y = Conv<dilations=[2,1], strides=[1,1], auto_pad="VALID">(h, w2)
        }""",
    ),
    "all paddings at once, and none": Case(
        """(float[N,3,6,6] x) => (float[N,4,3,3] y1, float[N,4,6,6] y2, float[N,4,6,7] y3, float[N,4,3,3] y4,
                                  float[N,4,6,6] y5, float[N,4,4,4] y6, float[N,4,6,6] y7, float[N,2,11,13] y8)
        <float[$h,3,1,1] w, float[$h] b, float[4,$h,3,3] w1, float[4,$h,3,3] w2, float[4,$h,2,2] w3, float[4,$h,3,3] w4,
         float[4,$h,3,3] w5, float[4,$h,3,3] w6, float[4,$h,1,1] w7, float[$h,2,3,3] w8,
         float[4] c1, float[4] c2, float[4] c3, float[4] c5> {
            a = Conv(x, w, b)
            h = Relu(a)
            y1 = Conv<pads=[1,1,1,1], strides=[2,2]>(h, w1, c1)
            y2 = Conv<pads=[2,2,2,2], dilations=[2,2]>(h, w2, c2)
            y3 = Conv<pads=[0,2,1,0]>(h, w3, c3)
            y4 = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(h, w4)
            y5 = Conv<auto_pad="SAME_LOWER">(h, w5, c5)
            y6 = Conv(h, w6)
            y7 = Conv(h, w7)
            y8 = ConvTranspose<strides=[2,2], pads=[1,1,1,0], output_padding=[0,1]>(h, w8)
        }""",
        carried="h",
    ),
    "transposed convolution": Case(
        """(float[N,3,4,4] x) => (float[N,2,10,10] y) <float[3,$h,2,2] w1, float[$h] b1, float[$h,2,3,3] w2, float[2] b2> {
            a = ConvTranspose(x, w1, b1)
            h = Relu(a)
            y = ConvTranspose<strides=[2,2], pads=[1,1,0,0]>(h, w2, b2)
        }""",
        carried="h",
        types=MAPS,
    ),
    "one and three position axes": Case(
        """(float[N,3,6] x, float[N,3,4,4,4] v) => (float[N,4,6] y, float[N,2,4,4,4] z)
        <float[$h,3,3] w1, float[4,$h,3] w2, float[$k,3,1,1,1] w3, float[2,$k,3,3,3] w4> {
            a = Conv<pads=[1,1]>(x, w1)
            h = Tanh(a)
            y = Conv<pads=[1,1]>(h, w2)
            b = Conv(v, w3)
            k = Relu(b)
            z = Conv<pads=[1,1,1,1,1,1]>(k, w4)
        }""",
        carried="hk",
    ),
    "normalisation in front of the activation": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y)
        <float[$h,3,3,3] w1, float[$h] g, float[$h] b, float[$h] m, float[$h] var, float[4,$h,3,3] w2, float zero = {0.0},
         float six = {6.0}> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            n = BatchNormalization(a, g, b, m, var)
            h = Clip(n, zero, six)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        carried="h",
    ),
    "normalisation behind the activation": Case(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y)
        <float[$h,3,3,3] w1, float[$h] g, float[$h] b, float[$h] m, float[$h] var, float[$h,1,1] s, float[4,$h,3,3] w2> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            r = PRelu(a, s)
            h = BatchNormalization<epsilon=0.01>(r, g, b, m, var)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        carried="h",
        types=MAPS,
    ),
    "instances normalised": Case(
        """(float[N,3,6,6] x) => (float[N,4,4,4] y) <float[$h,3,1,1] w1, float[$h] g, float[$h] b, float[4,$h,3,3] w2> {
            a = Conv(x, w1)
            h = InstanceNormalization(a, g, b)
            y = Conv(h, w2)
        }""",
    ),
    "pooling": Case(
        """(float[N,3,8,8] x) => (float[N,4,4,4] y, float[N,4] z)
        <float[$h,3,3,3] w1, float[$h] b1, float[$k,$h,3,3] w2, float[$k] b2, float[4,$k,3,3] w3, float[$k,4] w4> {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)
            r = Relu(a)
            h = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)
            b = Conv<pads=[1,1,1,1]>(h, w2, b2)
            k = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(b)
            y = Conv<pads=[1,1,1,1]>(k, w3)
            g = GlobalAveragePool(b)
            f = Flatten(g)
            z = Gemm(f, w4)
        }""",
        carried="hk",
    ),
    "depthwise in between": Case(
        """(float[N,3,6,6] x) => (float[N,4,2,2] y)
        <float[$h,3,3,3] w1, float[$h,1,3,3] d, float[$h] e, float[4,$h,1,1] w2> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            r = Relu(a)
            h = Conv<group=$h, strides=[2,2]>(r, d, e)
            y = Conv(h, w2)
        }""",
    ),
    "maps flattened": Case(
        """(float[N,3,6,6] x) => (float[N,3] y, float[N,3] z, float[N,2] u)
        <float[$h,3,3,3] w1, float[$p,3] w2, float[3] b2, float[3,$p] w3, int64[2] flat = {0, $p}, float[$p,2] w4> {
            a = Conv(x, w1)
            h = Relu(a)
            f = Flatten(h)
            y = Gemm(f, w2, b2)
            g = Reshape(h, flat)
            z = Gemm<transB=1>(g, w3)
            t = Transpose<perm=[2,0,3,1]>(h)
            q = Transpose<perm=[1,0,2,3]>(t)
            v = Flatten(q)
            u = MatMul(v, w4)
        }""",
    ),
    "maps as tokens": Case(
        """(float[N,3,6,6] x) => (float[N,16,3] y)
        <float[$h,3,3,3] w1, float[$h] b1, int64[3] tokens = {0, $h, 16}, float[$h,3] w2, float[16,3] b2> {
            a = Conv(x, w1, b1)
            r = Reshape(a, tokens)
            t = Transpose<perm=[0,2,1]>(r)
            h = Relu(t)
            p = MatMul(h, w2)
            y = Add(p, b2)
        }""",
    ),
    "channels last, then a border": Case(
        """(float[N,6,6,3] x) => (float[N,4,6,6] y) <float[3,$h] w1, float[$h] b1, float[4,$h,3,3] w2> {
            p = MatMul(x, w1)
            a = Add(p, b1)
            h = Relu(a)
            t = Transpose<perm=[0,3,1,2]>(h)
            y = Conv<pads=[1,1,1,1]>(t, w2)
        }""",
        carried="h",
    ),
    "channels last without a bias, then a border": Case(
        """(float[N,6,6,3] x) => (float[N,4,6,6] y) <float[3,$h] w1, float[4,$h,3,3] w2> {
            p = MatMul(x, w1)
            h = Relu(p)
            t = Transpose<perm=[0,3,1,2]>(h)
            y = Conv<pads=[1,1,1,1]>(t, w2)
        }""",
        carried="h",
    ),
    "residual blocks": Case(
        """(float[N,3,6,6] x) => (float[N,4] y)
        <float[$h,3,3,3] w0, float[$h] b0, float[$k,$h,3,3] w1, float[$k] b1, float[$h,$k,3,3] w2, float[$h,4] w5,
         float[$h,$h,1,1] w3, float[$h] b3> {
            c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
            r0 = Relu(c0)
            c1 = Conv<pads=[1,1,1,1]>(r0, w1, b1)
            k1 = Relu(c1)
            c2 = Conv<pads=[1,1,1,1]>(k1, w2)
            s1 = Add(c2, r0)
            r1 = Relu(s1)
            c3 = Conv(r1, w3, b3)
            s2 = Add(r1, c3)
            g = GlobalAveragePool(s2)
            f = Flatten(g)
            y = MatMul(f, w5)
        }""",
        carried="hk",
        types=MAPS,
    ),
    "gated channels": Case(
        """(float[N,3,6,6] x) => (float[N,4,4,4] y)
        <float[$h,3,3,3] w1, float[$k,$h,1,1] w2, float[$h,$k,1,1] w3, float[4,$h,1,1] w4> {
            a = Conv(x, w1)
            h = Relu(a)
            q = GlobalAveragePool(h)
            c = Conv(q, w2)
            k = Relu(c)
            e = Conv(k, w3)
            s = Sigmoid(e)
            m = Mul(s, h)
            y = Conv(m, w4)
        }""",
    ),
    "one input channel": Case(
        """(float[N,1,6,6] x) => (float[N,4,6,6] y) <float[$h,1,1,1] w1, float[$h] b1, float[4,$h,3,3] w2> {
            a = Conv(x, w1, b1)
            h = Relu(a)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        carried="h",
    ),
    "positions of any number": Case(
        """(float[N,3,H,W] x) => (float[N,4,H,W] y, float[N,2] z)
        <float[$h,3,3,3] w1, float[4,$h,3,3] w2, float[2,$h] w3> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            h = Relu(a)
            y = Conv<pads=[1,1,1,1]>(h, w2)
            g = GlobalAveragePool(h)
            f = Flatten(g)
            z = Gemm<transB=1>(f, w3)
        }""",
        carried="h",
    ),
}


def plan_of(source: ir.Model, kind: str, seed: int = 0) -> Plan:
    """Random replacements that leave every group that can be cut as wide as its case says."""
    kept = {WIDTHS[name]: KEPT[name] for name in WIDTHS}
    return plan_for(source, kind, np.random.default_rng(seed), kept.__getitem__)


def written(source: ir.Model, plan: Plan) -> ir.Model:
    copy = source.clone()
    WriteReplacements(plan)(copy)
    return copy


def lowered(source: ir.Model) -> ir.Model:
    copy = source.clone()
    LowerReplacements()(copy)
    return copy


def assert_same(found: Arrays, wanted: Arrays, kind: str = "float") -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        gap = np.abs(found[name].astype(np.float64) - array.astype(np.float64)).max()
        assert gap <= TOLERANCE[kind] * max(1.0, np.abs(array).max()), f"{name} differs by {gap}"


def assert_preserves(step: ir.passes.PassBase, source: ir.Model, wanted: Arrays | None = None) -> ir.Model:
    """Run a pass on a copy; the outputs must stay what they were."""
    feed, copy = inputs(source), source.clone()
    step(copy)
    assert_same(run(lowered(copy), feed), wanted or run(lowered(source), feed))
    return copy


def serialised(source: ir.Model) -> bytes:
    return ir.to_proto(source).SerializeToString(deterministic=True)


def tensors_of(source: ir.Model) -> set[str]:
    return {v.name for node in source.graph for v in node.outputs}


def interface(source: ir.Model) -> list[tuple[str, ir.DataType, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*source.graph.inputs, *source.graph.outputs)]


EVERY = [
    pytest.param(case, kind, dtype, id=f"{name}-{kind}-{dtype}")
    for name, case in CASES.items()
    for kind in KINDS
    for dtype in case.types
]


@pytest.mark.parametrize(("case", "kind", "dtype"), EVERY)
def test_every_pass_but_the_first_preserves_the_function(case: Case, kind: str, dtype: str):
    dense = case.dense(kind=dtype)
    plan = plan_of(dense, kind)
    feed = inputs(dense)
    wanted = run(under_do(dense, plan), feed)
    copy = dense.clone()
    for step in compiling(plan):
        step(copy)
        assert_same(run(lowered(copy), feed), wanted, dtype)


@pytest.mark.parametrize(("case", "kind", "dtype"), EVERY)
def test_a_compiled_graph_is_the_text_at_the_planned_width(case: Case, kind: str, dtype: str):
    dense, narrow = case.dense(kind=dtype), case.compiled(kind=dtype)
    before = serialised(dense)
    compiled = rewrite(dense, plan_of(dense, kind)).model
    assert serialised(dense) == before
    onnx.checker.check_model(ir.to_proto(compiled), full_check=True)
    found, wanted = shapes(compiled), shapes(narrow)
    biases = found.keys() - wanted.keys()
    assert all(name.endswith(".bias") for name in biases)
    assert {name: found[name] for name in wanted} == wanted
    nodes = [n for n in compiled.graph if n.op_type != "Add" or n.inputs[1].name not in biases]
    assert [(n.op_type, n.attributes) for n in nodes] == [(n.op_type, n.attributes) for n in narrow.graph]
    assert tensors_of(narrow) <= tensors_of(compiled)
    assert interface(compiled) == interface(dense)


@pytest.mark.parametrize("opset", [11, 13, 20, 21])
@pytest.mark.parametrize("case", CASES)
def test_opsets_old_and_new(case: str, opset: int):
    dense = CASES[case].dense(opset)
    plan, feed = plan_of(dense, "affine"), inputs(dense)
    compiled = rewrite(dense, plan).model
    assert_same(run(compiled, feed), run(under_do(dense, plan), feed))
    assert {name: found for name, found in shapes(compiled).items() if not name.endswith(".bias")} == shapes(
        CASES[case].compiled(opset)
    )


@pytest.mark.parametrize("case", CASES)
def test_declared_shapes_of_tensors_follow(case: str):
    dense = CASES[case].dense()
    declared = canonical(onnx.shape_inference.infer_shapes(ir.to_proto(dense), data_prop=True))
    compiled = ir.to_proto(rewrite(declared, plan_of(declared, "affine")).model)
    onnx.checker.check_model(compiled, full_check=True)
    assert shapes(ir.from_proto(compiled)) == shapes(rewrite(dense, plan_of(dense, "affine")).model)


@pytest.mark.parametrize("case", CASES)
def test_passes_have_nothing_left_to_do_on_what_they_made(case: str):
    dense = CASES[case].dense()
    plan = plan_of(dense, "affine")
    compiled = rewrite(dense, plan).model
    before = serialised(compiled)
    for step in (CANONICALISE, *compiling(plan)[1:], RemoveDeadUnits()):
        assert not step(compiled).modified
    assert serialised(compiled) == before


@pytest.mark.parametrize("case", ["residual blocks", "all paddings at once, and none", "maps flattened"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_retained_set_will_do(case: str, kind: str):
    dense = CASES[case].dense()
    for seed in range(1, 6):
        plan = plan_of(dense, kind, seed)
        feed = inputs(dense, seed=seed)
        assert_same(run(rewrite(dense, plan).model, feed), run(under_do(dense, plan), feed))


def test_alignment_names_the_channels_that_are_left():
    dense = CASES["residual blocks"].dense()
    plan = plan_of(dense, "affine")
    compiled = rewrite(dense, plan)
    assert compiled.alignment.keys() == {site.tensor for site in plan.sites}
    for site in plan.sites:
        left = compiled.alignment[site.tensor]
        assert set(site.kept) <= set(left)
        assert len(left) == len(site.kept) + 1, "one carrier"


def test_a_plan_of_nothing_changes_nothing():
    dense = CASES["gemm"].dense()
    nothing = Plan(model_sha256="", objective="", replacement="constant", swap=0.0, sites=())
    assert serialised(rewrite(dense, nothing).model) == serialised(dense)


# --- what must not be touched -----------------------------------------------------------------------------------------

TWINS = """(float[N,4] x, float[N,4] x2) => (float[N,3] y, float[N,3] z)
<float[4,8] w1, float[8] b, float[8,3] w, float[3] c> {
    a = Gemm(x, w1, b)
    h = Relu(a)
    y = Gemm(h, w, c)
    a2 = Gemm(x2, w1, b)
    k = Relu(a2)
    z = Gemm(k, w, c)
}"""


@pytest.mark.parametrize("tensors", [["h"], ["k"], ["h", "k"]])
def test_shared_weights_stay_whole_for_those_who_are_not_cut(tensors: list[str]):
    dense = model(TWINS)
    plan, feed = plan_at(dense, *tensors, kept=[1, 2, 6]), inputs(dense)
    compiled, whole = rewrite(dense, plan).model, run(dense, feed)
    assert_same(found := run(compiled, feed), run(under_do(dense, plan), feed))
    for tensor, output in (("h", "y"), ("k", "z")):
        assert np.array_equal(found[output], whole[output]) == (tensor not in tensors)
    operands = {v.name: [i.const_value.shape for i in node.inputs[1:]] for node in compiled.graph for v in node.outputs}
    for tensor, created, read in (("h", "a", "y"), ("k", "a2", "z")):
        width = 3 if tensor in tensors else 8
        assert operands[created] == [(4, width), (width,)]
        assert operands[read] == [(width, 3), (3,)]
    assert len(shapes(compiled)) == (6 if tensors == ["h", "k"] else 8), "equal cuts of a shared weight are shared again"


def test_a_weight_shared_by_two_readers_of_one_site_is_folded_for_each():
    dense = model(
        """(float[N,4] x) => (float[N,3] y, float[N,3] z) <float[4,8] w1, float[8,3] w, float[3] c> {
            h = MatMul(x, w1)
            y = Gemm(h, w, c)
            z = Gemm<alpha=2.0>(h, w, c)
        }"""
    )
    plan, feed = plan_at(dense, "h", kept=[0, 5]), inputs(dense)
    assert_same(run(rewrite(dense, plan).model, feed), run(under_do(dense, plan), feed))


def test_a_weight_that_is_a_model_output_stays():
    dense = model(
        """(float[N,4] x) => (float[N,3] y, float[8,3] w2) <float[4,8] w1, float[8,3] w2> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
        }"""
    )
    plan, feed = plan_at(dense, "h", kept=[0, 5]), inputs(dense)
    compiled = rewrite(dense, plan).model
    assert_same(run(compiled, feed), run(under_do(dense, plan), feed))
    assert compiled.graph.initializers["w2"].const_value.shape == (8, 3)


def test_a_weight_that_a_subgraph_uses_stays():
    dense = model(
        """(float[N,4] x, float[N,8] g, bool c) => (float[N,3] y, float[N,3] z) <float[4,8] w1, float[8,3] w2> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
            z = If(c) <then_branch = t () => (float[N,3] u) { u = MatMul(g, w2) },
                       else_branch = e () => (float[N,3] v) { o = Neg(g) v = MatMul(o, w2) }>
        }"""
    )
    plan, feed = plan_at(dense, "h", kept=[0, 5]), {**inputs(dense), "c": np.array(True)}
    found = run(rewrite(dense, plan).model, feed)
    assert_same(found, run(lowered(written(dense, plan)), feed))
    np.testing.assert_array_equal(found["z"], run(dense, feed)["z"])


def test_a_bias_that_is_computed_or_that_a_caller_can_override_is_added_to():
    dense = model(
        """(float[N,4] x, float[3] c) => (float[N,3] y, float[N,3] z)
        <float[4,8] w1, float[8,3] w2, float[8,3] w3, float[3] c> {
            h = MatMul(x, w1)
            d = Neg(c)
            y = Gemm(h, w2, d)
            z = Gemm<beta=2.0>(h, w3, c)
        }"""
    )
    plan, feed = plan_at(dense, "h", kept=[0, 5]), inputs(dense)
    compiled = rewrite(dense, plan).model
    assert_same(run(compiled, feed), run(lowered(written(dense, plan)), feed))
    np.testing.assert_array_equal(compiled.graph.initializers["c"].const_value, dense.graph.initializers["c"].const_value)


PARTLY = """(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,4,6,6] z)
<float[8,3,1,1] w1, float[4,8,3,3] w2, float[4,8,1,1] w3> {
    a = Conv(x, w1)
    h = Relu(a)
    s = Sigmoid(a)
    y = Conv<pads=[1,1,1,1]>(h, w2)
    z = Conv(s, w3)
}"""


def test_a_unit_that_one_site_of_the_group_reads_is_no_carrier():
    dense = model(PARTLY)
    plan, feed = plan_at(dense, "h", kept=[1, 2]), inputs(dense)
    found = run(rewrite(dense, plan).model, feed)
    assert_same(found, run(lowered(written(dense, plan)), feed))
    np.testing.assert_array_equal(found["z"], run(dense, feed)["z"])


def test_sites_of_a_group_may_keep_different_units():
    dense = model(PARTLY)
    one, other = plan_at(dense, "h", kept=[1, 2]), plan_at(dense, "s", kept=[2, 3, 4, 5, 6, 7])
    plan = one.model_copy(update={"sites": one.sites + other.sites})
    compiled, feed = rewrite(dense, plan), inputs(dense)
    assert_same(run(compiled.model, feed), run(under_do(dense, plan), feed))
    # Only unit 0 is read nowhere, and it is made the carrier.
    assert not compiled.alignment


# --- passes alone -----------------------------------------------------------------------------------------------------


def test_a_replacement_is_what_its_formula_says():
    dense = model("(float[N,4] x) => (float[N,8] y) <float[4,8] w1, float[8,8] w2> { h = MatMul(x, w1) y = MatMul(h, w2) }",
                  given={"w2": np.eye(8)})  # fmt: skip
    plan, feed = plan_at(dense, "h", kept=[6, 1, 3]), inputs(dense)
    (site,) = plan.sites
    wanted = feed["x"] @ dense.graph.initializers["w1"].const_value.numpy()
    wanted[:, site.replaced] = wanted[:, site.kept] @ site.affine.T + site.constants
    assert_same(run(lowered(written(dense, plan)), feed), {"y": wanted})


def test_replacements_are_folded_only_where_every_use_reads():
    source = written(model(TWINS), plan_at(model(TWINS), "h", kept=[0, 1]))
    replaced_tensor = next(v for node in source.graph for v in node.outputs if v.name == "h.replaced")
    neg = ir.node("Neg", [replaced_tensor], outputs=[ir.Value(name="n", type=ir.TensorType(ir.DataType.FLOAT))])
    source.graph.append(neg)
    source.graph.outputs.append(neg.outputs[0])
    folded = assert_preserves(FoldReplacements(), source)
    assert any(node.op_type == "Replace" for node in folded.graph)


def test_an_unfolded_replacement_keeps_its_channels():
    """Unit 0 is retained; its own weights are zero, but others are replaced by what it is."""
    weights = {"w2": np.arange(32).reshape(8, 4) % 7 * (np.arange(8) > 0)[:, None]}
    dense = model("(float[N,4] x) => (float[N,4] y) <float[4,8] w1, float[8,4] w2> { h = MatMul(x, w1) y = MatMul(h, w2) }",
                  given=weights)  # fmt: skip
    assert_preserves(RemoveDeadUnits(), written(dense, plan_at(dense, "h", kept=[0, 1])))


def test_what_an_unfolded_replacement_reads_is_no_carrier():
    dense = model(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,4,6,6] z)
        <float[8,3,1,1] w1, float[4,8,3,3] w2, float[4,8,1,1] w3> {
            h = Conv(x, w1)
            y = Conv<pads=[1,1,1,1]>(h, w2)
            z = Conv(h, w3)
        }""",
        given={"w3": np.ones((4, 8, 1, 1)) * (np.arange(8) > 0)[:, None, None]},
    )
    plan = plan_at(dense, "h", kept=[0, 1], kind="windows")
    plan.sites[0].windows[0].columns[0] = 0.0
    assert_preserves(FoldCarriers(), written(dense, plan))


def test_an_unread_unit_that_a_model_output_shows_stays():
    dense = model(
        """(float[N,4] x) => (float[N,3] y, float[N,8] h) <float[4,8] w1, float[8,3] w2> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
        }""",
        given={"w2": np.ones((8, 3)) * (np.arange(8) > 3)[:, None]},
    )
    assert_preserves(RemoveDeadUnits(), dense)


def test_without_a_carrier_constants_stay_exact():
    dense = model(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,3,3] w1, float[4,8,3,3] w2> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }"""
    )
    for kind in KINDS:
        plan, feed = plan_at(dense, "h", kept=[0, 1], kind=kind), inputs(dense)
        assert_same(run(rewrite(dense, plan).model, feed), run(under_do(dense, plan), feed))


@pytest.mark.parametrize("case", CASES)
def test_dead_units_are_removed_exactly(case: str):
    dense = CASES[case].dense()
    scm = read_scm(dense)
    dead = {unit for site in scm.sites for unit in site.units[[1, 2]].tolist()}
    for site in scm.sites:
        for reader in site.readers:
            array = reader.weight.const_value.numpy().copy()
            np.moveaxis(array, reader.axis, 0)[np.isin(reader.units, list(dead))] = 0
            reader.weight.const_value = ir.tensor(array, name=reader.weight.name)
    removed = assert_preserves(RemoveDeadUnits(), dense)
    assert shapes(removed) == shapes(CASES[case].at({name: width - 2 for name, width in WIDTHS.items()}, 17, "float"))
