"""Long runs: shards that merge to the same sums, what a run keeps, and what happens where it is cut off."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from test_calibration import GRAPHS, opened

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Instrument, Measure
from mscompile.calibration.statistics import Statistics
from mscompile.calibration.summation import Shards, Summation
from mscompile.calibration.survey import survey
from mscompile.errors import DataError, ResourceError, UsageError
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm
from mscompile.runs import limits
from mscompile.runs.limits import finishing
from mscompile.runs.locks import HELD, acquire, claimed
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Cut, Run, Task, Tick
from mscompile.runs.work import Work

EVERYTHING = Measure(shared=True, windows=True, outputs={"y": 1.0}, curvature="fisher", gradient=True, probes=3, second=True)
ORDER = 1e-12
"""Relative: what the order of float64 sums may change."""
SAMPLES = 150
BATCH = 2
"""Of 16 batches are shards: five of them."""


def summation(scm: Scm, samples: Samples, measure: Measure = EVERYTHING) -> Summation:
    first = survey(scm, scm.sites, next(samples.batches(BATCH)), BATCH, measure.outputs)
    return Instrument(scm, scm.sites, first, measure, len(samples)).summation


def equal(a: Statistics, b: Statistics) -> bool:
    """Whether all numbers are the same bit for bit."""

    def numbers(found: Statistics) -> Iterator[object]:
        for kind in (found.moments, found.curvature, found.windows):
            for name, entry in kind.items():
                yield name
                yield from (value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(entry).values())

    return list(numbers(a)) == list(numbers(b))


def work(folder: Path, **options: bool) -> Work:
    found = Work(folder, asked=True, **options)
    found.begin(model="m", data="d", source="s", target="t")
    return found


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_shards_in_any_order_give_the_same_sums(name: str):
    scm, samples = opened(name, SAMPLES)
    measure = EVERYTHING if name == "mlp" else Measure(shared=True, windows=True, outputs={"y": 1.0}, curvature="identity")
    task, shards = summation(scm, samples, measure), Shards(samples, BATCH)
    assert len(shards) == 5
    sums = task.open()
    parts = [sums(shards.cut(i), lambda _: None).arrays for i in range(5)]

    def merged(order: list[list[int]]) -> dict[str, np.ndarray]:
        totals: dict[str, np.ndarray] = {}
        for group in order:
            inner: dict[str, np.ndarray] = {}
            for i in group:
                task.add(inner, parts[i])
            task.add(totals, inner)
        return totals

    one = merged([[0, 1, 2, 3, 4]])
    for order in ([[0, 1], [2, 3, 4]], [[4], [3], [2], [1], [0]], [[3, 0], [1], [4, 2]]):
        for quantity, value in merged(order).items():
            np.testing.assert_allclose(value, one[quantity], rtol=0, atol=ORDER * max(float(np.abs(value).max()), 1e-300))


def test_a_summation_that_has_travelled_gives_the_same_bits():
    scm, samples = opened("mlp", 40)
    task, shards = summation(scm, samples), Shards(samples, BATCH)
    there = Summation.unpack(Parcel.unpack(task.pack().pack()))
    for threads in (1, 2, 3):
        shard = Parcel.unpack(shards.cut(1).pack())
        found, wanted = there.open(threads)(shard, lambda _: None), task.open()(shards.cut(1), lambda _: None)
        assert found.arrays.keys() == wanted.arrays.keys()
        assert all(np.array_equal(found.arrays[name], wanted.arrays[name]) for name in wanted.arrays)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_parcels(kind: str):
    arrays = {
        "a": np.arange(6).reshape(2, 3).astype(np.dtype(kind)),
        "none": np.zeros((0, 2), kind),
        "one": np.ones((), kind),
    }
    found = Parcel.unpack(Parcel({"x": [1, "é"]}, arrays).pack())
    assert found.header == {"x": [1, "é"]}
    for name, array in arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found.arrays[name], array)


@pytest.mark.parametrize("content", [b"", b"x" * 9, Parcel({}, {"a": np.zeros(3)}).pack()[:-1]])
def test_what_is_no_parcel(content: bytes):
    with pytest.raises(ValueError, match="parcel"):
        Parcel.unpack(content)


# --- what is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Run):
    """Notes which shards are summed up, and is interrupted before it hands over one too many."""

    most: int = 99
    order: tuple[int, ...] | None = None
    numbers: list[int] = field(default_factory=list)

    def map(
        self, task: Task, numbers: Sequence[int], cut: Cut, tick: Tick, batches: Sequence[int]
    ) -> Iterator[tuple[int, Parcel]]:
        turns = numbers if self.order is None else [i for i in self.order if i in numbers]
        for number, found in super().map(task, turns, cut, tick, batches):
            if len(self.numbers) == self.most:
                raise KeyboardInterrupt
            self.numbers.append(number)
            yield number, found


CNN = Measure(shared=True, windows=True, outputs={"y": 1.0}, curvature="identity", second=True)


@pytest.mark.parametrize(("most", "order"), [(0, None), (3, None), (1, (4, 0, 2, 1, 3)), (4, (3, 2, 1, 0, 4))])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, order: tuple[int, ...] | None
):
    monkeypatch.setattr("mscompile.runs.work.SHARE_OF_TIME", 1e9)  # every shard is worth keeping
    scm, samples = opened("cnn", SAMPLES)
    whole = calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN)
    runs = [Watched(work(tmp_path), most=most, order=order)]
    with pytest.raises(KeyboardInterrupt):
        calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=runs[0])
    for _ in range(2):
        runs[-1].work.close()
        runs.append(Watched(work(tmp_path)))
        assert equal(calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=runs[-1]), whole)
    assert [sorted(run.numbers) for run in runs[1:]] == [sorted(set(range(5)) - set(runs[0].numbers)), []]
    assert runs[1].work.reused == ([f"{most} of 5 shards of calibration"] if most else [])
    assert runs[2].work.reused == [f"sums over {SAMPLES} samples"]
    runs[2].work.close()
    assert len(list(tmp_path.glob("calibrate-*/*.parcel"))) == 1


def test_what_is_damaged_or_of_another_model_is_summed_up_again(tmp_path: Path):
    scm, samples = opened("cnn", SAMPLES)
    with contextlib.closing(work(tmp_path / "w")) as first:
        whole = calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=Run(first))
    (kept,) = tmp_path.glob("w/calibrate-*/*.parcel")
    content = kept.read_bytes()
    changed = bytearray(content)
    changed[-5] ^= 1
    journal = kept.with_name("journal.jsonl")
    for damage in (
        lambda: kept.write_bytes(changed),
        lambda: kept.write_bytes(content[:100]),
        kept.unlink,
        lambda: journal.write_bytes(journal.read_bytes()[:40]),
        lambda: journal.write_bytes(b"\xff{}\n[]\n7\n"),
        journal.unlink,
    ):
        damage()
        run = Watched(work(tmp_path / "w"))
        assert equal(calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=run), whole)
        assert run.numbers == [0, 1, 2, 3, 4]
        run.work.close()
    assert kept.read_bytes() == content
    other = Work(tmp_path / "w")
    other.begin(model="another", data="d", source="s", target="t")
    run = Watched(other)
    calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=run)
    assert run.numbers == [0, 1, 2, 3, 4]
    other.close()


def test_resuming_can_be_declined(tmp_path: Path):
    for resume, wanted in ((True, None), (True, 1), (False, None), (True, None)):
        found = work(tmp_path, resume=resume)
        assert found.stage("x").value("a") == wanted
        if not wanted and resume:
            found.stage("x").note("a", 1)
        found.close()


def test_a_stage_is_one_runs_at_a_time(tmp_path: Path):
    one, two = (Work(tmp_path) for _ in range(2))
    for either in (one, two):
        either.begin(model="m", data="d", source="s", target=str(id(either)))
    one.stage("x", a=1).note("n", 1)
    assert two.stage("x", a=1).folder is None
    assert "works on the same stage" in two.notes[0]
    assert two.stage("x", a=2).folder is not None
    one.close()
    two.close()


def test_a_named_folder_is_one_runs_at_a_time(tmp_path: Path):
    one = work(tmp_path)
    with pytest.raises(UsageError, match="another run works") as refusal:
        Work(tmp_path, asked=True)
    assert f"process {os.getpid()}" in refusal.value.why
    one.close()
    work(tmp_path).close()


def test_old_stages_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = work(tmp_path)
    for i in range(4):
        first.stage("x", i=i).keep("a", Parcel({}, {"a": np.zeros(1000)}))
        folder = first.stage("x", i=i).folder
        assert folder is not None
        os.utime(folder, (1e9 + i, 1e9 + i) if i < 1 else None)
    first.close()
    monkeypatch.setattr("mscompile.runs.work.KEPT_BYTES", 20_000)
    second = work(tmp_path)
    assert [second.stage("x", i=i).parcel("a") is not None for i in range(4)].count(True) == 2
    second.close()


def test_other_data_is_not_gone_on_with(tmp_path: Path):
    def begin(data: str, target: str = "t", *, resume: bool = True) -> Work:
        found = Work(tmp_path, resume=resume)
        with contextlib.closing(found):
            found.begin(model="m", data=data, source="s", target=target)
        return found

    begin("d")
    with pytest.raises(DataError, match="data changed"):
        begin("other")
    begin("other", "another")
    begin("d").finish()
    begin("other")
    with pytest.raises(DataError, match="data changed"):
        begin("d")
    begin("d", resume=False)


@pytest.mark.parametrize("asked", [True, False])
def test_a_work_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool):
    (tmp_path / "file").touch()
    if asked:
        with pytest.raises(ResourceError, match="cannot be written"):
            Work(tmp_path / "file" / "w", asked=True)
    else:
        assert "could not be resumed" in Work(tmp_path / "file" / "w").notes[0]
    found = Work(tmp_path / "w", asked=asked)
    found.begin(model="m", data="d", source="s", target="t")
    stage = found.stage("x")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if asked:
        with pytest.raises(ResourceError, match="cannot be written"):
            stage.keep("a", Parcel({}, {}))
    else:
        stage.keep("a", Parcel({}, {}))
        stage.note("b", 1)
        assert [note.rpartition(": ")[2] for note in found.notes] == ["No space left on device"]
        assert stage.value("b") is None


# --- locks ------------------------------------------------------------------------------------------------------------


def test_an_output_is_one_runs_at_a_time(tmp_path: Path):
    target = tmp_path / "out.onnx"
    with claimed(target):
        with pytest.raises(UsageError, match="another run writes"), claimed(target):
            pass
        with claimed(tmp_path / "other.onnx"):
            pass
    assert list(tmp_path.iterdir()) == []
    with claimed(target):
        pass


def test_what_a_killed_run_left_is_no_lock(tmp_path: Path):
    (tmp_path / f".out.onnx{HELD}").write_text("1\n")
    drafts = [tmp_path / ".out.onnx.abcd1234", tmp_path / ".out.onnx.abcd5678"]
    for draft, name in zip(drafts, ("out.onnx", "something else"), strict=True):
        draft.mkdir()
        (draft / name).write_text("half")
    with claimed(tmp_path / "out.onnx"):
        pass
    assert list(tmp_path.iterdir()) == [drafts[1]]


def test_a_lock_that_is_taken_over(tmp_path: Path):
    """The file that was locked first is gone: its lock is worth nothing."""
    path = tmp_path / "lock"
    first = acquire(path)
    assert first is not None
    assert acquire(path) is None
    path.unlink()
    second = acquire(path)
    assert second is not None
    first.close()
    assert acquire(path) is None
    second.close()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT counts, as it does not where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_what_is_being_written_is_finished_before_a_signal_counts():
    written = []

    def write() -> None:
        with finishing():
            signal.raise_signal(signal.SIGINT)
            written.append("the second file")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as it was


def test_no_signal_comes_after_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that did would find the handler gone, and end the process."""
    looking, late = threading.Event(), []

    def slow() -> int:
        looking.set()
        time.sleep(0.2)
        return 2

    monkeypatch.setattr(limits, "_resident", slow)
    before = signal.signal(signal.SIGALRM, lambda *_: late.append(True))
    try:
        with limits.Limits(memory=1):
            looking.wait()
        time.sleep(0.4)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not late
