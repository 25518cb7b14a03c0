"""Trials in shards: whoever runs them, dies, or goes on later, an audit finds the same to the last byte."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import FEATURES, mlp, samples
from test_workers import Scripted

from mscompile.audit.pipeline import audit
from mscompile.audit.setup import AuditOptions
from mscompile.cli import run as run_command
from mscompile.errors import DataError, ResourceError
from mscompile.options import Options
from mscompile.pipeline import compile_model
from mscompile.runs.command import without_how
from mscompile.runs.locks import claimed
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Run
from mscompile.runs.work import Work
from mscompile.runs.workers import Crew, Process
from mscompile.verification import trials as trials_module
from mscompile.verification.interchange import Engine, Opened, disjoint_pairs
from mscompile.verification.trials import MOST_BATCHES, Design, Interchanges, Shards, run_trials

from test_verify import data, planned  # isort: skip


class CutError(Exception):
    """A run ends here."""


BATCH = 8
DESIGN = Design("all-sites", 0.3, 5, own=True)
OPTIONS = AuditOptions(fidelity=0.8, table=80, batch_size=BATCH, swaps=(0.1, 0.5))


@pytest.fixture(scope="module")
def opened() -> tuple[Engine, Interchanges, Shards]:
    pair, _ = planned(mlp())
    found = data(500)
    engine = Engine(pair, found, batch_size=BATCH)
    task = Interchanges(pair, engine.answers, engine)
    return engine, task, Shards(found, *disjoint_pairs(len(found), 5), DESIGN, BATCH)


def bits(found: Any) -> list[bytes]:
    return [
        array.tobytes()
        for trials in found
        for array in (trials.base, trials.source, *trials.masks, *trials.dense.values(), *trials.matched.values(),
                      *(trials.own or {}).values())
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(opened: tuple[Engine, Interchanges, Shards]) -> list[bytes]:
    """A batch at a time, in no shards."""
    engine, _, s = opened
    return bits(engine.trials(s.samples, s.base, s.source, law="all-sites", swap=0.3, seed=5, own=True))


@given(st.integers(0, 5000), st.integers(1, 70), st.integers(0, 1 << 24))
def test_shards_are_whole_batches_and_grow_as_trials_do(count: int, size: int, trial_bytes: int):
    rows = np.arange(count)
    shards = Shards(data(2), rows, rows, DESIGN, size, trial_bytes)
    parts = [shards.part(i) for i in range(len(shards))]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % size == 0 for part in parts)
    batches = [math.ceil((part.stop - part.start) / size) for part in parts]
    assert all(n <= max(1, min(sum(batches[:i]), MOST_BATCHES)) for i, n in enumerate(batches))
    assert all(n == 1 or n * size * trial_bytes <= trials_module.SHARD_BYTES for n in batches)


@pytest.mark.parametrize(
    ("size", "acts"), [(1, []), (3, []), (3, [0.3]), (2, [True, None, None, True, None])], ids=["1", "3", "late", "dying"]
)
def test_whoever_runs_them_trials_are_the_same(opened: Any, plain: list[bytes], size: int, acts: list[Any]):
    _, task, shards = opened
    script = iter(acts)
    found = run_trials(task, shards, run=Run(crew=Crew(size, lambda: Scripted(script))))
    assert bits(found) == plain


def test_alone_too(opened: Any, plain: list[bytes]):
    assert bits(run_trials(opened[1], opened[2])) == plain


def test_what_was_kept_is_not_run_again(opened: Any, plain: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, task, shards = opened
    run: list[int] = []
    interchange = Opened.interchange
    monkeypatch.setattr(Opened, "interchange", lambda *a, **k: (run.append(1), interchange(*a, **k))[1])
    monkeypatch.setattr("mscompile.runs.work.SHARE_OF_TIME", 1.0)
    with Work(tmp_path) as work:
        stage = work.stage("interchange")
        for i, _ in enumerate(run_trials(task, shards, stage=stage)):
            if i == 9:
                break
    done = len(run)
    assert 10 <= done < math.ceil(len(shards.base) / BATCH)
    with Work(tmp_path) as work:
        stage = work.stage("interchange")
        assert bits(run_trials(task, shards, stage=stage)) == plain
        assert work.reused == ["interchanges"]
        assert len(run) == math.ceil(len(shards.base) / BATCH)
    damaged = stage.folder / f"{shards.name(1)}.parcel"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (stage.folder / f"{shards.name(3)}.parcel").unlink()
    with Work(tmp_path) as work:
        assert bits(run_trials(task, shards, stage=work.stage("interchange"))) == plain
        assert len(run) - math.ceil(len(shards.base) / BATCH) == 1 + 4


def test_whoever_stops_early_keeps_the_workers(opened: Any, plain: list[bytes]):
    _, task, shards = opened
    hired = []

    def hire() -> Scripted:
        hired.append(Scripted(iter([])))
        return hired[-1]

    crew = Crew(2, hire)
    told: list[Any] = []
    send = Scripted.send
    for _ in range(3):
        with contextlib.closing(run_trials(task, shards, run=Run(crew=crew))) as found:
            next(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "send", lambda self, content: (told.append(Parcel.unpack(content)), send(self, content))[1])
        assert bits(run_trials(task, shards, run=Run(crew=crew))) == plain
    assert len(hired) == 2
    assert not any("kind" in parcel.header for parcel in told)
    crew.close()


def test_a_worker_that_hangs_on_what_nobody_waits_for_is_given_up(
    opened: Any, plain: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mscompile.runs.workers.LEFT_SECONDS", 0.1)
    script = iter([True, 60.0, True])
    crew = Crew(2, lambda: Scripted(script))
    with contextlib.closing(run_trials(opened[1], opened[2], run=Run(crew=crew))) as found:
        next(found)
    assert bits(run_trials(opened[1], opened[2], run=Run(crew=crew))) == plain


# --- whole audits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    onnx.save(mlp((FEATURES, 24, 16, 3)), made / "dense.onnx")
    np.savez(made / "dense.calib.npz", x=samples(400, seed=1))
    np.savez(made / "audit.npz", x=samples(1000, seed=2), label=np.zeros(1000, dtype=np.int64))
    compile_model(made / "dense.onnx", None, made / "small.onnx", Options(keep=0.7))
    compile_model(made / "dense.onnx", None, made / "other.onnx", Options(keep=0.4))
    return made


def certificate(folder: Path, run: Run, options: AuditOptions = OPTIONS) -> str:
    files = folder / "dense.onnx", folder / "small.onnx", folder / "audit.npz"
    return audit(*files, options, against=folder / "other.onnx", run=run).to_json()


@pytest.fixture(scope="module")
def alone(folder: Path) -> str:
    return certificate(folder, Run())


@pytest.mark.parametrize("acts", [[], [True, None, True, True, None]], ids=["sound", "dying"])
def test_certificates_of_any_number_of_workers(folder: Path, alone: str, acts: list[Any]):
    script = iter(acts)
    with contextlib.closing(Crew(3, lambda: Scripted(script))) as crew:
        assert certificate(folder, Run(crew=crew)) == alone


def test_a_process_that_is_killed(folder: Path, alone: str):
    hired: list[Process] = []

    def hire() -> Process:
        hired.append(Process(1))
        return hired[-1]

    class Deadly(Run):
        def map(self, *arguments: Any) -> Iterator[Any]:
            for i, found in enumerate(super().map(*arguments)):
                if i == 1 and len(hired) == 2:
                    os.kill(hired[0]._process.pid, signal.SIGKILL)
                yield found

    with contextlib.closing(Crew(2, hire)) as crew:
        assert certificate(folder, Deadly(crew=crew)) == alone
    assert len(hired) > 2


def test_a_certificate_that_was_gone_on_with(folder: Path, alone: str, tmp_path: Path):
    class Short(Run):
        def map(self, *arguments: Any) -> Iterator[Any]:
            for i, found in enumerate(super().map(*arguments)):
                if i == 3:
                    raise CutError
                yield found

    work = Work(tmp_path)
    with pytest.raises(CutError):
        certificate(folder, Short(work))
    work.close()
    with Work(tmp_path) as work:
        assert certificate(folder, Run(work)) == alone
        assert "interchanges" in work.reused


def test_lost_workers_are_no_explanation(folder: Path):
    """An explanation does without what cannot be computed; not so without what was lost."""
    options = AuditOptions(fidelity=0.8, table=0, trials=1)
    with pytest.raises(ResourceError, match="lost over and over"):
        certificate(folder, Run(crew=Crew(2, lambda: Scripted(iter([None] * 9)))), options)


def test_data_that_changed_since_is_not_gone_on_with(folder: Path, tmp_path: Path):
    def cut(*_: Any) -> Any:
        raise CutError

    here = tmp_path / "audit.npz"
    np.savez(here, x=samples(200, seed=3))
    files = folder / "dense.onnx", folder / "small.onnx", here
    with pytest.MonkeyPatch.context() as patch, Work(tmp_path / "w") as work:
        patch.setattr(Run, "map", cut)
        with contextlib.suppress(CutError):
            audit(*files, OPTIONS, run=Run(work))
        work.begun = None  # as if it had been killed
    np.savez(here, x=samples(200, seed=4))
    with Work(tmp_path / "w") as work, pytest.raises(DataError, match="changed since the run"):
        audit(*files, OPTIONS, run=Run(work))


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_command_has_all_of_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "c.json"
    words = ["audit", *(str(folder / name) for name in ("dense.onnx", "small.onnx")), "--data", str(folder / "audit.npz")]
    words += ["--fidelity", "0.8", "--table", "0", "--batch-size", "8", "-o", str(target), "-q"]
    assert run_command([*words, "--workers", "2", "--work", str(tmp_path / "w")]) == 0
    first = target.read_bytes()
    target.unlink()
    assert run_command([*words, "--no-cache"]) == 0
    assert target.read_bytes() == first
    assert run_command(["audit", "--replay", str(target), "--workers", "2", "-q"]) == 0
    assert "every number is the same" in capsys.readouterr().out
    assert run_command(["audit", "--replay", str(target), "--work", str(tmp_path / "w")]) == 2
    assert run_command([*words, "--force", "--no-cache", "--time-limit", "0.01s"]) == 8
    assert "--time-limit 0.01s" in capsys.readouterr().err
    assert target.read_bytes() == first


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("mscompile audit a b --data c", "mscompile audit a b --data c"),
        ("mscompile audit a --workers 4 b --work=w --no-resume --cache --data c", "mscompile audit a b --data c"),
        ("mscompile audit a b --time-limit '2 h' --data 'c d' --workers=ray", "mscompile audit a b --data 'c d'"),
        ("mscompile audit -- a --workers", "mscompile audit -- a --workers"),
    ],
)
def test_how_a_run_was_made_is_not_in_its_command(said: str, kept: str):
    assert without_how(said) == kept


def test_outputs_of_every_command_are_one_runs_at_a_time(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, small, held = str(folder / "dense.onnx"), str(folder / "small.onnx"), str(tmp_path / "held")
    statistics, certified = str(tmp_path / "s"), str(tmp_path / "c.json")
    data_, plan = ["--data", str(folder / "audit.npz")], str(folder / "small.plan.json")
    assert run_command(["calibrate", model, "-o", statistics, "--no-cache"]) == 0
    audited = ["audit", model, small, *data_, "--table", "0", "--no-explain", "--no-cache"]
    run_command([*audited, "-o", certified])
    assert Path(certified).is_file()
    with claimed(Path(held)):
        for words in (
            [model, "-o", held],
            [model, "-o", str(tmp_path / "out.onnx"), "--html", held],
            ["calibrate", model, "-o", held],
            ["calibrate", model, "-o", str(tmp_path / "t"), "--check", "1", "--html", held],
            ["plan", model, statistics, "--keep", "0.5", "-o", held],
            ["apply", model, plan, "-o", held],
            [*audited, "-o", held],
            *([*audited, "-o", str(tmp_path / "d.json"), kind, held] for kind in ("--html", "--markdown", "--statement")),
            ["report", certified, "--html", held],
        ):
            capsys.readouterr()
            assert run_command(words) == 2, words
            assert "another run writes this output" in capsys.readouterr().err
            assert not Path(held).exists()
    assert run_command(["plan", model, statistics, "--keep", "0.5", "-o", held]) == 0
    assert not list(tmp_path.glob(".*"))


def test_two_outputs_are_two_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["audit", str(folder / "dense.onnx"), str(folder / "small.onnx"), "--data", str(folder / "audit.npz")]
    assert run_command([*words, "-o", str(tmp_path / "c"), "--html", str(tmp_path / "." / "c")]) == 2
    assert "two outputs are one file" in capsys.readouterr().err


def test_a_counterexample_replaces_nothing_else(folder: Path, tmp_path: Path):
    words = ["audit", str(folder / "dense.onnx"), str(folder / "other.onnx"), "--data", str(folder / "audit.npz")]
    words += ["-o", str(tmp_path / "c.json"), "--table", "0", "--no-cache", "--swap", "1"]
    place = tmp_path / "c.counterexample"
    place.mkdir()
    (place / "mine").write_text("x")
    assert run_command(words) == 2
    assert [path.name for path in place.iterdir()] == ["mine"]
    (place / "mine").rename(place / "replay.py")
    assert run_command(words) == 5
    assert sorted(path.name for path in place.iterdir()) == ["compiled.onnx", "dense.onnx", "inputs.npz", "replay.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.counterexample", "c.json"]
