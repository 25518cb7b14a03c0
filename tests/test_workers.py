"""Workers: whoever sums up a shard, dies with it, is slow or delivers it twice, the result is the same bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_calibration import opened
from test_runs import BATCH, CNN, SAMPLES, equal

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.errors import DataError, ResourceError, UnsupportedError, UsageError
from mscompile.runs import worker as worker_module
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Run
from mscompile.runs.worker import Desk, found_in
from mscompile.runs.workers import RETRIES, Crew, LostError, Process, crew_of


class Scripted:
    """A worker in a thread; a script says what becomes of each shard: True is done, a number is slept first, None kills."""

    def __init__(self, script: Iterator[Any]) -> None:
        self._desk, self._script, self._turn = Desk(1), script, ThreadPoolExecutor(1)

    def send(self, content: bytes) -> Future[bytes]:
        act = True if "kind" in Parcel.unpack(content).header else next(self._script, True)
        return self._turn.submit(self._work, content, act)

    def _work(self, content: bytes, act: Any) -> bytes:
        if act is None:
            raise LostError("killed")
        STOPPED.wait(0.0 if act is True else act)
        return self._desk.answer(content)

    def stop(self) -> None:
        pass


STOPPED = threading.Event()
"""Ends all sleep."""


@pytest.fixture(scope="module", autouse=True)
def waking() -> Iterator[None]:
    yield
    STOPPED.set()


def scripted(size: int, acts: list[Any]) -> Crew:
    script = iter(acts)
    return Crew(size, lambda: Scripted(script))


def over(crew: Crew | None) -> Any:
    scm, samples = opened("cnn", SAMPLES)
    return calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=Run(crew=crew))


@pytest.fixture(scope="module")
def alone() -> Any:
    return over(None)


@pytest.mark.parametrize(
    ("size", "acts"),
    [
        pytest.param(1, [], id="one"),
        pytest.param(2, [], id="two"),
        pytest.param(7, [], id="more than shards"),
        pytest.param(3, [0.3, True], id="the first comes late"),
        pytest.param(2, [True, None], id="one dies"),
        pytest.param(2, [None, None, True, None], id="several die"),
        pytest.param(1, [None, None], id="the only one dies twice"),
    ],
)
def test_whoever_works_the_bits_are_the_same(alone: Any, size: int, acts: list[Any]):
    assert equal(over(scripted(size, acts)), alone)


def test_a_slow_worker_is_not_waited_for(alone: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mscompile.runs.workers.LEAST_SECONDS", 0.05)
    start = time.monotonic()
    assert equal(over(scripted(2, [60.0])), alone)
    assert time.monotonic() - start < 30


def test_what_comes_twice_is_taken_once(alone: Any, monkeypatch: pytest.MonkeyPatch):
    """Shard 0 takes so long that it is done twice while shards 1 to 4 keep the other busy: both are delivered."""
    monkeypatch.setattr("mscompile.runs.workers.LEAST_SECONDS", 0.05)
    assert equal(over(scripted(3, [0.6, True, True, True, 0.7, 0.1])), alone)


def test_a_shard_that_no_worker_survives():
    with pytest.raises(ResourceError, match="lost over and over") as error:
        over(scripted(2, [None] * 99))
    assert error.value.where in {f"shard {i}, {RETRIES + 1} times" for i in range(5)}


def test_processes(alone: Any):
    crew = Crew(2, lambda: Process(1))
    assert equal(over(crew), alone)
    assert equal(over(crew), alone)
    crew.close()


@dataclass(frozen=True)
class Deadly(Run):
    """Kills a worker as soon as the first shard is done."""

    hired: list[Process] = field(default_factory=list)

    def map(self, *arguments: Any) -> Iterator[tuple[int, Parcel]]:
        for i, found in enumerate(super().map(*arguments)):
            if not i:
                os.kill(self.hired[0]._process.pid, signal.SIGKILL)
            yield found


def test_a_process_that_is_killed(alone: Any):
    hired: list[Process] = []

    def hire() -> Process:
        hired.append(Process(1))
        return hired[-1]

    scm, samples = opened("cnn", SAMPLES)
    with contextlib.closing(Crew(2, hire)) as crew:
        run = Deadly(crew=crew, hired=hired)
        assert equal(calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=run), alone)
        for process in hired:  # while they have nothing to do
            if process._process.poll() is None:
                os.kill(process._process.pid, signal.SIGKILL)
        assert equal(over(crew), alone)
    assert all(process._process.poll() is not None for process in hired)


def test_workers_end_with_whoever_started_them():
    script = "import os; from mscompile.runs.workers import Process; print(Process(1)._process.pid, flush=True); os._exit(9)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # nobody is there to bury it
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_errors_of_workers_are_those_of_this_process():
    scm, samples = opened("mlp", SAMPLES)
    samples.labels[40] = 9  # type: ignore[index]
    measure = Measure(outputs={"y": 1.0}, curvature="fisher", gradient=True)
    for crew in (None, scripted(2, [])):
        with pytest.raises(DataError, match="a label is no class"):
            calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=measure, run=Run(crew=crew))


def test_a_worker_of_another_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "versions", lambda: {"mscompile": "0+1", "processor": "other", "provider": "cpu"})
    with pytest.raises(UnsupportedError, match="other versions"):
        over(scripted(2, []))


@pytest.mark.parametrize("content", [b"nonsense", Parcel({}, {"a": np.zeros(2)}).pack()])
def test_messages_out_of_turn(content: bytes):
    with pytest.raises(RuntimeError, match="a worker failed"):
        found_in(Desk(1).answer(content))


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5", "", "http://x"])
def test_workers_that_there_are_not(asked: str):
    with pytest.raises(UsageError, match="no such workers"):
        crew_of(asked)


def test_one_worker_is_this_process():
    assert crew_of("1") is None
