"""Certificates made again: what is changed, forged or missing is noticed; what is the same comes out the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import FEATURES, mlp, samples

from mscompile.audit.pipeline import audit
from mscompile.audit.replay import replay
from mscompile.audit.report import AuditReport
from mscompile.audit.setup import AuditOptions
from mscompile.cli import run
from mscompile.errors import VerificationError
from mscompile.options import Options
from mscompile.pipeline import compile_model

OPTIONS = AuditOptions(
    fidelity=0.8, table=64, swaps=(0.1, 0.5), conventions=("matched", "own"), metrics=("argmax", "cosine")
)
NAMES = ("dense.onnx", "small.onnx", "audit.npz", "small.audit.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of several claims, with all that explains it, and what it is of."""
    folder = tmp_path_factory.mktemp("certificate")
    onnx.save(mlp((FEATURES, 24, 16, 3)), folder / "dense.onnx")
    np.savez(folder / "dense.calib.npz", x=samples(400, seed=1))
    np.savez(folder / "audit.npz", x=samples(600, seed=2), label=np.zeros(600, dtype=np.int64))
    for name, keep in (("small", 0.7), ("other", 0.4)):
        compile_model(folder / "dense.onnx", None, folder / f"{name}.onnx", Options(keep=keep))
    dense, small, data, target = (folder / name for name in NAMES)
    target.write_text(audit(dense, small, data, OPTIONS, against=folder / "other.onnx", output=target).to_json())
    return folder


