"""Canonical form: what exporters write in many ways comes out in one, with every output bit as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from golden import canonical, inputs, proto, run
from test_passes import interface, serialised

from mscompile.files import save_model
from mscompile.network.scm import read_scm
from mscompile.passes import CANONICALISE

WRITTEN_ANYHOW = {
    "weights in nodes": (
        """(float[N,2] x) => (float[N,3] y) {
            w = Constant<value = float[2,3] {1, 2, 3, 4, 5, 6}>()
            b = Constant<value_floats = [1.0, 2.0, 3.0]>()
            y = Gemm(x, w, b)
        }""",
        ["Gemm"],
    ),
    "identities everywhere": (
        """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8,3] w2> {
            i = Identity(x)
            j = Identity(w1)
            h = MatMul(i, j)
            k = Identity(h)
            z = MatMul(k, w2)
            y = Identity(z)
        }""",
        ["MatMul", "MatMul"],
    ),
    "an input and a weight as outputs": (
        """(float[N,4] x) => (float[N,4] y, float[4,4] z) <float[4,4] w> {
            y = Identity(x)
            z = Identity(w)
        }""",
        ["Identity", "Identity"],
    ),
    "one tensor as two outputs": (
        """(float[N,4] x) => (float[N,4] y, float[N,4] z) {
            h = Relu(x)
            y = Identity(h)
            z = Identity(h)
        }""",
        ["Relu", "Identity"],
    ),
    "an output passed on as another": (
        """(float[N,4] x) => (float[N,4] y, float[N,4] z) {
            y = Relu(x)
            z = Identity(y)
        }""",
        ["Relu", "Identity"],
    ),
    "weights moved": (
        """(float[N,4] x) => (float[N,3] y, float[8,3] z) <float[8,4] w1, float[3,8] w2, float[3,8] w3> {
            t1 = Transpose(w1)
            h = MatMul(x, t1)
            t2 = Transpose<perm=[1,0]>(w2)
            p = MatMul(h, t2)
            q = Gemm<transB=1>(h, w2)
            y = Add(p, q)
            z = Transpose(w3)
        }""",
        ["MatMul", "MatMul", "Gemm", "Add", "Transpose"],
    ),
    "a weight moved for a subgraph": (
        """(float[N,4] x, bool c) => (float[N,3] y) <float[3,4] w> {
            t = Transpose(w)
            y = If(c) <then_branch = a () => (float[N,3] u) { u = MatMul(x, t) },
                       else_branch = b () => (float[N,3] v) { s = Neg(t) v = MatMul(x, s) }>
        }""",
        ["If"],
    ),
    "weights computed from weights": (
        """(float[N,4] x) => (float[N,3] y) <float[4,3] w, float s, float[3,8] u> {
            scaled = Mul(w, s)
            n = Constant<value_ints = [2, 2]>()
            parts = Constant<value_ints = [0]>()
            one = Constant<value_ints = [4]>()
            axis = Constant<value_ints = [1]>()
            taken = Slice(u, parts, one, axis)
            turned = Transpose(taken)
            m = MatMul(scaled, taken)
            q = MatMul(x, scaled)
            r = MatMul(x, turned)
            y = Add(q, r)
        }""",
        ["MatMul", "MatMul", "Add"],
    ),
    "a weight that would grow is left to run time": (
        """(float[N,4] x) => (float[N,300] y) <float[4,1] w> {
            n = Constant<value_ints = [4, 300]>()
            wide = Expand(w, n)
            tall = Constant<value_ints = [300, 1]>()
            much = Tile(wide, tall)
            first = Constant<value_ints = [0]>()
            fourth = Constant<value_ints = [4]>()
            some = Slice(much, first, fourth, first)
            y = MatMul(x, some)
        }""",
        ["MatMul"],
    ),
    "sizes that the file declares": (
        """(float[N,6,4] x) => (float[N,24] y, float[N,6,4] z) <float[4] w> {
            s = Shape(x)
            zero = Constant<value_int = 0>()
            two = Constant<value_int = 2>()
            last = Gather(s, two)
            width = Cast<to = 1>(last)
            root = Sqrt(width)
            n = Gather(s, zero)
            first = Constant<value_ints = [0]>()
            head = Unsqueeze(n, first)
            rest = Constant<value_ints = [24]>()
            target = Concat<axis = 0>(head, rest)
            y = Reshape(x, target)
            whole = Expand(w, s)
            scaled = Mul(x, whole)
            z = Div(scaled, root)
        }""",
        ["Shape", "Reshape", "Gather", "Concat", "Expand", "Mul", "Div"],
    ),
    "a size added up": (
        """(float[N,6,4] x) => (float[M,6,2,2] y) {
            s = Shape(x)
            i0 = Constant<value_int = 0>()
            i1 = Constant<value_int = 1>()
            i2 = Constant<value_int = 2>()
            two = Constant<value_int = 2>()
            axis = Constant<value_ints = [0]>()
            a = Gather(s, i0)
            b = Gather(s, i1)
            c = Gather(s, i2)
            half = Div(c, two)
            au = Unsqueeze(a, axis)
            bu = Unsqueeze(b, axis)
            hu = Unsqueeze(half, axis)
            tu = Unsqueeze(two, axis)
            target = Concat<axis = 0>(au, bu, hu, tu)
            y = Reshape(x, target)
        }""",
        ["Reshape"],
    ),
    "a token for each sample": (
        """(float[N,6,4] x) => (float[N,7,4] y) <float[1,1,4] token> {
            s = Shape(x)
            zero = Constant<value_int = 0>()
            n = Gather(s, zero)
            axis = Constant<value_ints = [0]>()
            head = Unsqueeze(n, axis)
            same = Constant<value_ints = [-1]>()
            asked = Concat<axis = 0>(head, same, same)
            three = Constant<value_ints = [3]>()
            ones = ConstantOfShape<value = int64[1] {1}>(three)
            minus = Constant<value_int = -1>()
            none = Mul(ones, minus)
            absent = Equal(asked, none)
            target = Where(absent, ones, asked)
            tokens = Expand(token, target)
            y = Concat<axis = 1>(tokens, x)
        }""",
        ["Shape", "Gather", "Unsqueeze", "Concat", "Where", "Gather", "Concat", "Expand", "Concat"],
    ),
    "a token for each sample, as wide as another tensor": (
        """(float[N,6,4] x) => (float[N,6,4] y) <float[1,1,4] token> {
            s = Shape(x)
            tokens = Expand(token, s)
            y = Concat<axis = 1>(tokens)
        }""",
        ["Shape", "Gather", "Concat", "Expand", "Concat"],
    ),
    "heads repeated, then merged": (
        """(float[N,2,1,3,4] x) => (float[N,3,4,4] y) {
            s = Shape(x)
            axis = Constant<value_ints = [0]>()
            head = Gather(s, axis)
            rest = Constant<value_ints = [2,2,3,4]>()
            wide = Concat<axis = 0>(head, rest)
            e = Expand(x, wide)
            merged = Constant<value_ints = [4,3,4]>()
            together = Concat<axis = 0>(head, merged)
            r = Reshape(e, together)
            y = Transpose<perm = [0,2,1,3]>(r)
        }""",
        ["Expand", "Reshape", "Transpose"],
    ),
    "equal parts": (
        """(float[N,6,4] x) => (float[N,3,4] y, float[N,3,4] z) {
            y, z = Split<axis = 1>(x)
        }""",
        ["Split"],
    ),
    "packed heads": (
        """(float[N,5,24] x) => (float[N,2,5,4] q, float[N,2,5,4] k, float[N,2,4,5] v) {
            target = Constant<value_ints = [0, 0, 3, 2, 4]>()
            r = Reshape(x, target)
            t = Transpose<perm = [2,0,3,1,4]>(r)
            i0 = Constant<value_int = 0>()
            i1 = Constant<value_int = 1>()
            q = Gather(t, i0)
            k = Gather(t, i1)
            a2 = Constant<value_ints = [2]>()
            a3 = Constant<value_ints = [3]>()
            a0 = Constant<value_ints = [0]>()
            part = Slice(t, a2, a3, a0)
            vv = Squeeze(part, a0)
            v = Transpose<perm = [0,1,3,2]>(vv)
        }""",
        ["Split", "Reshape", "Transpose", "Reshape", "Transpose", "Reshape", "Transpose"],
    ),
    "packed heads that something else looks at": (
        """(float[N,5,24] x) => (float[N,5,2,4] q, float[3,N,5,2,4] all) {
            target = Constant<value_ints = [0, 0, 3, 2, 4]>()
            r = Reshape(x, target)
            i0 = Constant<value_int = 0>()
            q = Gather<axis = 2>(r, i0)
            all = Transpose<perm = [2,0,1,3,4]>(r)
        }""",
        ["Reshape", "Gather", "Transpose"],
    ),
    "what nothing uses": (
        """(float[N,4] x) => (float[N,4] y) <float[4,8] w> {
            h = MatMul(x, w)
            y = Relu(x)
        }""",
        ["Relu"],
    ),
}


@pytest.mark.parametrize("case", WRITTEN_ANYHOW)
def test_canonical_form_changes_no_bit(case: str):
    text, wanted = WRITTEN_ANYHOW[case]
    source = proto(text)
    found = canonical(source)
    assert [node.op_type for node in found.graph] == wanted
    onnx.checker.check_model(ir.to_proto(found), full_check=True)
    assert interface(found) == interface(ir.from_proto(source))
    feed = {name: np.ones((), bool) if a.dtype == bool else a for name, a in inputs(found).items()}
    before, after = run(source, feed), run(found, feed)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    once = serialised(found)
    assert not CANONICALISE(found).modified
    assert serialised(found) == once


def test_functions_are_written_out():
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
    g (float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8,3] w2> {
        h = local.layer(x, w1)
        y = MatMul(h, w2)
    }
    <opset_import: ["" : 17], domain: "local">
    layer (a, w) => (c) {
        b = MatMul(a, w)
        c = Relu(b)
    }"""
    source = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for value in list(source.graph.value_info):
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        source.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    found = canonical(source)
    assert [node.op_type for node in found.graph] == ["MatMul", "Relu", "MatMul"]
    assert len(read_scm(found).sites) == 1
    feed = inputs(found)
    np.testing.assert_array_equal(run(source, feed)["y"], run(found, feed)["y"])


