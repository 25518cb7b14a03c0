"""The whole pipeline: what a compiled file keeps, what plan and report say, and which models are taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import FEATURES, mlp, samples, set_weight, weight, with_dead_units

from mscompile import Compilation, Options, compile_model, files, report
from mscompile.errors import DataError, GoalError, ModelError, UnsupportedError, UsageError
from mscompile.models import path as shipped
from mscompile.pipeline import inspect
from mscompile.planning.plan import Plan

HALF = Options(keep=0.5)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mscompile.network.sizes.LATENCY_SECONDS", 0.0)


def outputs(model: Path | onnx.ModelProto, x: np.ndarray, level: str = "ORT_ENABLE_ALL") -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def digits() -> np.ndarray:
    with np.load(shipped().with_suffix(".calib.npz")) as data:
        return data["x"]


def compiled(folder: Path, model: Any = None, options: Options = HALF, name: str = "out.onnx", **given: Any) -> Compilation:
    return compile_model(
        mlp() if model is None else model, given.pop("data", {"x": samples()}), folder / name, options, **given
    )


# --- the compiled file ------------------------------------------------------------------------------------------------


def test_keeping_everything_changes_no_bit(tmp_path: Path):
    result = compile_model(shipped(), None, tmp_path / "out.onnx", Options(keep=1.0))
    for level in LEVELS:
        for wanted, found in zip(
            outputs(shipped(), digits(), level), outputs(tmp_path / "out.onnx", digits(), level), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
    assert result.plan.sites == ()
    assert result.report.fidelity is None
    assert any("nothing was cut" in warning for warning in result.report.warnings)


def test_the_shipped_model_shrinks_and_runs_everywhere(tmp_path: Path):
    result = compile_model(shipped(), None, tmp_path / "out.onnx", HALF)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    x = digits()
    reference = outputs(tmp_path / "out.onnx", x, "ORT_DISABLE_ALL")[0]
    for level in LEVELS:
        np.testing.assert_allclose(outputs(tmp_path / "out.onnx", x, level)[0], reference, rtol=1e-4, atol=1e-4)
    agreement = (outputs(shipped(), x)[0].argmax(1) == reference.argmax(1)).mean()
    assert agreement > 0.9
    sizes = result.report.sizes
    assert sizes.dense.bytes == shipped().stat().st_size
    assert sizes.compiled.bytes == (tmp_path / "out.onnx").stat().st_size < 0.4 * sizes.dense.bytes
    stored = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert sizes.compiled.params == sum(np.prod(t.dims) for t in stored if t.data_type == TensorProto.FLOAT)
    assert sizes.compiled.params < 0.4 * sizes.dense.params
    assert sizes.compiled.macs < 0.4 * sizes.dense.macs


def decorated() -> onnx.ModelProto:
    """A model with something in every field that a user may have filled."""
    model = mlp()
    model.producer_name, model.producer_version, model.domain = "tests", "7", "org.example"
    model.model_version, model.doc_string = 42, "a model"
    model.metadata_props.add(key="licence", value="free\n\x1b[31m")
    graph = model.graph
    graph.doc_string = "a graph"
    graph.metadata_props.add(key="of", value="graph")
    for part in (graph.node[0], graph.input[0], graph.output[0], graph.initializer[0], graph.value_info[0]):
        part.doc_string = f"documents {part.name}"
        part.metadata_props.add(key="of", value=part.name)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    return model


def test_everything_but_the_weights_is_kept(tmp_path: Path):
    before = decorated()
    compiled(tmp_path, before)
    after = onnx.load(tmp_path / "out.onnx")
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(before, field)
    assert {(o.domain, o.version) for o in after.opset_import} >= {(o.domain, o.version) for o in before.opset_import}
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    assert list(after.graph.metadata_props) == list(before.graph.metadata_props)
    assert [(n.op_type, n.name, n.output) for n in after.graph.node] == [
        (n.op_type, n.name, n.output) for n in before.graph.node
    ]
    assert after.graph.node[0] == before.graph.node[0]
    names = {t.name for t in after.graph.initializer}
    assert names == {t.name for t in before.graph.initializer}
    stored = next(t for t in after.graph.initializer if t.name == "w0")
    assert stored.doc_string == "documents w0"
    info = next(v for v in after.graph.value_info if v.name == before.graph.value_info[0].name)
    assert info.doc_string == before.graph.value_info[0].doc_string
    props = {p.key: p.value for p in after.metadata_props}
    assert props.pop("licence") == "free\n\x1b[31m"
    digests = (f"{part}_sha256" for part in ("model", "plan", "weights", "graph", "metadata"))
    assert set(props) == {f"pkg.mscompile.{key}" for key in ("version", "channels", "tau", *digests)}
    plan = Plan.read(tmp_path / "out.plan.json")
    assert props["pkg.mscompile.plan_sha256"] == hashlib.sha256((tmp_path / "out.plan.json").read_bytes()).hexdigest()
    assert props["pkg.mscompile.model_sha256"] == plan.model_sha256
    assert json.loads(props["pkg.mscompile.tau"]) == {site.tensor: site.kept.tolist() for site in plan.sites}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        compile_model(shipped(), None, tmp_path / folder / "out.onnx", HALF)
        found.append([(tmp_path / folder / name).read_bytes() for name in ("out.onnx", "out.plan.json")])
    assert found[0] == found[1]


def test_another_seed_gives_another_split(tmp_path: Path):
    plans = [compiled(tmp_path, options=Options(keep=0.5, seed=s), name=f"{s}.onnx").plan for s in (0, 1)]
    assert plans[0].to_json() != plans[1].to_json()


def test_a_compiled_model_can_be_compiled_again(tmp_path: Path):
    compiled(tmp_path, name="a.onnx")
    result = compile_model(tmp_path / "a.onnx", {"x": samples()}, tmp_path / "b.onnx", HALF)
    assert [site.width for site in result.report.sites] == [4, 2]
    assert any("compiled before" in warning for warning in result.report.warnings)
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    props = {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}
    assert props["pkg.mscompile.model_sha256"] == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize("source", ["shipped", "small"])
def test_a_second_run_with_nothing_to_remove_writes_the_same_file(tmp_path: Path, source: str):
    model, data = (shipped(), {"x": digits()[:300]}) if source == "shipped" else (mlp(), {"x": samples()})
    compile_model(model, data, tmp_path / "a.onnx", HALF)
    result = compile_model(tmp_path / "a.onnx", data, tmp_path / "b.onnx", Options(keep=1.0))
    assert result.plan.sites == ()
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    with pytest.raises(GoalError, match="without data there is nothing to do"):
        compile_model(tmp_path / "a.onnx", None, tmp_path / "c.onnx")


def test_what_the_weights_prove_is_exact_and_done_once(tmp_path: Path):
    result = compile_model(with_dead_units(3), None, tmp_path / "out.onnx")
    for wanted, found in zip(outputs(with_dead_units(3), samples()), outputs(tmp_path / "out.onnx", samples()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert result.report.goal == "weights only"
    assert [site.width for site in result.report.sites] == [13, 8]
    with pytest.raises(GoalError, match="nothing to do"):
        compile_model(tmp_path / "out.onnx", None, tmp_path / "again.onnx")


# --- plan and report --------------------------------------------------------------------------------------------------


def test_plan_fields_and_round_trip(tmp_path: Path):
    result = compiled(tmp_path)
    file = tmp_path / "out.plan.json"
    document = json.loads(file.read_bytes())
    assert set(document) >= {"schema_version", "model_sha256", "objective", "replacement", "sites"}
    for site in document["sites"]:
        assert set(site) >= {"name", "tensor", "axis", "size", "kept", "constants", "affine"}
        assert len(site["kept"]) + len(site["constants"]) == site["size"]
    again = Plan.read(file)
    assert again.to_json() == file.read_text(encoding="utf-8")
    for read, made in zip(again.sites, result.plan.sites, strict=True):
        for field in ("kept", "constants", "affine"):
            np.testing.assert_array_equal(getattr(read, field), getattr(made, field), strict=True)


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("plan")).plan.to_json()


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["sites"][0].update(fields)


@pytest.mark.parametrize(
    "tamper",
    [
        changed(kept=[3, 1]),
        changed(kept=[]),
        changed(kept=[0, 99]),
        changed(kept=[-1, 0]),
        changed(kept=[0.5]),
        changed(constants=[1.0]),
        changed(constants=None),
        changed(affine=[[1.0]]),
        changed(size="many"),
        changed(surprise=1),
        lambda plan: plan.pop("model_sha256"),
        lambda plan: plan.update(sites=3),
        lambda plan: plan["sites"][0]["constants"].__setitem__(0, float("nan")),
    ],
)
def test_tampered_plans_are_refused(tmp_path: Path, plan_text: str, tamper: Callable[[dict[str, Any]], object]):
    file = tmp_path / "out.plan.json"
    plan = json.loads(plan_text)
    tamper(plan)
    file.write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="plan cannot be read"):
        Plan.read(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"[]"])
def test_files_that_are_no_plan(tmp_path: Path, content: bytes):
    (tmp_path / "plan.json").write_bytes(content)
    for name in ("plan.json", "missing.json"):
        with pytest.raises(UsageError, match="plan cannot be read") as raised:
            Plan.read(tmp_path / name)
        assert "\n" not in raised.value.why
        assert "pydantic" not in raised.value.why


def test_report_fields(tmp_path: Path):
    labels = outputs(mlp(), samples())[0].argmax(1)
    compiled(tmp_path, data={"x": samples(), "label": labels}, command="mscompile m.onnx")
    found = json.loads((tmp_path / "out.report.json").read_bytes())
    assert found == json.loads(report.Report.model_validate(found).model_dump_json())
    assert found["schema_version"] == report.SCHEMA_VERSION
    assert set(found["versions"]) >= {"mscompile", "onnx", "onnxruntime", "python"}
    assert found["compiled"]["sha256"] == hashlib.sha256((tmp_path / "out.onnx").read_bytes()).hexdigest()
    assert found["data"]["samples"] == sum(found["data"]["split"].values()) == 400
    assert found["options"]["keep"] == 0.5
    assert found["options"]["batch_size"] == 64
    for site, size in zip(found["sites"], (16, 8), strict=True):
        assert (site["size"], site["width"]) == (size, size // 2)
        assert site["predicted_risk"] > 0
    for half in ("dense", "compiled"):
        assert set(found["sizes"][half]) == {"params", "macs", "bytes", "latency_ms"}
    assert {entry["tensor"]: entry["status"] for entry in found["coverage"]} == dict.fromkeys(("w0", "w1", "w2"), "cut")
    fidelity = found["fidelity"]
    wanted = "iia iia_lower swap delta trials disagreements agreement logit_mse_relative kl accuracy_dense accuracy_compiled"
    assert set(fidelity) >= set(wanted.split())
    assert fidelity["iia"] == pytest.approx(1 - fidelity["disagreements"] / fidelity["trials"])
    assert fidelity["iia_lower"] < fidelity["iia"]
    assert fidelity["accuracy_dense"] == 1.0
    assert found["fold_error"] < 1e-4
    assert found["command"] == "mscompile m.onnx"
    assert found["timings"]


def test_the_shipped_schema_is_up_to_date():
    """Write it again with ``python -m mscompile.report``."""
    assert json.loads(report.SCHEMA_FILE.read_bytes()) == report.schema()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize("kind", ["path", "str", "proto", "ir"])
def test_models_in_every_form_give_the_same_file_and_stay_as_they_are(tmp_path: Path, kind: str, annotated: bool):
    proto = mlp(annotated=annotated)
    onnx.save(proto, tmp_path / "m.onnx")
    model: Any = {
        "path": tmp_path / "m.onnx",
        "str": str(tmp_path / "m.onnx"),
        "proto": proto,
        "ir": ir.from_proto(proto),
    }[kind]
    compiled(tmp_path, model)
    assert proto.SerializeToString(deterministic=True) == mlp(annotated=annotated).SerializeToString(deterministic=True)
    if kind == "ir":
        assert ir.to_proto(model).graph == ir.to_proto(ir.from_proto(proto)).graph
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    plain = compiled(tmp_path, name="plain.onnx").model
    for value in plain.graph.initializers.values():
        np.testing.assert_array_equal(weights[value.name], value.const_value.numpy())


def saved_outside(folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(mlp((FEATURES, 64, 32, 3)), path, save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    return path


def data_of(path: Path) -> list[Path]:
    """The data files beside a model file."""
    return sorted(path.parent.glob(f"{path.name}.*.data"))


def test_external_weights_stay_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = saved_outside(tmp_path)
    monkeypatch.chdir("/")  # weights are looked for beside the model, not in the working folder
    result = compile_model(model, {"x": samples()}, tmp_path / "out.onnx", HALF)
    (data,) = data_of(tmp_path / "out.onnx")
    assert data.stat().st_size > 2000
    assert outputs(tmp_path / "out.onnx", samples())[0].shape == (400, 3)
    assert result.report.sizes.dense.bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.onnx.bin"))
    assert result.report.sizes.compiled.bytes == sum(path.stat().st_size for path in (tmp_path / "out.onnx", data))
    before = data.read_bytes()
    compile_model(model, {"x": samples()}, tmp_path / "out.onnx", HALF, force=True)
    assert [path.read_bytes() for path in data_of(tmp_path / "out.onnx")] == [before]
    compile_model(model, {"x": samples()}, tmp_path / "out.onnx", Options(keep=0.75), force=True)
    assert len(data_of(tmp_path / "out.onnx")) == 1, "the data of the model that was overwritten is gone"
    assert not data.exists()
    compile_model(model, {"x": samples()}, tmp_path / "out.onnx", HALF, force=True)
    inline = compiled(tmp_path, mlp((FEATURES, 64, 32, 3)), name="inline.onnx")
    for value in inline.model.graph.initializers.values():
        stored = next(t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == value.name)
        np.testing.assert_array_equal(numpy_helper.to_array(stored, str(tmp_path)), value.const_value.numpy())


def test_external_weights_in_other_forms(tmp_path: Path):
    model = saved_outside(tmp_path)
    loaded = ir.load(model)
    compiled(tmp_path, loaded)
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values())
    with pytest.raises(ModelError, match="rejected") as refusal:
        compiled(tmp_path, onnx.load(model, load_external_data=False), name="other.onnx")
    assert "external" in str(refusal.value)


@pytest.mark.parametrize("killed", ["data", "model"])
def test_a_model_and_its_data_change_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str):
    model, out = saved_outside(tmp_path), tmp_path / "out.onnx"
    compile_model(model, {"x": samples()}, out, HALF)
    before = outputs(out, samples())[0]
    rename = Path.replace

    def kill(self: Path, target: Path) -> Path:
        if (Path(target) == out) == (killed == "model"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            compile_model(model, {"x": samples()}, out, Options(keep=0.75), force=True)
    np.testing.assert_array_equal(outputs(out, samples())[0], before)
    compile_model(model, {"x": samples()}, out, Options(keep=0.75), force=True)
    assert not np.array_equal(outputs(out, samples())[0], before)


def test_large_weights_go_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    result = compiled(tmp_path, mlp((FEATURES, 64, 32, 3)))
    (data,) = data_of(tmp_path / "out.onnx")
    assert outputs(tmp_path / "out.onnx", samples())[0].shape == (400, 3)
    assert result.report.sizes.compiled.bytes > data.stat().st_size
    assert inspect(tmp_path / "out.onnx").reachable == 1.0


def test_files_larger_than_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    onnx.save(mlp(), tmp_path / "m.onnx")
    monkeypatch.setattr("mscompile.intake.wire.LARGEST", 500)
    with pytest.raises(ModelError, match="rejected") as refusal:
        compile_model(tmp_path / "m.onnx", {"x": samples()}, None, HALF)
    assert "external file" in str(refusal.value)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("options", [HALF, Options(fidelity=0.3)])
def test_models_of_a_fixed_batch_size(tmp_path: Path, batch: int, options: Options):
    model = set_weight(mlp(batch=batch), "w2", weight(mlp(), "w2") * np.float32([1, 0.1, 0.1]))
    result = compiled(tmp_path, model, options)
    split = result.report.data.split  # type: ignore[union-attr]
    assert all(count and count % (2 * batch) == 0 for count in split.values())
    assert result.report.sizes.latency_batch == batch
    assert [d.dim_value for d in onnx.load(tmp_path / "out.onnx").graph.output[0].type.tensor_type.shape.dim] == [batch, 3]
    assert outputs(tmp_path / "out.onnx", samples(batch))[0].shape == (batch, 3)


def test_too_few_samples_for_a_fixed_batch_size(tmp_path: Path):
    with pytest.raises(DataError, match="too few samples") as refusal:
        compiled(tmp_path, mlp(batch=8), data={"x": samples(100)})
    assert "batches of exactly 8" in str(refusal.value)


def test_weights_alone_at_a_fixed_batch_size(tmp_path: Path):
    model = set_weight(mlp(batch=8), "w1", np.where(np.arange(16)[:, None] < 3, 0, weight(mlp(), "w1")).astype(np.float32))
    result = compile_model(model, None, tmp_path / "out.onnx")
    assert result.report.fold_error is not None


def also(operator: str, output: str, kind: int, shape: list[Any], alone: bool = False, **attributes: Any) -> onnx.ModelProto:
    """The model with one more output, or with that alone."""
    value = helper.make_tensor_value_info(output, kind, shape)
    model = mlp(extra=[helper.make_node(operator, ["y"], [output], **attributes)], outputs=[value])
    if alone:
        del model.graph.output[0]
    return model


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (also("ArgMax", "class", TensorProto.INT64, ["N", 1], axis=1), [8, 4]),
        (also("ArgMax", "class", TensorProto.INT64, ["N", 1], alone=True, axis=1), [8, 4]),
        (also("IsNaN", "odd", TensorProto.BOOL, ["N", 3]), [8, 4]),
        (mlp(outputs=[helper.make_tensor_value_info("h1", TensorProto.FLOAT, ["N", 8])]), [8, 8]),
        (mlp(dtype=np.float64), [8, 4]),
    ],
    ids=["also an integer", "integer alone", "boolean", "a site", "float64"],
)
def test_outputs_and_types(tmp_path: Path, model: onnx.ModelProto, widths: list[int]):
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    result = compiled(tmp_path, model, data={"x": samples(dtype=dtype)})
    assert [site.width for site in result.report.sites] == widths
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert list(onnx.load(tmp_path / "out.onnx").graph.output) == list(model.graph.output)
    for wanted, found in zip(
        outputs(model, samples(dtype=dtype)), outputs(tmp_path / "out.onnx", samples(dtype=dtype)), strict=True
    ):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)


@pytest.mark.parametrize(
    "model",
    [
        also("ReduceMean", "loss", TensorProto.FLOAT, [], keepdims=0),
        also("Cast", "text", TensorProto.STRING, ["N", 3], to=TensorProto.STRING),
    ],
    ids=["scalar", "text"],
)
def test_outputs_that_cannot_be_compared(tmp_path: Path, model: onnx.ModelProto):
    with pytest.raises(UnsupportedError, match="cannot be compared"):
        compiled(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [9, 11, 13, 14, 17, 18, 20, 21, 22, 23])
def test_opsets(tmp_path: Path, opset: int):
    result = compiled(tmp_path, mlp(opset=opset, ir=8 if opset < 21 else 10))
    assert [site.width for site in result.report.sites] == [8, 4]
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_unused_empty_and_scalar_weights(tmp_path: Path):
    model = mlp()
    for name, array in (("empty", np.zeros((0, 4))), ("unused", np.zeros(10_000)), ("scalar", np.ones(()))):
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    model.graph.node.insert(0, helper.make_node("Mul", ["x", "scalar"], ["scaled"]))
    model.graph.node[1].input[0] = "scaled"
    result = compiled(tmp_path, model)
    assert [site.width for site in result.report.sites] == [8, 4]
    assert {t.name for t in onnx.load(tmp_path / "out.onnx").graph.initializer} == {
        "w0",
        "b0",
        "w1",
        "b1",
        "w2",
        "b2",
        "scalar",
    }


def test_weights_that_are_not_finite(tmp_path: Path):
    dense = mlp(outputs=[helper.make_tensor_value_info("q", TensorProto.FLOAT, ["N", 3])])
    dense.graph.node.add(op_type="MatMul", name="other", input=["h0", "wq"], output=["q"])
    poisoned = np.full((16, 3), 0.5, dtype=np.float32)
    poisoned[2, 1] = np.nan
    dense.graph.initializer.append(numpy_helper.from_array(poisoned, "wq"))
    result = compiled(tmp_path, dense)
    assert [site.width for site in result.report.sites] == [16, 4]
    assert any("'h0' is left alone" in warning for warning in result.report.warnings)
    bad = weight(mlp(), "w0")
    bad[0, 0] = np.nan
    with pytest.raises(GoalError, match="nothing in this model can be cut"):
        compiled(tmp_path, set_weight(mlp(), "w0", bad), name="other.onnx")


def in_functions(depth: int, body: str = "Relu") -> onnx.ModelProto:
    """The model with ``relu0`` in functions that each call the next one twice."""
    model = mlp()
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    for level in range(depth):
        name, domain = (f"f{level - 1}", "local") if level else (body, "local" if body.startswith("f") else "")
        calls = [helper.make_node(name, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        model.functions.append(helper.make_function("local", f"f{level}", ["a"], ["c"], calls, opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = f"f{depth - 1}", "local"
    return model


def test_functions_are_written_out_and_cut_through(tmp_path: Path):
    result = compiled(tmp_path, in_functions(3))
    cut = [site for site in result.report.sites if site.left_alone is None]
    assert [(site.size, site.kept) for site in cut] == [(16, 8), (8, 4)]
    assert not onnx.load(tmp_path / "out.onnx").functions
    for wanted, found in zip(outputs(mlp(), samples()), outputs(in_functions(3), samples()), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_functions_that_explode_or_call_themselves(tmp_path: Path):
    with pytest.raises(match="too large"):
        compiled(tmp_path, in_functions(60))
    with pytest.raises(ModelError, match="rejected"):
        compiled(tmp_path, in_functions(2, body="f1"))


def test_what_cannot_be_kept_is_told(tmp_path: Path):
    model = mlp()
    model.training_info.add().initialization.name = "i"
    model.graph.quantization_annotation.add().tensor_name = "h0"
    warnings = compiled(tmp_path, model).report.warnings
    assert [w for w in warnings if "will not be in the compiled one" in w] == [
        "training information in the model will not be in the compiled one",
        "quantization annotations in the model will not be in the compiled one",
    ]


def test_models_without_inputs_have_nothing_to_cut():
    node = helper.make_node("Relu", ["c"], ["y"])
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph([node], "g", [], [value], [numpy_helper.from_array(np.ones(3, np.float32), "c")])
    with pytest.raises(GoalError, match="nothing in this model can be cut"):
        compile_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


@pytest.mark.parametrize(
    "fields",
    [{"keep": 2.0}, {"keep": {"h0": 0}}, {"keep": {"h0": float("nan")}}, {"fidelity": 0.0}, {"only": "["}, {"seed": -1}],
    ids=str,
)
def test_options_that_make_no_sense(fields: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(fields))):
        Options(**fields)


def with_a_sum() -> onnx.ModelProto:
    """An MLP one of whose units is the sum of two others, which are always on."""
    model = mlp()
    w, b = weight(model, "w0"), weight(model, "b0")
    b[:2] = 50.0
    w[:, 2], b[2] = w[:, 0] + w[:, 1], b[0] + b[1]
    return set_weight(set_weight(model, "w0", w), "b0", b)


def test_dependent_units_are_folded_without_loss_and_said_to_be(tmp_path: Path):
    result = compiled(tmp_path, with_a_sum(), Options(keep={"h0": 15}))
    (site,) = (site for site in result.report.sites if site.name == "h0")
    assert (site.kept, site.lossless) == (15, 1)
    assert set(result.plan.sites[0].lossless.tolist()) <= {0, 1, 2}
    assert result.report.fidelity is not None
    assert result.report.fidelity.agreement == 1.0
    wanted, found = (outputs(model, samples(seed=5))[0] for model in (with_a_sum(), tmp_path / "out.onnx"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.std())
