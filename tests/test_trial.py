"""Models are tried in a child process first; providers are taken as asked for or refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from small_models import mlp, samples

from mscompile import cli, providers, runtime
from mscompile.errors import ModelError, ResourceError, UnsupportedError
from mscompile.intake import trial
from mscompile.intake.loading import load_model

SERVER = "from mscompile.intake import loading, trial; import os, time; loading.load_model = {}; trial.serve()"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[trial.Trials]:
    """Trials of their own, with little time and memory."""
    own = trial.Trials()
    monkeypatch.setattr(trial, "TRIALS", own)
    monkeypatch.setattr(trial, "SECONDS", 5.0)
    monkeypatch.setattr(trial, "MEMORY", 1 << 29)
    yield own
    if own.server is not None:
        own.server.stop()


def test_a_sound_model_is_taken_in(model: Path, trials: trial.Trials):
    trials.begin()
    _, sha256 = load_model(model)
    start = time.perf_counter()
    assert load_model(model)[1] == sha256
    assert time.perf_counter() - start < 5.0
    assert trials.server is not None
    server = trials.server.process
    trials.begin()
    assert trials.server.process is server, "one server serves all"
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    trials.begin()
    assert trials.server.process is not server
    assert load_model(model)[1] == sha256


def test_an_interrupted_trial_leaves_no_answer_to_the_next(
    model: Path, trials: trial.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The answer on the first would else be taken for one on the second."""
    does = "lambda path, **_: time.sleep(0.5) or os.abort() if 'slow' in path else os.kill(os.getpid(), 11)"
    monkeypatch.setattr(trial, "PROGRAM", SERVER.format(does))
    trials.begin()
    with pytest.raises(ModelError, match="SIGSEGV"):  # it is up
        trial.attempt(model, 8)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            trial.attempt(tmp_path / "slow.onnx", 8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ModelError, match="SIGSEGV"):
        trial.attempt(model, 8)


@pytest.mark.parametrize(
    ("does", "error", "words"),
    [
        ("lambda *_, **__: os.kill(os.getpid(), 11)", ModelError, "SIGSEGV"),
        ("lambda *_, **__: os.abort()", ModelError, "SIGABRT"),
        ("lambda *_, **__: os._exit(1)", ModelError, "without an answer"),
        ("lambda *_, **__: 1 / 0", ModelError, "ZeroDivisionError"),
        ("lambda *_, **__: bytearray(1 << 30)", ResourceError, "0.5 GiB"),
        ("lambda *_, **__: time.sleep(60)", ResourceError, "more than 2 s, or"),
        ("lambda *_, **__: all(not n for n in iter(int, 1))", ResourceError, "more than 1 s of processor time"),
    ],
)
def test_what_ends_a_trial_is_a_refusal(
    model: Path, trials: trial.Trials, monkeypatch: pytest.MonkeyPatch, does: str, error: type[Exception], words: str
):
    """In place of onnx and onnxruntime, something that misbehaves."""
    monkeypatch.setattr(trial, "PROGRAM", SERVER.format(does))
    if error is ResourceError and "bytearray" not in does:
        monkeypatch.setattr(trial, "SECONDS", 1.0)
        monkeypatch.setattr(trial, "PATIENCE", 20.0 if "iter" in does else 2.0)
    trials.begin()
    with pytest.raises(error) as refusal:
        load_model(model)
    assert words in str(refusal.value)
    assert str(model) in str(refusal.value)
    load_model(model, trusted=True)
    trials.end()
    load_model(model)


def test_what_a_library_refuses_is_said_as_it_is(model: Path, trials: trial.Trials, monkeypatch: pytest.MonkeyPatch):
    program = "import onnx; from mscompile.intake import trial; onnx.checker.check_model = lambda _: 1 / 0; trial.serve()"
    monkeypatch.setattr(trial, "PROGRAM", program)
    trials.begin()
    with pytest.raises(ModelError) as refusal:
        load_model(model)
    assert "division by zero" in str(refusal.value)


def test_the_command_line_tries_models_unless_they_are_trusted(
    model: Path, trials: trial.Trials, monkeypatch: pytest.MonkeyPatch
):
    for name in ("cli", "stage_commands"):
        monkeypatch.setattr(f"mscompile.{name}.TRIALS", trials)
    for given, began in ((["--trust"], False), ([], True)):
        assert cli.run(["inspect", str(model), *given]) == 0
        assert (trials.server is not None) == began
        assert not trials.wanted


# --- providers ----------------------------------------------------------------------------------------------------------


def test_a_provider_that_is_absent_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for command in (["compile"], ["calibrate"], ["apply", "plan.json"], ["audit", "b.onnx"]):
        assert cli.run([command[0], str(model), *command[1:], "--provider", "cuda"]) == 7
        assert "--provider cuda" in capsys.readouterr().err
        assert providers.chosen() == "cpu"


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_not_replaced(monkeypatch: pytest.MonkeyPatch):
    """onnxruntime would run on the processor instead, and say so in its log alone."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers.TITLES.values()))
    with providers.on("cuda"), pytest.raises(UnsupportedError) as refusal:
        runtime.Session(mlp())
    assert "CPUExecutionProvider" in str(refusal.value)
    assert providers.chosen() == "cpu"
    runtime.Session(mlp())


def test_bound_values_are_the_plain_ones_bit_for_bit():
    model = mlp(outputs=[onnx.helper.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, ["N", 16])])
    session = runtime.Session(model)
    x = samples()
    state = {"x": ort.OrtValue.ortvalue_from_numpy(x)}
    plain = session.run({"x": x})
    for found in (session.step({"x": x}, {}), session.step({}, state)):
        assert list(found) == session.outputs
        for name, value in found.items():
            np.testing.assert_array_equal(value.numpy(), plain[name])
            assert value.device_name() == "cpu"
    with pytest.raises(UnsupportedError):
        session.step({"x": x[:, :3]}, {})
