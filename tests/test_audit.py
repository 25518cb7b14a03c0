"""Audits: verdicts, planted defects, independence, replay. The pairs are small networks compiled here, or made by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from small_models import FEATURES, mlp, samples, set_weight, weight

from mscompile.audit.pipeline import audit
from mscompile.audit.report import SCHEMA_FILE, AuditReport, schema
from mscompile.audit.setup import AuditOptions
from mscompile.audit.statement import make_statement
from mscompile.cli import run
from mscompile.errors import DataError, UnsupportedError, UsageError, VerificationError
from mscompile.options import Options
from mscompile.pipeline import compile_model
from mscompile.verification.certificate import risk_bound
from mscompile.verification.metrics import METRICS, Metric

OPTIONS = AuditOptions(fidelity=0.8, table=64, explain=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network, one compiled from it, and data that took no part."""
    made = tmp_path_factory.mktemp("pair")
    onnx.save(mlp((FEATURES, 24, 16, 3)), made / "dense.onnx")
    np.savez(made / "dense.calib.npz", x=samples(400, seed=1))
    np.savez(made / "audit.npz", x=samples(600, seed=2), label=np.zeros(600, dtype=np.int64))
    compile_model(made / "dense.onnx", None, made / "small.onnx", Options(keep=0.7))
    return made


@pytest.fixture
def pair(folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "pair"))


def found(at: Path, options: AuditOptions = OPTIONS, data: Any = None, **more: Any) -> AuditReport:
    return audit(at / "dense.onnx", at / "small.onnx", data or at / "audit.npz", options, **more)


def change(path: Path, edit: Any) -> None:
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_certified(folder: Path) -> None:
    report = found(folder)
    assert (report.verdict, report.tau_origin, report.data.disjoint) == ("certified", "metadata", "yes")
    assert all(check.passed for check in report.checks), report.checks
    (claim,) = report.claims
    assert claim.iia_lower == 1 - risk_bound(claim.disagreements, claim.trials, claim.delta) >= 0.8
    assert claim.hoeffding_lower < claim.betting_lower < claim.iia_lower
    assert {(row.law, row.swap) for row in report.laws} >= {("one-site", 0.05), ("all-sites", 1.0)}
    jsonschema.validate(json.loads(report.to_json()), json.loads(SCHEMA_FILE.read_text()))


def test_the_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == schema()


def test_more_than_is_true_is_refuted_and_less_data_leaves_it_open(folder: Path) -> None:
    strong = replace(OPTIONS, fidelity=0.97, swaps=(1.0,), laws=("one-site",))
    assert found(folder, strong).verdict == "refuted"
    few = found(folder, replace(OPTIONS, trials=5))
    assert (few.verdict, few.claims[0].trials) == ("undecided", 5)


def test_claims_share_their_error_probability(folder: Path) -> None:
    report = found(folder, replace(OPTIONS, swaps=(0.1, 0.2), conventions=("matched", "own"), metrics=("argmax", "kl")))
    assert len(report.claims) == 8
    assert {claim.delta for claim in report.claims} == {0.05 / 8}
    assert {(c.swap, c.convention, c.metric) for c in report.claims} == {
        (p, v, m) for p in (0.1, 0.2) for v in ("matched", "own") for m in ("argmax", "kl")
    }


def test_what_is_certified_does_not_depend_on_the_batch_size(folder: Path) -> None:
    reports = [found(folder, replace(OPTIONS, batch_size=size, table=0)) for size in (7, 64)]
    assert reports[0].claims == reports[1].claims


def test_models_of_a_fixed_batch_size(tmp_path: Path) -> None:
    onnx.save(mlp((FEATURES, 12, 3), batch=8), tmp_path / "dense.onnx")
    shutil.copy(tmp_path / "dense.onnx", tmp_path / "small.onnx")
    np.savez(tmp_path / "audit.npz", x=samples(408, seed=2))
    report = found(tmp_path, replace(OPTIONS, explain=True))
    assert (report.verdict, report.batch_size) == ("certified", 8)


