"""What the command line refuses: models, data and outputs."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import KEEP, Run, refused, written
from onnx import helper
from small_models import mlp, samples

pytestmark = pytest.mark.usefixtures("fast")


# --- models that are refused ------------------------------------------------------------------------------------------


def edited(change: Callable[[onnx.ModelProto], object], **options: Any) -> bytes:
    model = mlp(**options)
    change(model)
    return model.SerializeToString()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.onnx", b"x")
    return buffer.getvalue()


def external(location: str) -> bytes:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edited(change)


def custom(model: onnx.ModelProto) -> None:
    model.graph.node.insert(-1, helper.make_node("Frobnicate", ["h1"], ["z"], name="frob", domain="my.domain"))
    model.graph.node[-1].input[0] = "z"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))


def sparse(model: onnx.ModelProto) -> None:
    dense = model.graph.initializer[1]
    values = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(dense), dense.name)
    indices = onnx.numpy_helper.from_array(np.arange(16), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16]))
    del model.graph.initializer[1]


OK = mlp().SerializeToString()
BAD_MODELS: Mapping[str, tuple[bytes, int, str]] = {
    "empty": (b"", 3, "empty"),
    "garbage": (np.random.default_rng(0).bytes(3000), 3, "protobuf"),
    "truncated": (OK[: len(OK) // 2], 3, "protobuf"),
    "html": (b"\n <!DOCTYPE html><html></html>", 3, "HTML"),
    "zip": (zipped(), 3, "zip"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), 3, "compressed"),
    "pickle": (pickle.dumps({"a": 1}), 3, "pickle"),
    "pickle, old": (pickle.dumps({"a": 1}, protocol=2), 3, "pickle"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", 3, "git lfs pull"),
    "json": (b'{"graph": {}}', 3, "JSON"),
    "json, indented": (b"\xef\xbb\xbf\n [1, 2]", 3, "JSON"),
    "ort": (b"\x20\0\0\0ORTM" + bytes(99), 3, "ORT format"),
    "safetensors": (b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}', 3, "safetensors"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), 3, "no graph"),
    "no nodes": (edited(lambda m: m.graph.ClearField("node")), 3, "no graph with nodes"),
    "no opset": (edited(lambda m: m.ClearField("opset_import")), 3, "opset"),
    "no outputs": (edited(lambda m: m.graph.ClearField("output")), 3, "no outputs"),
    "opset 6": (edited(lambda _: None, opset=6), 7, "opset 6"),
    "opset 8": (edited(lambda _: None, opset=8), 7, "opset 8"),
    "opset 9999": (edited(lambda _: None, opset=9999, annotated=False), 7, "upgrade onnx"),
    "ir 9999": (edited(lambda _: None, ir=9999), 7, "upgrade onnx"),
    "unknown operator": (
        edited(lambda m: m.graph.node.add(op_type="Frobnicate", input=["y"], output=["z"])),
        7,
        "Frobnicate",
    ),
    "unknown domain": (edited(custom), 7, "my.domain"),
    "undeclared domain": (edited(lambda m: setattr(m.graph.node[1], "domain", "my.domain")), 7, "my.domain"),
    "dangling input": (edited(lambda m: m.graph.node[0].input.__setitem__(1, "nowhere")), 3, "nowhere"),
    "cycle": (edited(lambda m: m.graph.node[1].input.__setitem__(0, "h1")), 3, "cycle"),
    "name produced twice": (edited(lambda m: m.graph.node.append(m.graph.node[0])), 3, "p0"),
    "initializer twice": (edited(lambda m: m.graph.initializer.append(m.graph.initializer[0])), 3, "w0"),
    "huge shape": (edited(lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**40)), 3, "w0"),
    "negative shape": (edited(lambda m: m.graph.initializer[0].dims.__setitem__(0, -6)), 3, "w0"),
    "short weights": (edited(lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234")), 3, "w0"),
    "unknown type": (edited(lambda m: setattr(m.graph.initializer[0], "data_type", 99)), 3, "99"),
    "sparse weights": (edited(sparse), 7, "dense weights"),
    "weights elsewhere": (external("../../etc/passwd"), 3, "w0"),
    "weights at the root": (external("/etc/passwd"), 3, "w0"),
    "weights missing": (external("missing.bin"), 3, "missing.bin"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(run: Run, tmp_path: Path, name: str):
    content, code, word = BAD_MODELS[name]
    (tmp_path / "m.onnx").write_bytes(content)
    np.savez(tmp_path / "data.npz", x=samples())
    before = written(tmp_path)
    refused(run("m.onnx", *KEEP, "--calib", "data.npz"), code, word, "m.onnx" if "domain" not in name else "")
    assert written(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("missing.onnx", 2, "no such"),
        ("missing/m.onnx", 2, "no such"),
        ("x" * 5000, 2, "no such"),
        ("", 3, "not a regular file"),
        (".", 3, "not a regular file"),
        ("/dev/null", 3, "not a regular file"),
        ("fifo", 3, "not a regular file"),
        ("secret.onnx", 3, "ermission"),
    ],
)
def test_models_that_are_no_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, word: str
):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "secret.onnx").write_bytes(OK)
    if name == "secret.onnx":  # by permissions it could not be kept from root
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refused(run(name), code, word)
    refused(run("inspect", name), code, word)


def test_custom_operators_can_be_inspected(run: Run, tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(edited(custom))
    ran = run("inspect", "m.onnx")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"^h0 +1 +16  read by fc1$", ran.out, re.MULTILINE)
    assert re.search(r"^w2 .* reads Frobnicate 'frob', which has no declaration", ran.out, re.MULTILINE)


# --- data that is refused ---------------------------------------------------------------------------------------------

X = samples()
BAD_DATA: Mapping[str, tuple[dict[str, np.ndarray], str, int, str]] = {
    "wrong name": ({"X": X}, "", 4, "rename 'X' to 'x'"),
    "extra name": ({"x": X, "z": X}, "", 4, "'z'"),
    "wrong shape": ({"x": X[:, :5]}, "", 4, "(400, 5)"),
    "wrong rank": ({"x": X[0]}, "", 4, "x[None]"),
    "text": ({"x": np.full(X.shape, "a")}, "", 4, "real numbers"),
    "pickled objects": ({"x": np.array([None, {}], dtype=object)}, "", 4, "pickled"),
    "complex": ({"x": X.astype(complex)}, "", 4, "complex128"),
    "lossy": ({"x": np.full(X.shape, 2**31 - 1)}, "", 4, "without loss"),
    "nan": ({"x": np.where(np.arange(400)[:, None] == 3, np.nan, X)}, "", 4, "sample 3"),
    "no samples": ({"x": X[:0]}, "", 4, "no samples"),
    "few samples": ({"x": X[:10]}, "", 4, "at least 16"),
    "labels missing": ({"x": X}, "--labels foo", 4, "'foo'"),
    "two labels": ({"x": X, "y": X, "label": X}, "", 4, "--labels"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(run: Run, small: Path, name: str):
    arrays, options, code, word = BAD_DATA[name]
    np.savez(small.parent / "data.npz", **arrays)
    before = written(small.parent)
    refused(run(small, *KEEP, "--calib", "data.npz", *options.split()), code, word)
    assert written(small.parent) == before


def test_sites_with_fewer_samples_than_channels_are_cut_with_a_warning(run: Run, small: Path):
    np.savez(small.parent / "data.npz", x=X[:20])
    ran = run(small, *KEEP, "--calib", "data.npz")
    assert ran.code == 0
    said = " ".join(ran.err.split())
    assert "there is little data for" in said
    assert "(site 'h0': 10 observations of 16 channels)" in said


def test_big_endian_data_is_what_it_says(run: Run, small: Path):
    np.savez(small.parent / "data.npz", x=X.astype(">f4"))
    ran = run(small, *KEEP, "--dry-run", "--calib", "data.npz")
    assert ran.code == 0
    assert "byte order" in ran.err
    assert ran.out == run(small, *KEEP, "--dry-run").out


# --- outputs that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "code", "word"),
    [
        ("nowhere/out.onnx", 2, "folder"),
        (".", 2, "no file"),
        ("m.onnx", 2, "input"),
        ("sub/../m.onnx", 2, "input"),
        ("m.calib.npz", 2, "input"),
        ("fifo", 2, "no file"),
        ("/proc/out.onnx", 8, "written"),
    ],
)
def test_bad_outputs(run: Run, small: Path, output: str, code: int, word: str):
    (small.parent / "sub").mkdir()
    os.mkfifo(small.parent / "fifo")
    before = written(small.parent)
    refused(run(small, *KEEP, "--calib", "m.calib.npz", "--force", "-o", output), code, word)
    assert written(small.parent) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(run: Run, small: Path):
    (small.parent / "locked").mkdir(mode=0o500)
    refused(run(small, *KEEP, "-o", "locked/out.onnx"), 8, "ermission")


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 8), (KeyboardInterrupt(), 130)])
def test_an_interrupted_write_leaves_all_as_it_was(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
):
    (small.parent / "m.ms.onnx").write_bytes(b"old")
    before = written(small.parent)

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    ran = run(small, *KEEP, "--force")
    assert ran.code == code
    assert written(small.parent) == before
    assert sorted(p.name for p in small.parent.iterdir()) == sorted(before)
