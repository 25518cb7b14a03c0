"""Large models: weights are mapped, shared and streamed, never copied as a whole. Here small ones go the same way."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_models import mlp, samples

from mscompile import Options, compile_model, files, runtime
from mscompile.errors import ModelError
from mscompile.intake import loading, mapped, payloads
from mscompile.intake.mapped import place_of
from mscompile.verification import skeletons
from mscompile.verification.surgery import Patch, patched, probe

MEGABYTE = 1 << 20
KINDS = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL", "INT4", "FLOAT8E4M3FN"]


def anonymous() -> int:
    """Bytes of memory that are no pages of files."""
    gc.collect()
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def many_kinds() -> onnx.ModelProto:
    """An initializer of each element type, large and small, as raw data and as entries, with text beside it."""
    rng = np.random.default_rng(0)
    model = mlp((6, 64, 32, 3))
    for kind in KINDS:
        for count in (4, 4096):
            tensor = helper.make_tensor(f"{kind}.{count}", getattr(TensorProto, kind), [count], rng.integers(0, 2, count))
            tensor.doc_string = "about it" * (count % 3)
            model.graph.initializer.append(tensor)
    model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=(300, 2)), "doubles"))
    model.graph.initializer[-1].data_location = TensorProto.DEFAULT  # as onnx says of what was external before
    model.metadata_props.add(key="a", value="b")
    return model


def written(parts: Any) -> bytes:
    return b"".join(bytes(part) for part in parts)


def test_weights_are_taken_out_and_put_back_byte_for_byte():
    content = many_kinds().SerializeToString(deterministic=True)
    skeleton, found = payloads.split(content)
    assert len(skeleton) < 0.9 * len(content)
    proto = onnx.ModelProto.FromString(skeleton)
    for number, data in found.items():
        whole = many_kinds().graph.initializer[number]
        assert bytes(data) == whole.raw_data
        assert not proto.graph.initializer[number].raw_data
        assert proto.graph.initializer[number].dims == whole.dims
    assert {proto.graph.initializer[n].name for n in found} >= {"w0", "w1", "doubles"}
    assert written(payloads.joined(skeleton, found)) == content
    skeleton, found = skeletons.parted(many_kinds())
    assert written(payloads.joined(skeleton.SerializeToString(deterministic=True), found)) == content
    model, _ = loading.read_proto(many_kinds())
    skeleton, found = skeletons.apart(model)
    whole = ir.to_proto(model).SerializeToString(deterministic=True)
    assert written(payloads.joined(skeleton.SerializeToString(deterministic=True), found)) == whole


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.integers(1, 40), st.binary(max_size=40), st.randoms(use_true_random=False))
def test_damaged_files_are_left_to_protobuf(start: int, cut: int, put: bytes, random: Any):
    content = bytearray(mlp((6, 64, 32, 3)).SerializeToString(deterministic=True))
    start = random.randrange(len(content)) if start > 100 else start
    content[start : start + cut] = put
    skeleton, found = payloads.split(bytes(content))
    assert found or skeleton == bytes(content)
    try:
        wanted = onnx.ModelProto.FromString(bytes(content))
    except Exception:
        return  # what protobuf refuses may or may not be split
    if found:
        proto = onnx.ModelProto.FromString(skeleton)
        for number, data in found.items():
            proto.graph.initializer[number].raw_data = bytes(data)
        assert proto.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large."""
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(runtime, "LARGE", 1000)
    monkeypatch.setattr("mscompile.intake.wire.READ", 1000)


