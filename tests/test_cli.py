"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import KEEP, Ran, Run, refused, written
from small_models import mlp, samples, with_dead_units

import mscompile
from mscompile.models import path as shipped
from mscompile.options import Options

pytestmark = pytest.mark.usefixtures("fast")


# --- compiling --------------------------------------------------------------------------------------------------------


def test_bare_command_finds_its_data_and_writes_three_files(run: Run, digits: Path):
    before = set(written(digits.parent))
    ran = run(digits.name)
    assert ran.code == 0, ran.err
    assert set(written(digits.parent)) - before == {"digits.ms.onnx", "digits.ms.plan.json", "digits.ms.report.json"}
    assert re.fullmatch(r"digits\.ms\.onnx: \S+% of the parameters; IIA \S+, at least 0\.9[5-9]\d+ with .*\n", ran.out)
    assert all(word in ran.err for word in ("max_pool2d_1", "parameters", "certified", "digits.ms.plan.json"))
    assert not re.search("\x1b|\r", ran.err)
    report = json.loads((digits.parent / "digits.ms.report.json").read_bytes())
    assert report["fidelity"]["iia_lower"] >= 0.95
    assert report["command"] == "mscompile digits.onnx"


def test_json_is_one_document_that_the_schema_describes(run: Run, digits: Path):
    jsonschema = pytest.importorskip("jsonschema")
    ran = run(digits, *KEEP, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.isascii()
    assert ran.out.count("\n") == 1
    document = json.loads(ran.out)
    schema = json.loads((Path(mscompile.__file__).parent / "report.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document == json.loads((digits.parent / "digits.ms.report.json").read_bytes())


def test_quiet_prints_the_result_only(run: Run, small: Path):
    ran = run(small, *KEEP, "-q")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("\n") == 1


def test_verbose_tells_timings(run: Run, small: Path):
    assert "time: load" in run(small, *KEEP, "--dry-run", "-v").err


def test_dry_run_writes_nothing(run: Run, small: Path):
    before = written(small.parent)
    ran = run(small, *KEEP, "--dry-run")
    assert ran.code == 0
    assert ran.out.startswith("nothing written (dry run): ")
    assert written(small.parent) == before


def test_outputs_are_overwritten_only_by_force(run: Run, small: Path):
    assert run(small, *KEEP).code == 0
    first = written(small.parent)
    refused(run(small, "--keep", "0.25"), 2, "m.ms.onnx", "exists already", "--force")
    assert written(small.parent) == first
    assert run(small, "--keep", "0.25", "--force").code == 0
    assert len((small.parent / "m.ms.onnx").read_bytes()) < len(first["m.ms.onnx"])


def widths(ran: Ran) -> list[int]:
    assert ran.code == 0, ran.err
    return [site["width"] for site in json.loads(ran.out)["sites"]]


@pytest.mark.parametrize(
    ("keeps", "expected"),
    [
        (["0.5"], [8, 4]),
        (["1"], [16, 8]),
        (["h0=4"], [4, 8]),
        (["h0=0.5"], [8, 8]),
        (["h0=1.0"], [16, 8]),
        (["h0=1"], [1, 8]),
        (["h0=0.25", "h1=2"], [4, 2]),
    ],
)
def test_keep_says_how_many_channels_stay(run: Run, small: Path, keeps: list[str], expected: list[int]):
    assert widths(run(small, "--json", "--dry-run", *(a for keep in keeps for a in ("--keep", keep)))) == expected


@pytest.mark.parametrize(("option", "expected"), [("--only", [8, 8]), ("--freeze", [16, 4])])
def test_patterns_choose_sites(run: Run, small: Path, option: str, expected: list[int]):
    assert widths(run(small, "--json", "--dry-run", *KEEP, option, "^h0$")) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--keep 0", ("keep = 0.0", "share")),
        ("--keep 2", ("keep = 2.0",)),
        ("--keep -1", ("keep = -1.0",)),
        ("--keep nan", ("keep = nan",)),
        ("--keep inf", ("keep = inf",)),
        ("--keep abc", ("'abc'",)),
        ("--keep h0=0", ("h0", "from 1 on")),
        ("--keep h0=-3", ("h0", "from 1 on")),
        ("--keep h0=99", ("99 of 16",)),
        ("--keep h0=nan", ("nan",)),
        ("--keep h0=1e3", ("1000",)),
        ("--keep h0=", ("h0=",)),
        ("--keep h9=3", ("no site 'h9'", "h0, h1", "inspect")),
        ("--keep =3", ("no site ''",)),
        ("--keep h0=4 --keep h0=8", ("twice",)),
        ("--keep 0.5 --keep h0=8", ("stands alone",)),
        ("--keep h0=4 --freeze h0", ("left alone", "frozen")),
        ("--keep 0.5 --fidelity 0.9", ("two goals",)),
        ("--fidelity 1", ("fidelity = 1.0",)),
        ("--fidelity nan", ("fidelity = nan",)),
        ("--only [", ("only = '['", "regular expression")),
        ("--freeze (", ("freeze = '('", "regular expression")),
        ("--metric foo", ("argmax, kl, distance, cosine",)),
        ("--objective foo", ("logit-mse",)),
        ("--replacement foo", ("constant",)),
        ("--law foo", ("all-sites",)),
        ("--swap 2", ("swap = 2.0",)),
        ("--delta 0", ("delta = 0.0",)),
        ("--seed -1", ("--seed",)),
        ("--samples 0", ("--samples",)),
        ("--batch-size x", ("--batch-size",)),
        ("--frob", ("--frob", "mscompile compile --help")),
        ("other.onnx", ("unexpected extra argument",)),
        ("--calib nothing.npz", ("nothing.npz",)),
    ],
)
def test_commands_that_make_no_sense(run: Run, small: Path, arguments: str, words: tuple[str, ...]):
    before = written(small.parent)
    refused(run(small, *arguments.split()), 2, *words)
    assert written(small.parent) == before


def test_without_arguments_help_goes_to_stderr(run: Run):
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert "mscompile inspect MODEL.onnx" in ran.err


# --- goals ------------------------------------------------------------------------------------------------------------


def test_a_fidelity_out_of_reach(run: Run, small: Path):
    before = written(small.parent)
    refused(run(small, "--fidelity", "0.9999"), 6, "0.9999", "--keep")
    assert written(small.parent) == before


def test_nothing_to_cut_tells_the_reasons(run: Run, tmp_path: Path):
    onnx.save(mlp((6, 1, 3)), tmp_path / "m.onnx")
    refused(run("m.onnx"), 6, "has a single unit", "inspect")
    onnx.save(mlp((6, 3)), tmp_path / "m.onnx")
    refused(run("m.onnx"), 6, "no operator contracts")


def test_patterns_that_leave_nothing(run: Run, small: Path):
    refused(run(small, *KEEP, "--freeze", "."), 6, "--freeze .")
    refused(run(small, *KEEP, "--only", "zzz"), 6, "--only zzz")


def test_without_data_a_recipe_is_printed_that_works(run: Run, tmp_path: Path):
    onnx.save(mlp(), tmp_path / "m.onnx")
    before = written(tmp_path)
    ran = run("m.onnx", *KEEP)
    refused(ran, 6, "'x' float32 (N, 6)")
    assert written(tmp_path) == before
    recipe = ran.err[ran.err.index("import numpy") :]
    exec(recipe, {"load_my_samples": lambda: [{"x": x} for x in samples()]})  # noqa: S102
    assert run("m.onnx", *KEEP).code == 0


def test_without_data_the_weights_alone_may_prove_something(run: Run, tmp_path: Path):
    onnx.save(with_dead_units(3), tmp_path / "m.onnx")
    ran = run("m.onnx")
    assert ran.code == 0, ran.err
    assert "fidelity not measured" in ran.out
    assert "warning: no data" in ran.err
    report = json.loads((tmp_path / "m.ms.report.json").read_bytes())
    assert [site["width"] for site in report["sites"]] == [13, 8]
    assert (report["fidelity"], report["data"]) == (None, None)
    refused(run("m.ms.onnx"), 6, "--calib")


# --- inspecting, help, version ----------------------------------------------------------------------------------------


def test_inspect_lists_sites_and_reasons(run: Run, tmp_path: Path):
    onnx.save(mlp((6, 16, 1, 3)), tmp_path / "m.onnx")
    ran = run("inspect", "m.onnx")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"^h0 +1 +16  read by fc1$", ran.out, re.MULTILINE)
    assert re.search(r"^h1 +1 +1  left alone: has a single unit$", ran.out, re.MULTILINE)
    assert re.search(r"^w2 +1×3  has a single unit", ran.out, re.MULTILINE)
    ran = run("inspect", "m.onnx", "--json")
    document = json.loads(ran.out)
    assert [(s["name"], s["size"], s["left_alone"]) for s in document["sites"]] == [
        ("h0", 16, None),
        ("h1", 1, "has a single unit"),
    ]
    assert {entry["tensor"]: entry["status"] for entry in document["coverage"]}["w2"] == "left alone"


