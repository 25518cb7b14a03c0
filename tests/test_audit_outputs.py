"""Audits of several outputs: which are compared, by what, and what is claimed of them together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import FEATURES, mlp, samples, set_weight, weight

from mscompile.audit.pipeline import audit
from mscompile.audit.replay import replay
from mscompile.audit.report import SCHEMA_FILE, AuditReport
from mscompile.audit.setup import AuditOptions
from mscompile.cli import run
from mscompile.errors import UnsupportedError, UsageError
from mscompile.pages import audit_html, audit_markdown
from mscompile.verification.metrics import METRICS

OPTIONS = AuditOptions(fidelity=0.8, table=64, explain=False)


def headed(*, wide: int = 24, names: tuple[str, ...] = ("y", "class", "place", "top")) -> onnx.ModelProto:
    """Scores, their class as a whole number, two coordinates read from ``h1``, and the largest score of the whole batch."""
    nodes = [
        helper.make_node("ArgMax", ["y"], [names[1]], axis=1, keepdims=0),
        helper.make_node("MatMul", ["h1", "at"], [names[2]]),
        helper.make_node("ReduceMax", ["y"], [names[3]], keepdims=0),
    ]
    more = [
        helper.make_tensor_value_info(names[1], TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info(names[2], TensorProto.FLOAT, ["N", 2]),
        helper.make_tensor_value_info(names[3], TensorProto.FLOAT, []),
    ]
    model = mlp((FEATURES, wide, 16, 3), extra=nodes, outputs=more, annotated=False)
    at = np.random.default_rng(7).standard_normal((16, 2)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(at, "at"))
    for node in model.graph.node:  # the scores, too, under the name asked for
        for ends in (node.input, node.output):
            ends[:] = [names[0] if name == "y" else name for name in ends]
    model.graph.output[0].name = names[0]
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A network of four outputs, and a copy of which the coordinates alone are wrong now and then."""
    onnx.save(headed(), tmp_path / "dense.onnx")
    broken = headed()
    onnx.save(set_weight(broken, "at", weight(broken, "at") * np.float32(0.4)), tmp_path / "small.onnx")
    np.savez(tmp_path / "audit.npz", x=samples(600, seed=2), label=np.zeros(600, dtype=np.int64))
    return tmp_path


def found(at: Path, options: AuditOptions = OPTIONS, **more: Any) -> AuditReport:
    return audit(at / "dense.onnx", at / "small.onnx", at / "audit.npz", options, **more)


def verdicts(report: AuditReport) -> dict[tuple[str, ...], str]:
    return {tuple(claim.outputs): claim.verdict for claim in report.claims}


def test_every_output_with_a_result_per_sample_is_audited(pair: Path) -> None:
    report = found(pair, replace(OPTIONS, metrics=("place=distance", None)))
    assert [(o.dense, o.metrics) for o in report.outputs] == [
        ("y", ["argmax"]), ("class", ["equality"]), ("place", ["distance"]),
    ]  # fmt: skip
    assert verdicts(report) == {
        ("y", "class", "place"): "refuted", ("y",): "certified", ("class",): "certified", ("place",): "refuted",
    }  # fmt: skip
    assert report.verdict == "refuted"
    assert "all outputs" in report.because
    assert any("'top' is not compared: it is not one result per sample" in warning for warning in report.warnings)
    assert {claim.delta for claim in report.claims} == {0.05 / 4}
    (row, *_) = report.laws
    assert row.by_output.keys() == {"y", "class", "place"}
    assert row.iia_matched <= min(row.by_output.values())
    assert report.plain.by_output["y"] == report.plain.by_output["class"] == 1.0
    jsonschema.validate(json.loads(report.to_json()), json.loads(SCHEMA_FILE.read_text()))
    for page in (audit_html(report), audit_markdown(report)):
        assert "place" in page


def test_outputs_by_name_and_weight(pair: Path) -> None:
    one = found(pair, replace(OPTIONS, outputs={"y": 1.0}))
    assert (one.verdict, verdicts(one)) == ("certified", {("y",): "certified"})
    only = found(pair, replace(OPTIONS, outputs={"place": 1.0}, metrics=("distance",)))
    assert (only.verdict, only.claims[0].metric) == ("refuted", "distance")
    light = replace(OPTIONS, outputs={"y": 10.0, "place": 1.0}, metrics=("place=distance", "y=argmax"))
    report = found(pair, light)
    assert [output.weight for output in report.outputs] == [1.0, 0.1]
    # Together the coordinates count a tenth; by themselves they are wrong as before.
    assert verdicts(report) == {("y", "place"): "certified", ("y",): "certified", ("place",): "refuted"}