def outputs(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("external", [False, True])
def test_large_models_are_compiled_as_small_ones(tmp_path: Path, small_limits: None, external: bool):
    onnx.save(mlp((6, 64, 48, 3)), tmp_path / "m.onnx", save_as_external_data=external, location="w.bin", size_threshold=0)
    options, x = Options(keep=0.75, swap=0.0), samples()
    result = compile_model(tmp_path / "m.onnx", {"x": x}, tmp_path / "out.onnx", options)
    assert list(tmp_path.glob("out.onnx.*.data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "LARGE", 1 << 30)
        plain = compile_model(mlp((6, 64, 48, 3)), {"x": x}, None, options)
    assert [site.kept.tolist() for site in result.plan.sites] == [site.kept.tolist() for site in plain.plan.sites]
    assert result.report.fold_error is not None
    wanted = runtime.Session(plain.model).run({"x": x})["y"]
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx", x), wanted, atol=1e-4)  # kernels of other rounding


def test_large_models_are_audited(tmp_path: Path, small_limits: None):
    from mscompile.audit.pipeline import audit
    from mscompile.audit.setup import AuditOptions

    onnx.save(mlp((6, 64, 48, 3)), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    x = samples()
    compile_model(tmp_path / "m.onnx", {"x": x}, tmp_path / "out.onnx", Options(keep=0.9))
    options = AuditOptions(fidelity=0.5, table=0)
    data = {"x": np.random.default_rng(9).normal(size=x.shape).astype(np.float32)}
    assert audit(tmp_path / "m.onnx", tmp_path / "out.onnx", data, options).verdict == "certified"


@pytest.mark.parametrize("field", ["initializer", "node", "input"])
def test_text_that_is_none_is_refused(tmp_path: Path, field: str):
    """Found by fuzzing."""
    content = mlp((6, 64, 32, 3)).SerializeToString()
    name = {"initializer": b"w1", "node": b"relu0", "input": b"x"}[field]
    (tmp_path / "m.onnx").write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(ModelError) as refusal:
        loading.load_model(tmp_path / "m.onnx")
    assert "not UTF-8" in str(refusal.value)


# --- memory -------------------------------------------------------------------------------------------------------------


SIDE = 2048
"""Of a square weight of 16 MB."""
LITTLE = 6 * MEGABYTE
"""What loading, opening or writing may take beside the weights: less than one of them."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Three products of 16 MB each, in an external file."""
    names = ["x", "a", "b", "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)]
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.random((SIDE, SIDE), dtype=np.float32) / SIDE, f"w{i}") for i in range(3)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIDE]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return tmp_path / "m.onnx"


def test_external_weights_take_no_memory(large: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "LARGE", MEGABYTE)
    x = np.ones((2, SIDE), dtype=np.float32)
    runtime.Session(mlp()).run({"x": samples()})  # what onnxruntime takes for itself
    before = anonymous()
    model, sha256 = loading.load_model(large)
    assert anonymous() - before < LITTLE
    skeleton = skeletons.skeleton_of(model)
    assert skeleton.shared == {}
    opened = [runtime.Session(graph) for graph in (skeleton, probe(skeleton, ["a"]), patched(skeleton, [Patch("b", 2, 1)]))]
    found = opened[0].run({"x": x})["y"]
    assert anonymous() - before < LITTLE
    files.save_model(model, large.with_name("out.onnx"), external=True)
    assert files.file_bytes(model) > 3 * 4 * SIDE**2
    assert anonymous() - before < LITTLE
    again, _ = loading.load_model(large.with_name("out.onnx"))
    np.testing.assert_array_equal(runtime.Session(again).run({"x": x})["y"], found)
    assert sha256 == loading.load_model(large)[1]


def test_inline_weights_are_in_memory_once(large: Path):
    onnx.save(onnx.load(large), large.with_name("inline.onnx"))
    before = anonymous()
    model, _ = loading.load_model(large.with_name("inline.onnx"))
    assert anonymous() - before < 3 * 4 * SIDE**2 + LITTLE
    assert all(place_of(value.const_value.numpy()) is None for value in model.graph.initializers.values())


def test_a_file_that_is_exchanged_while_it_is_read(large: Path, monkeypatch: pytest.MonkeyPatch):
    onnx.save(onnx.load(large), large.with_name("inline.onnx"))
    parse = loading.parse

    def slow(content: bytes, path: Path) -> onnx.ModelProto:
        os.utime(path, ns=(0, 0))
        return parse(content, path)

    monkeypatch.setattr(loading, "parse", slow)
    with pytest.raises(ModelError, match="rejected") as refusal:
        loading.load_model(large.with_name("inline.onnx"))
    assert "changed" in str(refusal.value)


def test_what_is_mapped_is_known_by_its_place(tmp_path: Path):
    path = tmp_path / "f"
    np.arange(100, dtype=np.float32).tofile(path)
    with path.open("rb") as file:
        whole = mapped.map_file(file.fileno(), 400, path)
    array = whole[40:200].view(np.float32).reshape(5, 8)
    place = place_of(array)
    assert place is not None
    assert place.offset == 40
    assert np.array_equal(np.fromfile(place.path, np.float32)[10:50].reshape(5, 8), array)
    assert place_of(array.T) is None
    assert place_of(array[:, :3]) is None
    assert place_of(array[2:]) == mapped.Place(place.path, 40 + 64)
    assert place_of(array.copy()) is None
    assert Path(place.path).exists()
    del whole, array
    gc.collect()
    assert not Path(place.path).exists()
