"""What is scored: several outputs, weights, and sites that gradients do not reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import onnx_ir as ir
import pytest

from mscompile import cli
from mscompile.calibration.statistics_file import load_statistics
from mscompile.network.dense import open_dense
from mscompile.options import Options
from mscompile.planning.scores import READER_LOCAL, score
from mscompile.stages import calibrate_model


def command(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: object) -> None:
    assert command(*arguments) == 2
    assert words in capsys.readouterr().err


TWO_HEADS = """(float[N,4] x) => (float[N,3] y, float[N,2] z, int64[N] k)
    <float[4,6] w, float[6] b, float[6,3] wy, float[6,2] wz> {
    a = Gemm(x, w, b)
    h = Relu(a)
    y = MatMul(h, wy)
    z = MatMul(h, wz)
    k = ArgMax <axis = 1, keepdims = 0> (y)
}"""


@pytest.fixture
def two_heads(tmp_path: Path) -> Path:
    model = golden.model(TWO_HEADS)
    wz = next(v for v in model.graph.initializers.values() if v.name == "wz")
    wz.const_value = ir.tensor(10 * wz.const_value.numpy(), name="wz")
    ir.save(model, tmp_path / "two.onnx")
    np.savez(tmp_path / "two.calib.npz", x=np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32))
    return tmp_path / "two.onnx"


def test_all_outputs_of_floating_point_are_scored_together(two_heads: Path) -> None:
    """The risks of weighted outputs add; with as many probes as values they are exact where nothing bends behind."""

    def risk(outputs: dict[str, float] | None) -> np.ndarray:
        options = replace(Options(keep=0.5), output=outputs, replacement="constant", probes=5)
        found = calibrate_model(two_heads, None, None, options, check=6)
        (check,) = found.checks
        assert [unit.measured for unit in check.units] == pytest.approx([unit.predicted for unit in check.units], rel=1e-4)
        assert any("to balance: --output y=" in note for note in found.notes) == (outputs is None)
        return np.array([unit.predicted for unit in check.units])

    apart = risk({"y": 1.0}), risk({"z": 1.0})
    np.testing.assert_allclose(risk(None), apart[0] + apart[1], rtol=1e-4)
    np.testing.assert_allclose(risk({"y": 100.0, "z": 0.5}), 100 * apart[0] + 0.5 * apart[1], rtol=1e-4)


def test_outputs_by_name(two_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, constant = tmp_path / "s", ("--replacement", "constant")
    assert command("calibrate", two_heads, "-o", out, "--output", "y=2", "--output", "z", *constant) == 0
    assert load_statistics(out, model_sha256=open_dense(two_heads).sha256).outputs == {"y": 2.0, "z": 1.0}
    capsys.readouterr()
    refused(capsys, "this output cannot be scored", "calibrate", two_heads, "-o", tmp_path / "t", "--output", "k")
    refused(capsys, "named twice", "calibrate", two_heads, "-o", tmp_path / "t", "--output", "y", "--output", "y=2")
    refused(capsys, "positive weights", "calibrate", two_heads, "-o", tmp_path / "t", "--output", "y=0")
    both = ("--output", "y", "--output", "z", "--objective", "cross-entropy")
    refused(capsys, "labels are of one output", "calibrate", two_heads, "-o", tmp_path / "t", *both)
    kl = ("--keep", "0.5", "--objective", "kl", *constant)
    refused(capsys, "lack curvature of the divergence", "plan", two_heads, out, "-o", tmp_path / "p", *kl)


RECURRENT = """(float[T,5] x, float[1,1,4] h0, float[1,1,4] c0) => (float[T,1,4] y)
    <float[5,6] w, float[6] b, float[6,7] w2, float[7] b2, float[1,16,7] wl, float[1,16,4] rl, int64[1] one> {
    a = Gemm(x, w, b)
    h = Relu(a)
    c = Gemm(h, w2, b2)
    g = Relu(c)
    s = Unsqueeze(g, one)
    q, hn, cn = LSTM <hidden_size = 4> (s, wl, rl, , , h0, c0)
    y = Squeeze(q, one)
}"""


def test_sites_before_a_recurrent_operator_say_what_scored_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = golden.model(RECURRENT)
    next(v for v in model.graph.initializers.values() if v.name == "one").const_value = ir.tensor(np.array([1]), name="one")
    ir.save(model, tmp_path / "r.onnx")
    x = np.random.default_rng(0).standard_normal((150, 5)).astype(np.float32)
    state = np.zeros((1, 1, 4), np.float32)
    np.savez(tmp_path / "r.calib.npz", x=x, h0=state, c0=state)
    assert command("calibrate", tmp_path / "r.onnx", "-o", tmp_path / "s") == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "h 6 half the squared change of the readers' outputs: LSTM" in printed
    assert "has no reverse-mode rule" in printed
    assert "'h0' (1, 1, 4) has no sample axis: the same array goes with every batch" in printed
    assert command(tmp_path / "r.onnx", "--keep", "0.5", "--replacement", "constant") == 0
    assert list(ir.load(tmp_path / "r.ms.onnx").graph.initializers["w"].shape) == [5, 3]


OPAQUE = {
    "GRU": """(float[N,3,5] x) => (float[N,4] y)
        <float[5,6] w, float[6] b, float[6,7] w2, float[1,12,7] wl, float[1,12,4] rl> {
        a = MatMul(x, w)
        s = Add(a, b)
        h = Relu(s)
        g = MatMul(h, w2)
        t = Transpose<perm=[1,0,2]>(g)
        q, last = GRU<hidden_size = 4>(t, wl, rl)
        y = Flatten<axis=2>(last)
    }""",
    "If": """(float[N,3,5] x, bool c) => (float[N,3,4] y) <float[5,6] w, float[6,7] w2, float[7,4] w3> {
        a = MatMul(x, w)
        h = Relu(a)
        g = MatMul(h, w2)
        y = If(c) <then_branch = yes () => (float[N,3,4] u) { u = MatMul(g, w3) },
                   else_branch = no () => (float[N,3,4] v) { e = Neg(g) v = MatMul(e, w3) }>
    }""",
}


@pytest.mark.parametrize("operator", OPAQUE)
def test_sites_before_what_has_no_gradient_are_scored_by_their_readers(operator: str) -> None:
    """½ Σ_o W_jo² Var(a_j): what the reader of unit j makes of it, since nothing is known of what comes behind."""
    model = golden.model(OPAQUE[operator])
    x = np.random.default_rng(0).standard_normal((64, 3, 5)).astype(np.float32)
    data = {"x": x} | ({"c": np.ones((), np.bool_)} if operator == "If" else {})
    found = calibrate_model(model, data, None, Options(replacement="constant"))
    assert operator in found.statistics.refused["h"]
    stored = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    h = np.maximum(x @ stored["w"] + stored.get("b", 0.0), 0.0).reshape(-1, 6)
    expected = 0.5 * h.var(axis=0) * np.square(stored["w2"]).sum(axis=1)
    scores = score(found.dense.scm, found.dense.sites, found.statistics, "logit-mse", seed=0)
    np.testing.assert_allclose(scores.risk["h"], expected, rtol=1e-3)
    assert scores.basis["h"].startswith(READER_LOCAL)