def test_initializers_of_old_files_are_fixed_though_listed_as_inputs(tmp_path: Path):
    text = """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8,3] w2> {
        h = MatMul(x, w1)
        y = MatMul(h, w2)
    }"""
    source = proto(text, opset=8)
    source.ir_version = 3
    for tensor in source.graph.initializer:
        source.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(source, full_check=True)
    found = canonical(source)
    assert read_scm(found).sites[0].refusal is None
    save_model(found, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert again.ir_version == 3
    assert [value.name for value in again.graph.input] == [value.name for value in source.graph.input]


def test_a_shape_speaks_only_of_the_axes_that_are_taken_from_it():
    """The channels of `h` may go although its batch size is asked for; those whose number is asked for stay."""
    text = """(float[N,4,5] x) => (float[N,5,3] y, int64[M] n) <float[4,8] w1, float[8,3] w2> {
        t = Transpose<perm=[0,2,1]>(x)
        h = MatMul(t, w1)
        y = MatMul(h, w2)
        s = Shape(h)
        which = Constant<value_ints = [$axis]>()
        n = Gather(s, which)
    }"""
    refused = [read_scm(canonical(proto(text, axis=axis))).sites[0].refusal for axis in (0, 2)]
    assert refused[0] is None
    assert str(refused[1]) == "Shape 's' tells the size of this axis"