def test_the_loss_of_all_is_the_largest_of_each(pair: Path) -> None:
    """Trial by trial, against the metrics by hand."""
    from mscompile.audit.claims import stream
    from mscompile.audit.inputs import open_model
    from mscompile.audit.setup import prepare
    from mscompile.intake.data import read

    dense, compiled = (open_model(pair / f"{n}.onnx") for n in ("dense", "small"))
    options = replace(OPTIONS, outputs={"place": 2.0, "y": 1.0}, metrics=("distance",))
    setup = prepare(dense, compiled, read(pair / "audit.npz", dense.specs), options)
    together, place, y = setup.measures
    assert (together.outputs, together.metric) == (("place", "y"), "place: distance, y: distance")
    for trials in stream(setup, options, "one-site", 0.5, 128):
        losses = [METRICS["distance"].loss(trials.dense[o], trials.matched[o]) for o in ("place", "y")]
        assert np.array_equal(together.loss(trials.dense, trials.matched), np.maximum(losses[0], 0.5 * losses[1]))
        assert np.array_equal(place.loss(trials.dense, trials.matched), losses[0])
        assert np.array_equal(y.loss(trials.dense, trials.matched), losses[1])
        assert losses[0].min() > 0


def test_outputs_of_other_names_are_paired_by_place(pair: Path) -> None:
    onnx.save(headed(names=("a", "b", "c", "d")), pair / "small.onnx")
    report = found(pair)
    assert [(o.dense, o.compiled) for o in report.outputs] == [("y", "a"), ("class", "b"), ("place", "c")]
    assert report.verdict == "certified"
    onnx.save(headed(names=("y", "b", "c", "d")), pair / "small.onnx")
    report = found(pair)
    assert [o.dense for o in report.outputs] == ["y"]
    assert any("the compiled model has none of that name" in warning for warning in report.warnings)


@pytest.mark.parametrize("outputs", [{"nothing": 1.0}, {"top": 1.0}, {"y": -1.0}, {"y": float("inf")}])
def test_outputs_that_cannot_be_compared_are_refused(pair: Path, outputs: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        found(pair, replace(OPTIONS, outputs=outputs))


def test_models_without_an_output_to_compare(pair: Path) -> None:
    model = headed()
    kept = [output for output in model.graph.output if output.name == "top"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, pair / "dense.onnx")
    with pytest.raises(UnsupportedError, match="no output can be compared"):
        found(pair)


def test_a_counterexample_shows_the_output_that_differs(pair: Path) -> None:
    options = replace(OPTIONS, explain=True, metrics=("place=distance", None), swaps=(0.5,))
    report = found(pair, options, output=pair / "small.audit.json")
    assert report.counterexample is not None
    assert report.counterexample.outputs == ("place", "place")
    assert len(report.counterexample.dense_answer) == 2
    assert report.explanation is not None
    assert report.explanation.output == "y"
    assert "the answers at <code>place</code> differ" in audit_html(report)
    assert "Most of" not in audit_html(report)  # nothing differs at the output that is explained


def test_another_model_is_compared_on_the_same_outputs(pair: Path) -> None:
    onnx.save(headed(), pair / "other.onnx")
    c = found(pair, replace(OPTIONS, metrics=("place=distance", None)), against=pair / "other.onnx").comparison
    assert c is not None
    assert (c.iia_other, c.verdict, c.against_other) == (1.0, "better", 0)


def test_the_command_and_replay(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(pair / "dense.onnx"), str(pair / "small.onnx"), "--data", str(pair / "audit.npz"), "--fidelity", "0.8"]
    several = ["--output", "y=10", "--output", "place", "--metric", "place=distance", "--metric", "argmax"]
    assert run(["audit", *given, *several, "--table", "64"]) == 5
    shown = capsys.readouterr().err
    assert "place: distance" in shown
    certificate = pair / "small.audit.json"
    report = AuditReport.parse(certificate.read_bytes(), "")
    assert report.asked.outputs == {"y": 10.0, "place": 1.0}
    again = replay(certificate)
    assert (again.differences, again.exact, again.left_out) == ((), True, ())
    assert run(["audit", *given, "--output", "y", "--force", "-q"]) == 0
    assert run(["audit", *given, "--output", "y", "--output", "y", "--force"]) == 2
    assert run(["audit", *given, "--output", "none", "--force"]) == 2


def test_what_goes_with_every_sample_is_no_sample(tmp_path: Path) -> None:
    """A state of one row as the first input, and what becomes of it as an output: neither counts samples."""
    nodes = [
        helper.make_node("Add", ["state", "state"], ["next"]),
        helper.make_node("ReduceSum", ["state"], ["sum"], keepdims=0),
        helper.make_node("Add", ["y", "sum"], ["z"]),
    ]
    model = mlp((FEATURES, 12, 3), extra=nodes, annotated=False)
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 4])
    inputs = [state, *model.graph.input]
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(inputs)
    model.graph.output.append(helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 4]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 3]))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "dense.onnx")
    onnx.save(onnx.load(tmp_path / "dense.onnx"), tmp_path / "small.onnx")
    np.savez(tmp_path / "audit.npz", x=samples(300, seed=2), state=np.ones((1, 4), dtype=np.float32))
    report = found(tmp_path)
    assert (report.verdict, [output.dense for output in report.outputs]) == ("certified", ["z"])
    assert report.batch_size == OPTIONS.batch_size
    assert any("'next' is not compared" in warning for warning in report.warnings)
    assert all(check.passed is not False for check in report.checks), report.checks