def test_metrics_of_a_user(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("import numpy as np\ndef far(a, b):\n    return np.minimum(np.abs(a - b).max(axis=1), 1)\n")
    report = found(folder, replace(OPTIONS, fidelity=0.5, metrics=(f"{script}:far",)))
    assert report.claims[0].metric.startswith(f"{script}:far#")
    assert 0 < report.claims[0].disagreements < report.claims[0].trials
    for bad in ("nothing", f"{script}:near"):
        with pytest.raises(UsageError, match="no such metric"):
            found(folder, replace(OPTIONS, metrics=(bad,)))
    too_large = Metric("large", lambda a, _: np.full(len(a), 2.0), classes=False)
    with pytest.raises(UsageError, match="cannot be used"):
        found(folder, replace(OPTIONS, metrics=(too_large,)))


def test_two_compiled_models_compared(folder: Path, tmp_path: Path) -> None:
    compile_model(folder / "dense.onnx", None, tmp_path / "smaller.onnx", Options(keep=0.15))
    report = found(folder, replace(OPTIONS, swaps=(0.3,)), against=tmp_path / "smaller.onnx")
    c = report.comparison
    assert c is not None
    assert c.difference == pytest.approx(c.iia - c.iia_other)
    assert 0 < c.difference_lower < c.difference < c.difference_upper
    same = found(folder, OPTIONS, against=folder / "small.onnx").comparison
    assert same is not None
    assert same.difference == 0
    assert same.difference_lower < 0 < same.difference_upper


# --- planted defects --------------------------------------------------------------------------------------------------


def scaled(model: onnx.ModelProto) -> None:
    w = weight(model, "w1")
    w[:, 1] *= 1.01
    set_weight(model, "w1", w)


def dropped(model: onnx.ModelProto) -> None:
    w = weight(model, "w0")
    unit = int(np.abs(weight(model, "w1")).sum(axis=1).argmax())
    w[:, unit] = 0
    set_weight(model, "w0", w)


ALONE = replace(OPTIONS, provenance=False)
"""By trials alone, as a file that nobody vouches for."""


@pytest.mark.parametrize("defect", [scaled, dropped])
def test_weights_that_are_not_those_of_the_plan_are_refuted(pair: Path, defect: Any) -> None:
    change(pair / "small.onnx", defect)
    report = found(pair, ALONE, plan=pair / "small.plan.json")
    assert report.verdict == "refuted"
    assert "from the dense one under the plan" in report.because


def test_without_a_plan_a_dropped_unit_is_refuted_by_its_answers(pair: Path) -> None:
    goal = replace(ALONE, fidelity=0.9, swaps=(0.02,))
    assert found(pair, goal).verdict == "certified"
    for _ in range(3):
        change(pair / "small.onnx", dropped)
        change(pair / "small.onnx", lambda m: set_weight(m, "w1", np.roll(weight(m, "w1"), 1, axis=0)))
    assert found(pair, goal).verdict == "refuted"


def tampered(model: onnx.ModelProto, key: str, edit: Any) -> None:
    for entry in model.metadata_props:
        if entry.key == f"pkg.mscompile.{key}":
            entry.value = json.dumps(edit(json.loads(entry.value))) if key in ("tau", "channels") else edit(entry.value)


def shuffled(model: onnx.ModelProto) -> None:
    tampered(model, "channels", lambda c: {name: (axis, left[1:] + left[:1]) for name, (axis, left) in c.items()})


def without(key: str) -> Any:
    def edit(model: onnx.ModelProto) -> None:
        left = [entry for entry in model.metadata_props if entry.key != f"pkg.mscompile.{key}"]
        del model.metadata_props[:]
        model.metadata_props.extend(left)

    return edit


@pytest.mark.parametrize(
    ("defect", "part"),
    [
        (scaled, "weights"),
        (dropped, "weights"),
        (shuffled, "metadata"),
        (lambda m: tampered(m, "tau", lambda tau: {n: kept[1:] for n, kept in tau.items()}), "metadata"),
        (lambda m: tampered(m, "tau", lambda tau: {"nowhere": [0], **tau}), "metadata"),
        (lambda m: tampered(m, "version", lambda _: "9.9"), "metadata"),
        (without("tau"), "metadata"),
        (without("weights_sha256"), "weights"),
        (lambda m: setattr(m.graph.node[1], "op_type", "Selu"), "graph"),
    ],
)
def test_a_file_that_was_changed_since_is_refuted(
    pair: Path, defect: Any, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a plan at hand, by the digests in its metadata."""
    (pair / "small.plan.json").unlink()
    change(pair / "small.onnx", defect)
    given = [str(pair / "dense.onnx"), str(pair / "small.onnx"), "--data", str(pair / "audit.npz")]
    assert run(["audit", *given, "--table", "0", "--no-explain", "-q"]) == 5
    shown = capsys.readouterr()
    assert f"its {part} are not what that wrote" in " ".join((shown.out + shown.err).split())


def test_what_does_not_change_a_model_is_no_change(pair: Path) -> None:
    model = onnx.load(pair / "small.onnx")
    for node in model.graph.node:
        node.name, node.doc_string = f"another {node.name}", "documented"
    model.producer_name = "somebody"
    onnx.helper.set_model_props(model, {**{e.key: e.value for e in model.metadata_props}, "owner": "somebody"})
    del model.graph.value_info[:]
    order = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(order)
    onnx.save(model, pair / "small.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    report = found(pair)
    assert report.verdict == "certified"
    assert report.checks[0].passed
    assert report.checks[0].detail.startswith("weights, graph and metadata are those")


def test_a_file_of_somebody_else_is_judged_by_trials_alone(pair: Path) -> None:
    model = onnx.load(pair / "small.onnx")
    del model.metadata_props[:]
    scaled(model)
    onnx.save(model, pair / "small.onnx")
    report = found(pair, plan=pair / "small.plan.json", options=ALONE)
    assert report.verdict == "refuted"  # the plan that is given is held to
    (pair / "small.plan.json").unlink()
    report = found(pair)
    assert (report.verdict, report.checks[0].passed) == ("certified", None)
    assert any("by trials alone" in sentence for sentence in report.scope)


def test_shuffled_indices_are_refuted_by_trials(pair: Path) -> None:
    change(pair / "small.onnx", shuffled)
    assert found(pair, replace(ALONE, swaps=(0.5,))).verdict == "refuted"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tau: {**tau, "h0": [999]},
        lambda tau: {"nowhere": [0], **tau},
        lambda tau: {name: [kept[0], *kept] for name, kept in tau.items()},
        lambda _: [1, 2],
    ],
)
def test_metadata_that_cannot_be_is_refused(pair: Path, edit: Any) -> None:
    change(pair / "small.onnx", lambda m: tampered(m, "tau", edit))
    with pytest.raises(UsageError, match=r"tau|metadata"):
        found(pair, ALONE)
    with pytest.raises(VerificationError, match=r"tau|metadata") as refuted:
        found(pair)
    assert "its metadata are not what that wrote" in refuted.value.why


def test_a_stale_file_is_refuted(pair: Path) -> None:
    change(pair / "dense.onnx", lambda m: set_weight(m, "w0", weight(m, "w0") * 1.001))
    with pytest.raises(VerificationError, match="another dense model"):
        found(pair)
    given = [str(pair / "dense.onnx"), str(pair / "small.onnx"), "--data", str(pair / "audit.npz")]
    assert run(["audit", *given]) == 5


def test_another_plan_is_refuted(pair: Path, tmp_path: Path) -> None:
    compile_model(pair / "dense.onnx", None, tmp_path / "other.onnx", Options(keep=0.5))
    with pytest.raises(VerificationError, match="plan is not of this pair"):
        found(pair, plan=tmp_path / "other.plan.json")
    given = [str(pair / "dense.onnx"), str(pair / "small.onnx"), "--data", str(pair / "audit.npz")]
    assert run(["audit", *given, "--plan", str(tmp_path / "other.plan.json")]) == 5
    plan = json.loads((pair / "small.plan.json").read_text())
    (tmp_path / "foreign.json").write_text(json.dumps({**plan, "model_sha256": "0" * 64}))
    with pytest.raises(VerificationError, match="plan is not of this pair"):
        found(pair, plan=tmp_path / "foreign.json")
    shutil.copy(tmp_path / "other.plan.json", pair / "small.plan.json")
    report = found(pair)
    assert any("is not used" in warning for warning in report.warnings)
    assert found(pair, plan=None).tau_origin == "metadata"


def test_data_that_took_part_certifies_nothing(pair: Path) -> None:
    mixed = {"x": np.concatenate([samples(300, seed=2), samples(400, seed=1)[:5]])}
    with pytest.raises(DataError, match="took part") as refused:
        found(pair, data=mixed)
    assert "5 of 305" in refused.value.why
    np.savez(pair / "mixed.npz", **mixed)
    given = [str(pair / "dense.onnx"), str(pair / "small.onnx"), "--data", str(pair / "mixed.npz")]
    assert run(["audit", *given]) == 4
    dropping = found(pair, replace(OPTIONS, shared="drop"), data=mixed)
    assert (dropping.verdict, dropping.data.samples, dropping.data.left_out) == ("certified", 300, [300, 301, 302, 303, 304])
    keeping = found(pair, replace(OPTIONS, shared="keep"), data=mixed)
    assert (keeping.verdict, keeping.data.disjoint) == ("undecided", "no")
    assert any("took part" in sentence for sentence in keeping.scope)
    (pair / "small.report.json").unlink()
    unknown = found(pair, data=mixed)
    assert (unknown.verdict, unknown.data.disjoint) == ("certified", "unknown")
    assert any("not known" in sentence for sentence in unknown.scope)
    with pytest.raises(DataError, match="took part"):
        found(pair, data=mixed, calib=pair / "dense.calib.npz")


def test_random_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [
        onnx.helper.make_node("RandomNormalLike", ["y"], ["n"], scale=0.1),
        onnx.helper.make_node("Add", ["y", "n"], ["z"]),
    ]
    model = mlp(extra=noise)
    model.graph.output[0].name = "z"
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "dense.onnx")
    shutil.copy(tmp_path / "dense.onnx", tmp_path / "small.onnx")
    with pytest.raises(UnsupportedError, match="same result each time"):
        found(tmp_path, data={"x": samples(100)})
    monkeypatch.setattr("mscompile.intake.loading.check_operators", lambda *_: None)  # were one not known to be random
    with pytest.raises(VerificationError, match="patch changes the dense model"):
        found(tmp_path, data={"x": samples(100)})


# --- pairs that were not compiled here --------------------------------------------------------------------------------


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in 16 bits inside, float32 at its ends."""
    weights = {t.name for t in model.graph.initializer}
    for tensor in list(model.graph.initializer):
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        node.input[:] = ["x16" if name == "x" else name for name in node.input]
        node.output[:] = ["y16" if name == "y" else name for name in node.output]
    first = onnx.helper.make_node("Cast", ["x"], ["x16"], to=onnx.TensorProto.FLOAT16)
    last = onnx.helper.make_node("Cast", ["y16"], ["y"], to=onnx.TensorProto.FLOAT)
    nodes = [first, *model.graph.node, last]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    assert weights
    return onnx.shape_inference.infer_shapes(model)


def quantised(source: Path, target: Path) -> None:
    """Dynamic quantisation of weights and activations, as onnxruntime does it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


@pytest.mark.parametrize("made", ["16 bits", "8 bits", "16-bit input"])
def test_other_precisions(tmp_path: Path, made: str) -> None:
    onnx.save(mlp((FEATURES, 24, 16, 3)), tmp_path / "dense.onnx")
    if made == "8 bits":
        quantised(tmp_path / "dense.onnx", tmp_path / "small.onnx")
    elif made == "16 bits":
        onnx.save(halved(mlp((FEATURES, 24, 16, 3))), tmp_path / "small.onnx")
    else:
        onnx.save(mlp((FEATURES, 24, 16, 3), dtype=np.float16), tmp_path / "small.onnx")
    report = found(tmp_path, data={"x": samples(300, seed=2)})
    assert (report.verdict, report.tau_origin) == ("certified", "weights")
    assert [(site.dense, len(site.dense_channels)) for site in report.tau] == [("h0", 24), ("h1", 16)]
    assert all(0.98 < site.alike < 1 for site in report.tau if site.alike is not None)
    assert (report.batch_size == 1) == (made == "8 bits")
    assert any("rounded for it" in warning for warning in report.warnings) == (made == "16-bit input")


def test_tau_by_hand(folder: Path, tmp_path: Path) -> None:
    report = found(folder)
    sites = [
        {"dense": s.dense, "compiled": s.compiled, "dense_axis": -1, "compiled_axis": -1,
         "dense_channels": s.dense_channels, "compiled_channels": s.compiled_channels}
        for s in report.tau
    ]  # fmt: skip
    given = tmp_path / "tau.json"
    given.write_text(json.dumps({"sites": sites}))
    same = found(folder, tau=given)
    assert (same.tau_origin, same.claims) == ("given", report.claims)
    given.write_text(json.dumps({site.dense: site.dense_channels for site in report.tau}))
    assert found(folder, tau=given).claims == report.claims
    for wrong in ("nothing", "{}", json.dumps({"h0": [0, 0]}), json.dumps({"sites": [{**sites[0], "dense_channels": [1]}]})):
        given.write_text(wrong)
        with pytest.raises(UsageError, match="tau"):
            found(folder, tau=given)


# --- independence -----------------------------------------------------------------------------------------------------


def test_the_verdict_shares_no_rewriting_code_with_the_compiler(folder: Path) -> None:
    code = (
        "import sys\nfrom mscompile.audit.pipeline import audit\nfrom mscompile.audit.setup import AuditOptions\n"
        f"r = audit({str(folder / 'dense.onnx')!r}, {str(folder / 'small.onnx')!r}, {str(folder / 'audit.npz')!r},"
        " AuditOptions(fidelity=0.8, explain=False, table=0))\nassert r.verdict == 'certified'\n"
        "banned = ('mscompile.passes', 'mscompile.rewrite', 'mscompile.planning.replacements', 'torch')\n"
        "used = [m for m in sys.modules if m.startswith(banned)]\n"
        "assert not used, used"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- statements, explanations -----------------------------------------------------------------------------------------


def test_statement(folder: Path) -> None:
    import datetime

    report = found(folder)
    made = make_statement(report, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
    digests = {s["name"]: s["digest"]["sha256"] for s in made["subject"]}
    assert digests == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("dense.onnx", "small.onnx")}
    (claim,) = made["predicate"]["claims"]
    assert (claim["comparator"], claim["threshold"], claim["passed"]) == (">=", "0.8", True)
    assert made["predicate"]["evaluatedAt"] == "2026-01-02T00:00:00Z"


def test_explanation_and_counterexample(folder: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, swaps=(0.5,), explain=True)
    report = found(folder, options, output=tmp_path / "small.audit.json")
    explained, case = report.explanation, report.counterexample
    assert explained is not None
    assert case is not None
    blame = explained.blame
    assert blame.floor == pytest.approx((blame.set or 0) + (blame.law or 0))
    assert blame.measured == pytest.approx((blame.floor or 0) + (blame.fold or 0))
    assert (blame.floor or 0) > 0
    assert explained.unmapped is not None
    assert explained.unmapped.agreement_lower < explained.unmapped.agreement < explained.unmapped.agreement_upper
    units = sum(len(channels) for channels in case.swapped.values())
    assert 0 < units <= case.swapped_before
    ran = subprocess.run(
        [sys.executable, "replay.py"], cwd=tmp_path / str(case.folder), capture_output=True, text=True, check=True
    )
    answers = [line.split()[:2] for line in ran.stdout.splitlines() if line.startswith(("dense", "compiled"))]
    assert [answer[1] for answer in answers] == [str(int(np.argmax(a))) for a in (case.dense_answer, case.compiled_answer)]
    assert answers[0][1] != answers[1][1]


def test_a_counterexample_needs_all_its_units(folder: Path) -> None:
    """Taking out any one unit of a shrunk mask makes the models agree."""
    from mscompile.audit.counterexample import find
    from mscompile.audit.inputs import open_model
    from mscompile.audit.setup import prepare
    from mscompile.intake.data import read

    dense, compiled = (open_model(folder / f"{n}.onnx") for n in ("dense", "small"))
    setup = prepare(dense, compiled, read(folder / "audit.npz", dense.specs), OPTIONS)
    case = find(setup, replace(OPTIONS, swaps=(0.5,)))
    assert case is not None
    base, source = np.array([case.report.base]), np.array([case.report.source])

    def disagree(masks: Any) -> bool:
        trials = setup.engine.interchange(setup.samples, base, source, masks)
        return bool(METRICS["argmax"].loss(trials.dense["y"], trials.matched["y"])[0])

    assert disagree(case.masks)
    for site, mask in enumerate(case.masks):
        for unit in np.flatnonzero(mask[0]):
            less = [m.copy() for m in case.masks]
            less[site][0, unit] = False
            assert not disagree(less)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(pair / name) for name in ("dense.onnx", "small.onnx")]
    data = ["--data", str(pair / "audit.npz"), "--table", "64"]
    extra = ["--html", str(pair / "a.html"), "--markdown", str(pair / "a.md"), "--statement", str(pair / "a.intoto.json")]
    assert run(["audit", *given, *data, "--fidelity", "0.8", *extra]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("certified: IIA is at least 0.8")
    assert "one-site" in shown.err
    assert (pair / "small.audit.json").is_file()
    assert run(["audit", *given, *data, "--fidelity", "0.8"]) == 2  # never overwritten
    assert run(["audit", *given, *data, "--fidelity", "0.97", "--swap", "1", "--force", "-q"]) == 5
    assert run(["audit", *given, *data, "--trials", "5", "--force", "-q"]) == 6
    assert run(["audit", *given]) == 2
    capsys.readouterr()
    assert run(["audit", *given, *data, "--force", "--json", "--no-explain"]) in (0, 5, 6)
    assert json.loads(capsys.readouterr().out)["kind"] == "audit"
    assert run(["audit", "--replay", str(pair / "small.audit.json")]) == 0
    assert capsys.readouterr().out.startswith("reproduced: S = ")
