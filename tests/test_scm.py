"""Golden graphs: what each is read as. One line a site: group, tensor and channel axis, size, readers, and any refusal."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model
from graphs import GRAPHS

from mscompile.network.scm import Refusal, infer_shapes, label, read_scm
from mscompile.planning.plan import refusal

READ = {
    "a chain": (
        """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] b1, float[8,3] w2> {
            a = Gemm(x, w1, b1)
            h = Relu(a)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "two readers of one site": (
        """(float[N,4] x) => (float[N,3] y, float[N,2] z) <float[4,8] w1, float[8,3] w2, float[2,8] w3> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
            z = Gemm<transB=1>(h, w3)
        }""",
        ["a: h[1] 8 > y, z"],
    ),
    "one group, read after Relu and after Sigmoid": (
        """(float[N,4] x) => (float[N,3] y, float[N,2] z) <float[4,8] w1, float[8,3] w2, float[8,2] w3> {
            a = MatMul(x, w1)
            h = Relu(a)
            s = Sigmoid(a)
            y = MatMul(h, w2)
            z = MatMul(s, w3)
        }""",
        ["a: h[1] 8 > y", "a: s[1] 8 > z"],
    ),
    "a residual addition couples what it adds": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y)
        <float[8,3,1,1] w1, float[6,8,3,3] w2, float[8,6,3,3] w3, float[5,8,1,1] w4> {
            stem = Conv(x, w1)
            inner = Conv<pads=[1,1,1,1]>(stem, w2)
            branch = Conv<pads=[1,1,1,1]>(inner, w3)
            sum = Add(stem, branch)
            y = Conv(sum, w4)
        }""",
        ["a: stem[1] 8 > inner", "b: inner[1] 6 > branch", "a: sum[1] 8 > y"],
    ),
    "a gate of one value per channel joins; a gate of one value per position does not": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y)
        <float[8,3,1,1] w1, float[8,8,1,1] w2, float[1,8,1,1] w3, float[5,8,1,1] w4> {
            h = Conv(x, w1)
            pooled = GlobalAveragePool(h)
            gate = Conv(pooled, w2)
            gated = Mul(h, gate)
            place = Conv(gated, w3)
            placed = Mul(gated, place)
            y = Conv(placed, w4)
        }""",
        ["a: pooled[1] 8 > gate", "a: gated[1] 8 > place", "a: placed[1] 8 > y"],
    ),
    "a weight read by two nodes": (
        """(float[N,4] x, float[N,4] x2) => (float[N,3] y, float[N,3] z) <float[4,8] w1, float[4,8] w2, float[8,3] w> {
            h = MatMul(x, w1)
            k = MatMul(x2, w2)
            y = MatMul(h, w)
            z = MatMul(k, w)
        }""",
        ["a: h[1] 8 > y", "b: k[1] 8 > z"],
    ),
    "flattened maps are read where each unit still has one channel": (
        """(float[N,3,6,6] x) => (float[N,3] y) <float[8,3,3,3] w1, float[128,3] w2> {
            a = Conv(x, w1)
            h = Relu(a)
            f = Flatten(h)
            y = Gemm(f, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "flattened maps with a per-place parameter are a site with repeated units": (
        """(float[N,3,6,6] x) => (float[N,3] y) <float[8,3,3,3] w1, float[128] p, float[128,3] w2> {
            a = Conv(x, w1)
            f = Flatten(a)
            h = Mul(f, p)
            y = Gemm(h, w2)
        }""",
        ["a: h[1] 128 > y"],
    ),
    "a transposed weight": (
        """(float[N,4] x) => (float[N,3] y) <float[8,4] w1, float[8] b1, float[3,8] w2> {
            t1 = Transpose<perm=[1,0]>(w1)
            a = MatMul(x, t1)
            h = Add(a, b1)
            t2 = Transpose(w2)
            y = MatMul(h, t2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "a weight from the left reads and creates on the axis before the last": (
        """(float[N,5,4] x) => (float[N,3,4] y) <float[8,5] w1, float[3,8] w2> {
            a = MatMul(w1, x)
            h = Relu(a)
            y = MatMul(w2, h)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "channels last behind channels first": (
        """(float[N,3,6,6] x) => (float[N,6,6,5] y) <float[8,3,1,1] w1, float[8,5] w2> {
            h = Conv(x, w1)
            t = Transpose<perm=[0,2,3,1]>(h)
            y = MatMul(t, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "a moved tensor that is used otherwise is the site itself": (
        """(float[N,3,6,6] x) => (float[N,6,6,5] y, float[N,6,6,1] m) <float[8,3,1,1] w1, float[8,5] w2, float[8,1] w3> {
            h = Conv(x, w1)
            t = Transpose<perm=[0,2,3,1]>(h)
            y = MatMul(t, w2)
            s = Sigmoid(t)
            m = MatMul(s, w3)
        }""",
        ["a: t[3] 8 > y", "a: s[3] 8 > m"],
    ),
    "a model output stays": (
        """(float[N,4] x) => (float[N,3] y, float[N,8] a) <float[4,8] w1, float[8,3] w2> {
            a = MatMul(x, w1)
            h = Relu(a)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 8 > y ! 'a' is a model output"],
    ),
    "an undeclared operator stops": (
        """(float[N,4] x) => (float[N,3] y, float[N,8] z) <float[4,8] w1, float[8,3] w2> {
            a = MatMul(x, w1)
            h = Relu(a)
            z = com.example.Mystery(h)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 8 > y ! Mystery 'z' has no declaration (domain com.example)"],
    ),
    "normalising across the channels stops": (
        """(float[N,4] x) => (float[N,3] y, float[N,3] z) <float[4,8] w1, float[8,3] w2, float[8,3] w3> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
            s = Softmax(h)
            z = MatMul(s, w3)
        }""",
        ["a: h[1] 8 > y ! Softmax 's' normalises across this axis"],
    ),
    "a residual addition with a barrier before it stops too": (
        """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] g, float[8,3] w2> {
            a = MatMul(x, w1)
            n = LayerNormalization(a, g)
            h = Add(a, n)
            y = MatMul(h, w2)
        }""",
        [],
    ),
    "a weight that a caller can override is no weight": (
        """(float[N,4] x, float[8,3] w2) => (float[N,3] y) <float[4,8] w1, float[8,3] w2> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
        }""",
        [],
    ),
    "two computed tensors are contracted": (
        """(float[N,5,4] x) => (float[N,5,5] y) <float[4,8] w1, float[4,8] w2> {
            q = MatMul(x, w1)
            k = MatMul(x, w2)
            t = Transpose<perm=[0,2,1]>(k)
            y = MatMul(q, t)
        }""",
        [],
    ),
    "the indices of a pooling number the channels": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y, int64[N,8,3,3] i) <float[8,3,1,1] w1, float[5,8,1,1] w2> {
            h = Conv(x, w1)
            [pool] p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 8 > y ! MaxPool 'pool' has a further output that is used"],
    ),
    "a reader that takes its data as a bias as well": (
        """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8,8] w2, float[8,3] w3> {
            h = MatMul(x, w1)
            [twice] k = Gemm(h, w2, h)
            y = MatMul(k, w3)
        }""",
        ["a: k[1] 8 > y ! Gemm 'twice' reads them twice"],
    ),
    "units on the axis of the samples": (
        """(float[N,4] x) => (float[N,3] y) <float[8,4] w1, float[3,8] w2> {
            t = Transpose(x)
            h = MatMul(w1, t)
            k = MatMul(w2, h)
            y = Transpose(k)
        }""",
        ["a: h[0] 8 > k ! 'h' holds units on axis 0, which is taken for the samples"],
    ),
    "one tensor, read on two of its axes": (
        """(float[N,5,4] x) => (float[N,2,9] y, float[N,2,3] z)
        <float[6,5] w1, float[4,7] w2, float[7,9] w3, float[2,6] w4, float[2,6] w5, float[7,3] w6> {
            a = MatMul(w1, x)
            h = MatMul(a, w2)
            r = MatMul(h, w3)
            y = MatMul(w4, r)
            s = MatMul(w5, h)
            z = MatMul(s, w6)
        }""",
        [
            "a: h[2] 7 > r ! 'h' is read on several of its axes",
            "b: h[1] 6 > s ! 'h' is read on several of its axes",
            "b: r[1] 6 > y",
            "a: s[2] 7 > z",
        ],
    ),
    "a subgraph takes in a tensor": (
        """(float[N,4] x, bool c) => (float[N,3] y, float[N,8] z) <float[4,8] w1, float[8,3] w2> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
            [choice] z = If(c) <then_branch = t () => (float[N,8] u) { u = Relu(h) },
                                else_branch = e () => (float[N,8] v) { v = Neg(h) }>
        }""",
        ["a: h[1] 8 > y ! If 'choice' uses them inside a subgraph"],
    ),
    "a tensor of unknown rank is read and used otherwise": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y, float[N,8,6,6] z) <float[8,3,1,1] w1, float[5,8,1,1] w2> {
            g = com.example.Mystery(x)
            h = Conv(g, w1)
            y = Conv(h, w2)
            z = Relu(h)
        }""",
        ["a: h[1] 8 > y ! Relu 'z' its input has no known rank"],
    ),
    "a tensor of unknown rank is read": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y) <float[8,3,1,1] w1, float[5,8,1,1] w2> {
            g = com.example.Mystery(x)
            h = Conv(g, w1)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 8 > y ! 'h' has no known rank"],
    ),
    "samples on another axis": (
        """(float[N,5,4] x) => (float[N,5,3] y) <float[4,8] w1, float[8,3] w2> {
            t = Transpose<perm=[1,0,2]>(x)
            h = MatMul(t, w1)
            z = MatMul(h, w2)
            y = Transpose<perm=[1,0,2]>(z)
        }""",
        ["a: h[2] 8 > z"],
    ),
    "positions and samples on one axis": (
        """(float[N,5,4] x) => (float[M,3] y, float[M,3] z)
        <float[4,8] w1, float[8,3] w2, float[4,8] w3, float[8,3] w4, int64[2] flat = {-1, 4}> {
            r = Reshape(x, flat)
            g = MatMul(r, w3)
            z = MatMul(g, w4)
            t = Transpose<perm=[1,0,2]>(x)
            p = Reshape(t, flat)
            h = MatMul(p, w1)
            y = MatMul(h, w2)
        }""",
        ["a: g[1] 8 > z", "b: h[1] 8 > y"],
    ),
    "a bias alone begins no units where the input may be as wide": (
        """(float[N,C] x) => (float[N,3] y) <float[8] b, float[8,3] w> {
            h = Add(x, b)
            y = MatMul(h, w)
        }""",
        [],
    ),
}


def told(source: ir.Model) -> list[str]:
    scm = read_scm(source)
    letters = {group: chr(ord("a") + i) for i, group in enumerate(dict.fromkeys(site.group for site in scm.sites))}
    return [
        f"{letters[s.group]}: {s.tensor}[{s.axis}] {s.size} > "
        + ", ".join([label(r.node) for r in s.readers] + [f"pairs of {label(p.node)}" for p in s.pairings])
        + (f" ! {s.refusal}" if s.refusal else "")
        for s in scm.sites
    ]


def left_alone(source: ir.Model) -> list[str]:
    """Why units stay, where they are neither a model output nor at a site that says so."""
    scm = read_scm(source)
    outputs = {str(Refusal(value.name, "", "is a model output")) for value in source.graph.outputs}
    told = outputs | {str(site.refusal) for site in scm.sites}
    stay = [f"- {reason}" for reason in dict.fromkeys(map(str, scm.frozen.values())) if reason not in told]
    return stay + [f"whole rows: {reason}" for reason in dict.fromkeys(map(str, scm.undivided.values()))]


@pytest.mark.parametrize("case", READ)
def test_golden_graph_is_read_as(case: str):
    text, wanted = READ[case]
    assert told(model(text)) == wanted


@pytest.mark.parametrize("case", GRAPHS)
def test_architectures_are_read_as(case: str):
    text, wanted = GRAPHS[case]
    source = model(text, opset=21)
    assert told(source) + left_alone(source) == wanted


NO_CARRIER = "is read with zero padding, and no channel can be made constant to carry the bias to the border exactly"
BORDERED = {
    "a bias can be set": ("a = Conv(x, w, b) h = Relu(a)", None),
    "a bias can be added": ("a = Conv(x, w) h = Relu(a)", None),
    "a bias can be added in front of a normalisation": ("a = Conv(x, w) h = BatchNormalization(a, g, b, m, var)", None),
    "a bias can be added behind a product": ("a = MatMul(u, w0) h = Transpose<perm=[0,3,1,2]>(a)", None),
    "averages of equal values are equal": ("a = Conv(x, w) h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)", None),
    "averages that count zeros are not": (
        "a = Conv(x, w) h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a)",
        NO_CARRIER,
    ),
    "a depthwise filter sees the border": ("a = Conv(x, w) h = Conv<group=8, pads=[1,1,1,1]>(a, d)", NO_CARRIER),
    "a parameter differs from place to place": ("a = Conv(x, w) h = Add(a, p)", NO_CARRIER),
    "units begin at a weight that takes no bias": ("a = Mul(v, s) h = Relu(a)", NO_CARRIER),
    "nothing but zero comes out": ("a = Conv(x, w) h = Mul(a, zero)", NO_CARRIER),
    "another input joins": ("a = Conv(x, w) h = Mul(a, v)", NO_CARRIER),
    "a mean over positions of any number": ("a = Conv(z, w) h = ReduceMean<axes=[2]>(a)", None),
    "a sum over positions of any number": ("a = Conv(z, w) h = ReduceSum(a, ends)", NO_CARRIER),
}


@pytest.mark.parametrize("case", BORDERED)
def test_a_border_needs_a_channel_that_can_be_made_constant(case: str):
    body, wanted = BORDERED[case]
    text = f"""(float[N,3,6,6] x, float[N,1,6,6] v, float[N,6,6,4] u, float[N,3,H,6] z) => (float[N,5,H2,W2] y)
    <float[8,3,1,1] w, float[8] b, float[8] g, float[8] m, float[8] var, float[8,1,3,3] d, float[8,6,6] p, float[8,1,1] s,
     float[1] zero = {{0}}, float[4,8] w0, int64[1] ends = {{2}}, float[5,8,3,3] w2> {{
        {body} y = Conv<pads=[1,1,1,1]>(h, w2)
    }}"""
    scm = read_scm(model(text))
    (site,) = scm.sites
    assert refusal(scm, site) == wanted


def test_every_parameter_that_follows_a_unit_is_a_slot():
    scm = read_scm(
        model(
            """(float[N,3,6,6] x) => (float[N,5,4,4] y)
            <float[8,3,3,3] w1, float[8] g, float[8] b, float[8] m, float[8] var, float[8,1,1] p, float[8,1,1,1] d,
             float[5,8,1,1] w2> {
                a = Conv(x, w1)
                n = BatchNormalization(a, g, b, m, var)
                q = PRelu(n, p)
                h = Conv<group=8>(q, d)
                y = Conv(h, w2)
            }"""
        )
    )
    units = scm.site("h").units
    found = {(s.node.inputs[s.operand].name, s.axis) for s in scm.slots if np.array_equal(s.units, units)}
    wanted = {("w1", 0), ("g", 0), ("b", 0), ("m", 0), ("var", 0), ("p", 0), ("d", 0), ("w2", 1)}
    assert found == wanted


PLACES = 16
FLATTENED = {
    "f = Flatten(h)": np.repeat(np.arange(8), PLACES),
    "f = Reshape(h, flat)": np.repeat(np.arange(8), PLACES),
    "t = Transpose<perm=[0,2,3,1]>(h) f = Flatten(t)": np.tile(np.arange(8), PLACES),
}


@pytest.mark.parametrize("body", FLATTENED)
def test_index_says_which_channel_a_weight_column_meets(body: str):
    text = f"""(float[N,3,4,4] x) => (float[N,3] y) <float[8,3,1,1] w1, float[128,3] w2, int64[2] flat = {{0, -1}}> {{
        h = Conv(x, w1) {body} y = MatMul(f, w2)
    }}"""
    (site,) = read_scm(model(text)).sites
    (reader,) = site.readers
    assert site.tensor == "h"
    np.testing.assert_array_equal(reader.index, FLATTENED[body])
    np.testing.assert_array_equal(reader.units, site.units[reader.index])


def test_shapes_are_inferred_on_a_copy_and_bound_where_they_are_given():
    source = model("(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8,3] w2> { h = MatMul(x, w1) y = MatMul(h, w2) }")
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    assert infer_shapes(source)["h"] == ("N", 8)
    assert infer_shapes(source, {"x": (5, 4)})["h"] == (5, 8)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