@pytest.fixture
def certificate(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged; the paths in it are still those of the original."""
    return Path(shutil.copytree(made, tmp_path / "copy")) / "small.audit.json"


def again(certificate: Path, **more: Any) -> Any:
    """Replay with the files beside the certificate."""
    dense, small, data = (certificate.with_name(name) for name in NAMES[:3])
    return replay(certificate, dense, small, data, **more)


def forge(certificate: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a certificate and give it the digest of what it says then."""
    content = AuditReport.parse(certificate.read_bytes(), "").model_dump(mode="json")
    edit(content)
    certificate.write_text(AuditReport.model_validate(content).sealed().to_json())


def test_all_of_it_comes_out_the_same(certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = again(certificate, against=certificate.with_name("other.onnx"))
    assert (found.differences, found.exact, found.left_out) == ((), True, ())
    assert list(found.claims) == found.report.claims
    assert found.report.explanation is not None
    assert found.report.counterexample is not None
    assert run(["audit", "--replay", str(certificate)]) == 0
    assert "every number is the same; the certificate says" in capsys.readouterr().out


def test_claims_alone(certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = again(certificate, explain=False)
    assert found.exact
    assert found.left_out == ("laws", "explanation", "counterexample")
    assert run(["audit", "--replay", str(certificate), "--no-explain"]) == 0
    assert "without laws, explanation, counterexample" in capsys.readouterr().out


def test_a_comparison_is_left_out_where_its_model_is_not_at_hand(certificate: Path) -> None:
    forge(certificate, lambda c: c["comparison"]["other"].update(path="/nowhere.onnx"))
    assert again(certificate).left_out == ("comparison",)
    with pytest.raises(VerificationError, match="not the one that was audited"):
        again(certificate, against=certificate.with_name("small.onnx"))


def test_a_plan_may_be_at_hand_or_not(certificate: Path) -> None:
    """Its check stands as recorded where it is not, and may be made anew where it was not."""
    plan = certificate.with_name("small.plan.json")
    content = plan.read_bytes()
    plan.unlink()
    assert again(certificate).exact
    plan.write_bytes(content)
    forge(certificate, lambda c: c.update(checks=[check for check in c["checks"] if check["name"] != "fold"]))
    assert again(certificate).exact


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0.1, 0.3, 0.6, 0.9])
def test_a_changed_byte_is_detected(certificate: Path, name: str, where: float) -> None:
    target = certificate.with_name(name)
    flip(target, int(where * target.stat().st_size))
    given = [str(certificate.with_name(name)) for name in NAMES[:3]]
    assert run(["audit", *given[:2], "--data", given[2], "--replay", str(certificate)]) in (2, 3, 4, 5)


def more(section: str, field: str, by: float = 0.01) -> Callable[[dict[str, Any]], None]:
    """An edit that adds to a number; sections are separated by dots."""

    def edit(content: dict[str, Any]) -> None:
        for key in section.split("."):
            content = content[int(key) if key.isdigit() else key]  # type: ignore[call-overload]
        content[field] += by

    return edit


FORGERIES = {
    "S": more("claims.0", "disagreements", 1),
    "n": more("claims.0", "trials", 1),
    "S of cosines": more("claims.1", "disagreements", 0.01),
    "claim's verdict": lambda c: c["claims"][0].update(verdict="refuted"),
    "bound": lambda c: c["claims"][0].update(iia_lower=0.999),
    "IIA": lambda c: c["claims"][0].update(iia=0.5),
    "a claim less": lambda c: c["claims"].pop(),
    "error probability": lambda c: c["asked"].update(delta=0.01),
    "data": more("data", "samples", 2),
    "units alike": more("tau.0", "alike", -0.1),
    "law": more("laws.3", "iia_matched"),
    "divergence": more("laws.3", "kl"),
    "at rest": more("plain", "agreement", -0.01),
    "accuracy": more("plain", "accuracy_compiled"),
    "effects": more("explanation", "effect_r2"),
    "floor": more("explanation.blame", "floor"),
    "fold": more("explanation.blame", "fold", -0.01),
    "unmapped": more("explanation.unmapped", "agreement"),
    "unmapped bound": more("explanation.unmapped", "agreement_lower"),
    "base": more("counterexample", "base", 1),
    "answer": lambda c: c["counterexample"]["compiled_answer"].__setitem__(0, 7.5),
    "units": lambda c: c["counterexample"].update(swapped={}),
    "comparison": more("comparison", "difference"),
    "paired test": lambda c: c["comparison"].update(verdict="better"),
    "scope": lambda c: c["scope"].pop(),
    "check": lambda c: c["checks"][0].update(passed=None),
    "reason": lambda c: c.update(because="It is perfect"),
}


@pytest.fixture(scope="module")
def remade(made: Path) -> tuple[AuditReport, AuditReport]:
    """The certificate, and what `replay` makes of it once more."""
    found: list[AuditReport] = []
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        from mscompile.audit import replay as module

        examine = module.examine
        context.setattr(module, "examine", lambda *a, **k: found.append(examine(*a, **k)) or found[0])
        report = replay(made / "small.audit.json").report
    return report, found[0]


@pytest.mark.parametrize("forged", FORGERIES)
def test_a_forged_certificate_is_detected(
    certificate: Path, remade: tuple[AuditReport, AuditReport], monkeypatch: pytest.MonkeyPatch, forged: str
) -> None:
    """Made anew with its digest, but with something else in it; what is found again does not depend on that."""
    forge(certificate, FORGERIES[forged])
    if forged != "error probability":
        monkeypatch.setattr("mscompile.audit.replay.examine", lambda *_, **__: remade[1])
    assert again(certificate).differences, forged


def test_a_forged_verdict_is_detected(certificate: Path) -> None:
    report = AuditReport.parse(certificate.read_bytes(), "")
    other = "undecided" if report.verdict != "undecided" else "certified"
    forge(certificate, lambda c: c.update(verdict=other))
    assert again(certificate).differences == (f"the verdict was {other}, is {report.verdict}: {report.because}",)


def test_rounding_is_told_from_change(certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another processor may give: not the same, but no difference."""
    forge(certificate, more("explanation.blame", "measured", 1e-8))
    found = again(certificate)
    assert (found.differences, found.exact) == ((), False)
    assert run(["audit", "--replay", str(certificate)]) == 0
    assert "the other numbers agree to rounding" in capsys.readouterr().out


def test_other_files_can_be_given(made: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    forge(moved / "small.audit.json", lambda c: c["dense"].update(path="/nowhere.onnx"))
    assert run(["audit", "--replay", str(moved / "small.audit.json")]) == 2
    files = [str(moved / name) for name in NAMES]
    assert run(["audit", files[0], files[1], "--data", files[2], "--replay", files[3]]) == 0