def test_help_needs_no_heavy_library_and_no_second():
    code = "import sys; from mscompile.cli import run; assert run(['compile', '--help']) == 0; print('|', *sys.modules)"
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(mscompile.__file__).parents[1])},
        )
        taken.append(time.perf_counter() - start)
        if taken[-1] < 1:
            break
    assert min(taken) < 1
    shown, _, modules = ran.stdout.rpartition("|")
    assert "--fidelity" in shown
    heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "onnx_graphsurgeon", "numpy", "scipy", "pydantic", "rich"}
    assert not heavy & set(modules.split())


def test_help_fits_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["compile", "--help"], ["inspect", "--help"]):
        ran = run(*arguments)
        assert ran.code == 0
        assert max(map(len, ran.out.splitlines())) <= 80


def test_help_names_every_choice(run: Run):
    shown = run("compile", "--help").out
    for option, kind in typing.get_type_hints(Options).items():
        if option != "keep":
            assert f"--{option.replace('_', '-')}" in shown
            choices = [a for part in (kind, *typing.get_args(kind)) for a in typing.get_args(part) if isinstance(a, str)]
            assert all(choice in shown for choice in choices)


def test_version(run: Run):
    assert run("--version") == Ran(0, f"mscompile {mscompile.__version__}\n", "")


