"""What reaches a terminal or a pipe, and how a run ends that goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import HOSTILE, KEEP, Ran, Run, command, refused, written
from small_models import mlp, renamed, samples, weight

from mscompile import terminal
from mscompile.errors import UsageError

pytestmark = pytest.mark.usefixtures("fast")


# --- text from outside ------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    model = renamed(mlp(), {"h0": HOSTILE, "h1": "x" * 1_000_000})
    model.graph.node[2].name = HOSTILE
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=samples())
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    "arguments",
    [
        ("m.onnx", *KEEP, "--dry-run"),
        ("m.onnx", *KEEP, "--dry-run", "-v"),
        ("inspect", "m.onnx"),
        ("inspect", "m.onnx", "--json"),
        ("m.onnx", *KEEP, "--dry-run", "--json"),
        ("m.onnx", "--keep", "other=3"),
        ("m.onnx", "--keep", f"{HOSTILE}=99"),
        ("m.onnx", *KEEP, "--samples", "16"),
        (f"{HOSTILE}.onnx",),
        ("m.onnx", "--calib", f"{HOSTILE}.npz"),
        ("m.onnx", "-o", f"{HOSTILE}/m.onnx"),
        ("m.onnx", f"--{HOSTILE}"),
    ],
)
def test_nothing_hostile_reaches_the_terminal(run: Run, hostile: Path, arguments: tuple[str, ...]):
    ran = run(*arguments)
    assert "this is a bug" not in ran.err
    for text in (ran.out, ran.err):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "\nname" not in text
        if "--json" not in arguments:
            assert len(text) < 20_000
    if "--json" in arguments:
        assert HOSTILE in {site["name"] for site in json.loads(ran.out)["sites"]}


def test_hostile_models_in_errors(run: Run, tmp_path: Path):
    onnx.save(renamed(mlp((6, 1, 3)), {"h0": HOSTILE, "w0": HOSTILE * 2}), tmp_path / "m.onnx")
    refused(run("m.onnx"), 6)
    model = mlp()
    model.graph.node[1].input[0] = HOSTILE
    model.graph.node[1].op_type = HOSTILE
    (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
    for ran in (run("m.onnx"), run("n.onnx"), run("inspect", "m.onnx")):
        assert all(c.isprintable() or c == "\n" for c in ran.out + ran.err)
        assert "\nname" not in ran.err


def test_file_names_that_are_no_text(run: Run, small: Path):
    name = os.fsdecode(b"m\xff.onnx")
    small.rename(small.parent / name)
    ran = run(name, *KEEP, "--calib", "m.calib.npz")
    assert ran.code == 0, ran.err
    assert "�" in ran.out
    assert run(name, *KEEP, "--calib", "m.calib.npz", "--json", "--dry-run").code == 0


# --- bugs, interruptions and streams ----------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr("mscompile.pipeline.compile_model", fail)


@pytest.mark.usefixtures("broken")
def test_a_bug_of_ours_leaves_a_crash_file(run: Run, tmp_path: Path):
    ran = run("m.onnx", "--seed", "3")
    refused(ran, 1, "bug", "ZeroDivisionError")
    (crash,) = tmp_path.glob("mscompile-crash-*.txt")
    assert crash.name in ran.err
    text = crash.read_text(encoding="utf-8")
    assert text.startswith("mscompile m.onnx --seed 3\n")
    assert "Traceback" in text


@pytest.mark.usefixtures("broken")
def test_a_bug_where_no_file_can_be_written(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    refused(run("m.onnx"), 1, "-vv")


@pytest.mark.parametrize("verbose", [("-vv",), ("-v", "-v"), ("--verbose", "--verbose")])
def test_tracebacks_are_printed_on_demand(run: Run, verbose: tuple[str, ...]):
    ran = run("missing.onnx", *verbose)
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert "mscompile: there is no such model file" in ran.err


def test_running_out_of_memory_is_no_bug(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mscompile.pipeline.compile_model", fail)
    refused(run("m.onnx"), 8, "memory")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(small: Path, number: signal.Signals, code: int):
    script = small.parent / "data.py"
    script.write_text("import time\ndef load_data():\n    print('started', flush=True)\n    time.sleep(60)\n    yield {}\n")
    before = written(small.parent)
    # Run in the background, the tests may have been told to ignore the signal, which a child would inherit.
    previous = signal.signal(number, lambda *_: None)
    process = command(small, "--calib", script)
    signal.signal(number, previous)
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert written(small.parent) == before


def test_a_closed_pipe_and_a_full_device(small: Path):
    process = command("inspect", small)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, "")
    with Path("/dev/full").open("w") as full:
        process = command("inspect", small, stdout=full)
        _, err = process.communicate(timeout=30)
    refused(Ran(process.returncode, "", err), 8, "No space left")


def test_terminals_without_unicode(small: Path):
    process = command("inspect", small, env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "h0" in out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "no_color"), [(0.0, False), (1.2, False), (1.2, True)])
def test_progress_shows_only_what_takes_long(monkeypatch: pytest.MonkeyPatch, seconds: float, no_color: bool):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal.bars(silent=False) as progress:
        for _ in progress(range(2), "search", 2):
            assert list(progress(range(3), "inner", 3)) == [0, 1, 2]
            time.sleep(seconds / 2)
        time.sleep(0.15)
    shown = screen.getvalue()
    assert ("search" in shown) == (seconds > 0)
    assert "inner" not in shown
    assert bool(re.search("\x1b\\[[0-9;]*3[0-9]", shown)) == (seconds > 0 and not no_color)


def test_warnings_have_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch):
    for value, coloured in (("", True), ("1", False)):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("NO_COLOR", value)
        terminal.say("warning", fg="yellow")
        assert ("\x1b" in screen.getvalue()) == coloured


LONG = "/encoder/layer.0/attention/output/dense/Add_output_0"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_tables_fit_and_never_break_a_name(width: int):
    rows = [("relu", "32", "16", "because " * 12), (LONG, "3,072", "1,536", "")]
    lines = "\n".join(terminal.table(("site", "channels", "left", "why"), rows, width, text=True)).splitlines()
    assert all(len(line) <= width for line in lines if line != LONG)
    assert any(line.startswith(LONG) for line in lines)
    assert [line.split()[-2:] for line in lines if line.endswith("1,536")] == [["3,072", "1,536"]]


@pytest.mark.parametrize("width", [40, 80, terminal.WIDE])
def test_errors_are_wrapped_between_words(width: int):
    path = "/a" * 60
    error = UsageError(
        "it went wrong", where=path, why=f"a long reason {'why ' * 20}\n  and {path}", hint="do\n  this\nand that"
    )
    lines = terminal.error_text(error, width).splitlines()
    assert lines[:2] == ["mscompile: it went wrong", f"  where: {path}"]
    assert lines[2].startswith("  why:   a long reason why")
    assert lines[-3:] == ["  try:   do", "  this", "and that"]
    assert all(line.startswith(terminal.MARGIN) for line in lines[3:-3])
    assert all(len(line) <= width or path in line for line in lines)


def test_piped_tables_have_one_line_per_site(run: Run, tmp_path: Path):
    onnx.save(renamed(mlp(), {"h0": LONG * 3}), tmp_path / "m.onnx")
    lines = run("inspect", "m.onnx").out.splitlines()
    assert sum(line.startswith(LONG) and line.endswith("read by fc1") for line in lines) == 1


def test_inspect_names_the_weights_of_the_model(run: Run, small: Path):
    """Weights named in the coverage are those of the model."""
    document = json.loads(run("inspect", small, "--json").out)
    assert {entry["tensor"]: entry["shape"] for entry in document["coverage"]} == {
        name: list(weight(mlp(), name).shape) for name in ("w0", "w1", "w2")
    }
