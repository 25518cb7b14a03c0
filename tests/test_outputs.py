"""Where commands write, what they never write over, and that no option is passed over in silence."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import KEEP, Run, command, refused, written
from small_models import FEATURES, mlp, samples, with_dead_units

from mscompile.runs import limits, locks

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture
def made(run: Run, tmp_path: Path) -> Path:
    """A model with its weights beside it, all that the commands make of it, and data to audit on."""
    model = mlp((FEATURES, 64, 32, 3))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    np.savez(tmp_path / "m.calib.npz", x=samples(200, seed=1))
    np.savez(tmp_path / "audit.npz", x=samples(400, seed=2))
    for arguments in (
        ("m.onnx", *KEEP),
        ("calibrate", "m.onnx"),
        ("plan", "m.onnx", "m.statistics.safetensors", *KEEP),
        ("audit", "m.onnx", "m.ms.onnx", "--data", "audit.npz", "--fidelity", "0.5"),
    ):
        ran = run(*arguments)
        assert ran.code == 0, ran.err
    return tmp_path


COMPILE = ("m.onnx", *KEEP)
CALIBRATE = ("calibrate", "m.onnx")
PLAN = ("plan", "m.onnx", "m.statistics.safetensors", *KEEP)
APPLY = ("apply", "m.onnx", "m.plan.json")
AUDIT = ("audit", "m.onnx", "m.ms.onnx", "--data", "audit.npz")
MODEL, WEIGHTS, FOUND = "m.onnx", "m.bin", "m.calib.npz"
READ = [
    *[(COMPILE, option, file) for option in ("-o", "--report", "--html") for file in (MODEL, WEIGHTS, FOUND)],
    *[(CALIBRATE, "-o", file) for file in (MODEL, WEIGHTS, FOUND)],
    *[((*CALIBRATE, "--check", "2"), "--html", file) for file in (MODEL, FOUND)],
    *[(PLAN, "-o", file) for file in (MODEL, WEIGHTS, "m.statistics.safetensors")],
    *[(APPLY, "-o", file) for file in (MODEL, WEIGHTS, FOUND, "m.plan.json")],
    *[(AUDIT, "-o", file) for file in (MODEL, "m.ms.onnx", "audit.npz", "m.ms.plan.json", "m.ms.report.json")],
    (AUDIT, "--html", "m.ms.plan.json"),
    (("report", "m.ms.audit.json"), "--html", "m.ms.audit.json"),
]


def test_what_is_read_is_never_written_over(run: Run, made: Path):
    before = written(made)
    for arguments, option, file in READ:
        refused(run(*arguments, option, file, "--force"), 2, "is an input, too", file)
    assert written(made) == before


def test_weights_that_lie_outside_stay_outside(run: Run, made: Path):
    assert run(*APPLY, "-o", "applied.onnx").code == 0
    (data,) = made.glob("applied.onnx.*.data")
    assert data.stat().st_size > 2000


def test_data_that_a_copy_names_stays(run: Run, made: Path):
    """The copy of a compiled model reads the data file of the one it was copied from, which is written again."""
    copy = made / "copy.onnx"
    copy.write_bytes((made / "m.ms.onnx").read_bytes())
    (named,) = made.glob("m.ms.onnx.*.data")
    ran = run(copy.name, *KEEP, "--calib", "m.calib.npz", "-o", "m.ms.onnx", "--force")
    assert ran.code == 0, ran.err
    assert named.exists()
    assert run("inspect", copy.name).code == 0


def test_the_report_goes_where_it_is_asked_to(run: Run, small: Path):
    (small.parent / "sub").mkdir()
    before = set(written(small.parent))
    ran = run(small.name, *KEEP, "--report", "sub/r.json", "--html", "p.html")
    assert ran.code == 0, ran.err
    assert set(written(small.parent)) - before == {"m.ms.onnx", "m.ms.plan.json", "sub/r.json", "p.html"}
    assert "beside it: m.ms.plan.json, sub/r.json, p.html" in ran.err
    assert json.loads((small.parent / "sub/r.json").read_bytes())["goal"] == "--keep 0.5"
    refused(run(small.name, *KEEP, "-o", "n.onnx", "--report", "sub/r.json"), 2, "exists already", "sub/r.json")
    after = written(small.parent)
    assert run(small.name, *KEEP, "-o", "n.onnx", "--report", "n.json", "--html", "n.html", "--dry-run").code == 0
    assert written(small.parent) == after


@pytest.mark.parametrize("options", [("--html", "a"), ("--report", "a"), ("--report", "b", "--html", "b")])
def test_two_outputs_are_two_files(run: Run, small: Path, options: tuple[str, ...]):
    refused(run(small.name, *KEEP, "-o", "a", *options), 2, "two outputs are one file")


def test_standard_output_takes_no_model(run: Run, small: Path):
    refused(run(small.name, *KEEP, "-o", "-"), 2, "cannot be standard output", "-o")
    assert not (small.parent / "-").exists()


def test_a_folder_where_nothing_may_be_written_is_refused_first(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locks, "acquire", fail)
    monkeypatch.setattr("mscompile.pipeline._compile", lambda *_: pytest.fail("it was compiled"))
    refused(run(small.name, *KEEP), 8, "Permission denied", "m.ms.onnx")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(small: Path, closed: str):
    line = f"exec '{sys.executable}' -m mscompile m.onnx --keep 0.5 {closed}"
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[2])}
    ran = subprocess.run(["/bin/sh", "-c", line], cwd=small.parent, env=environment, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    onnx.checker.check_model(small.parent / "m.ms.onnx")


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_that_change_nothing_are_named(run: Run, small: Path):
    idle = ("--selection", "joint", "--probes", "4", "--anchors", "4")
    ran = run(small, *KEEP, "--dry-run", "--objective", "variance", *idle)
    assert ran.code == 0, ran.err
    for name in ("selection", "probes", "anchors"):
        assert f"warning: --{name} changes nothing with --objective variance --replacement affine" in ran.err
    assert "changes nothing" not in run(small, *KEEP, "--dry-run", "--objective", "variance").err
    assert "changes nothing" not in run(small, *KEEP, "--dry-run", "--probes", "2").err
    assert "changes nothing" not in run(small, *KEEP, "--dry-run", "--replacement", "constant", "--anchors", "2").err


def test_a_pattern_that_freezes_nothing(run: Run, small: Path):
    refused(run(small, *KEEP, "--freeze", "h_0"), 2, "--freeze h_0", "h0, h1", "inspect")


def test_data_without_a_name(run: Run, small: Path):
    refused(run(small, *KEEP, "--calib", ""), 2, "no data is named")


@pytest.mark.parametrize("goal", [KEEP, ("--params", "0.5"), ("--keep", "h0=4")])
def test_without_data_no_size_is_pursued(run: Run, tmp_path: Path, goal: tuple[str, ...]):
    onnx.save(with_dead_units(3), tmp_path / "m.onnx")
    refused(run("m.onnx", *goal), 6, "without data the goal", " ".join(goal), "3 units constant", "import numpy")
    assert set(written(tmp_path)) == {"m.onnx"}


def test_a_certificate_is_made_again_as_it_says(run: Run, made: Path):
    replay = ("audit", "--replay", "m.ms.audit.json")
    refused(run(*replay, "--fidelity", "0.9", "-o", "x.json"), 2, "--fidelity, --out")
    refused(run(*replay, "--html", "x.html"), 2, "--html")
    ran = run(*replay, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert (found["reproduced"], found["differences"], found["verdict"]) == (True, [], "certified")
    assert found["claims"][0]["trials"] > 0
    assert not {"x.json", "x.html"} & set(written(made))


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((400, 1), dtype=np.int64), "no accuracy is measured: the labels have the shape (samples, 1)"),
        (np.full(400, 7), "160 of 160 labels are none of the classes 0 to 2"),
        (np.zeros(400, dtype=np.int64), None),
    ],
)
def test_labels_that_do_not_fit(run: Run, small: Path, labels: np.ndarray, words: str | None):
    np.savez(small.parent / "m.calib.npz", x=samples(400), label=labels)
    ran = run(small, *KEEP, "--no-recalibrate")
    assert ran.code == 0, ran.err
    assert (words or "accuracy") in ran.err
    assert ("warning: no accuracy" in ran.err or "none of the classes" in ran.err) == (words is not None)


def test_labels_that_do_not_fit_in_an_audit(run: Run, made: Path):
    np.savez(made / "audit.npz", x=samples(400, seed=2), label=np.zeros((400, 1)))
    ran = run(*AUDIT, "--fidelity", "0.5", "-o", "b.json")
    assert ran.code == 0, ran.err
    assert "warning: no accuracy is measured" in ran.err


def test_what_was_not_cut_is_not_called_smaller(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mscompile.reporting.measure_latency", lambda *_: (1.0, 2.0))
    assert "smaller but not faster" not in run(small, "--keep", "1", "--dry-run").err
    said = run(small, *KEEP, "--dry-run").err
    assert "smaller but not faster on this machine\n" in said  # and nothing of convolutions: it has none


def test_limits_that_are_passed_at_once_leave_no_lock(small: Path):
    with command(small.name, *KEEP, "--memory-limit", "1MB", cwd=small.parent) as process:
        _, said = process.communicate()
    assert process.returncode == 8
    assert "--memory-limit 1 MB" in said
    assert {path.name for path in small.parent.iterdir()} == {"m.onnx", "m.calib.npz"}


def test_small_sizes_are_not_nothing():
    assert [limits.gigabytes(size) for size in (1_048_576, 2_150_000_000)] == ["1.05 MB", "2.15 GB"]