BLOCKED = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"torch", "onnxscript", "sklearn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_compiling_needs_no_torch(small: Path):
    code = BLOCKED + "import mscompile.passes, mscompile.models, mscompile.cli\nmscompile.cli.run(sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(small), *KEEP, "--dry-run", "-q"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(mscompile.__file__).parents[1])},
    )
    assert (ran.stdout.count("\n"), ran.stderr) == (1, "")


# --- long runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--memory-limit", "1GBit"), 2, "limit cannot be read"),
        (("--memory-limit", "0"), 2, "limit cannot be read"),
        (("--time-limit", "soon"), 2, "limit cannot be read"),
        (("--workers", "many"), 2, "no such workers"),
        (("--work", "w", "--no-cache"), 2, "contradict"),
        (("--memory-limit", "1MiB"), 8, "are needed"),
        (("--time-limit", "0.01s"), 8, "time limit is reached"),
        (("--work", "m.onnx"), 8, "work folder cannot be written"),
    ],
)
def test_limits_and_how_to_run(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
):
    monkeypatch.setattr("mscompile.runs.limits.LOOK_SECONDS", 60.0)  # what is needed is told before what is used is seen
    before = written(small.parent)
    refused(run(small, *KEEP, *arguments), code, words)
    assert written(small.parent) == before


@pytest.mark.parametrize("command", [("m.onnx", *KEEP), ("calibrate", "m.onnx")])
def test_a_second_run_finds_what_the_first_has_found(run: Run, small: Path, command: tuple[str, ...]):
    outputs = []
    here = ("--work", "w")
    for more, reuses in (
        (here, False),
        ((*here, "--force"), True),
        ((*here, "--force", "--no-resume"), False),
        (("--force", "--no-cache"), False),
        ((*here, "--force", "--workers", "2"), True),
    ):
        ran = run(*command, *more)
        assert ran.code == 0, ran.err
        outputs.append([path.read_bytes() for path in sorted(small.parent.glob("m.*s.*")) if "report" not in path.name])
        assert ("found in the work folder" in ran.err) == (reuses and command[0] == "m.onnx")
    assert outputs[0]
    assert all(found == outputs[0] for found in outputs)


def test_a_run_that_was_stopped_says_how_to_go_on(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch):
    from mscompile.search.candidates import Workshop

    def stop(*_: object, **__: object) -> None:
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(Workshop, "make", stop)
        refused(run(small, *KEEP, "--work", "w", "--time-limit", "2s"), 8, "goes on from what is in w")
        patch.setattr(Workshop, "make", interrupt)
        ran = run(small, *KEEP, "--work", "w")
        assert ran.code == 130
        assert "goes on from what is in w" in ran.err
        np.savez(small.parent / "m.calib.npz", x=samples(seed=9))
        refused(run(small, *KEEP, "--work", "w"), 4, "the data changed since")
    assert run(small, *KEEP, "--work", "w", "--no-resume").code == 0


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_data_that_changes_during_the_run(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch):
    from mscompile.search.candidates import Workshop

    make = Workshop.make

    def change(*arguments: Any, **named: Any) -> Any:
        np.savez(small.parent / "m.calib.npz", x=samples(seed=9))
        return make(*arguments, **named)

    monkeypatch.setattr(Workshop, "make", change)
    refused(run(small, *KEEP), 4, "the data changed during the run")
    assert sorted(path.name for path in small.parent.iterdir()) == ["m.calib.npz", "m.onnx"]


def test_memory_that_is_taken_is_seen(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch):
    from mscompile.runs import limits
    from mscompile.search.candidates import Workshop

    taken = 0

    def take(*_: object, **__: object) -> None:
        nonlocal taken
        taken = 2 << 30
        time.sleep(60)

    monkeypatch.setattr(limits, "_resident", lambda: taken)
    monkeypatch.setattr(limits, "HARD", 99.0)
    monkeypatch.setattr(Workshop, "make", take)
    refused(run(small, *KEEP, "--memory-limit", "1GB"), 8, "memory limit is reached", "2.15 GB are in use")


def test_a_full_disk_leaves_the_old_output(small: Path):
    (small.parent / "m.ms.onnx").write_bytes(b"old")
    before = written(small.parent)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    script = f"{limit}; from mscompile.cli import main; main()"
    arguments = [str(small), *KEEP, "--force", "--no-cache"]
    root = str(Path(mscompile.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    refused(Ran(ran.returncode, ran.stdout, ran.stderr), 8, "File too large")
    assert written(small.parent) == before


def test_onnxruntime_keeps_no_record_of_the_user(tmp_path: Path):
    """Its device identifier and its queue of events would lie in the user's cache folder."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(mscompile.__file__).parents[1])
    command = [sys.executable, "-m", "mscompile", "inspect", str(shipped("digits"))]
    assert not subprocess.run(command, env=environment, capture_output=True, check=False).returncode
    assert not list(tmp_path.rglob("*onnxruntime*"))
