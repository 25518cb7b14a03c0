"""Workers: shards are handed out to processes here or elsewhere, and what they find is taken once each.

A worker that is gone, or slow, is no loss: its shard is given to another, and what comes twice is taken once. Since shards
are merged in their order, who did which does not show in the result.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mscompile.errors import ResourceError, UsageError
from mscompile.machine import cores
from mscompile.runs.parcel import Parcel
from mscompile.runs.work import versions
from mscompile.runs.worker import found_in, receive, send, widen

if TYPE_CHECKING:
    from mscompile.runs.run import Task

RETRIES = 2
"""Times that a shard is given to another worker after one was lost with it."""
SLOW = 3.0
"""Times the median time of a shard after which an idle worker does it, too."""
LEAST_SECONDS = 1.0
"""Time below which no worker is slow."""
DEPTH = 2
"""Shards that a worker is given at a time while there are enough for all: it need not wait for the next one."""
AHEAD = 8
"""Shards per worker that are begun beyond the first that is not done: what is found on them waits for its turn."""
LOOK_SECONDS = 0.2
"""Between looks at who is slow."""
LEFT_SECONDS = 30.0
"""After which a worker that is still at a shard of an earlier task is given up."""


Content = bytes | memoryview
"""Of a message."""


class LostError(Exception):
    """A worker is gone, with what it was doing."""


class LostWorkersError(ResourceError):
    """So is every other that was given the same to do."""


class Worker(Protocol):
    """Takes messages in turn, and answers each."""

    def send(self, content: bytes) -> Future[Content]:
        """The answer to come; LostError in its place if the worker is gone."""

    def stop(self) -> None:
        """End it, whatever it does."""


class Process:
    """A worker in a process of this machine."""

    def __init__(self, threads: int) -> None:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(  # noqa: S603  # ourselves
            [sys.executable, "-P", "-m", "mscompile.runs.worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for us: workers end when we do
        )
        assert self._process.stdin is not None
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._input, self._output = self._process.stdin, self._process.stdout
        for stream in (self._input, self._output):
            widen(stream)
        self._there, self._back = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def send(self, content: bytes) -> Future[Content]:
        """See `Worker`."""
        return self._back.submit(self._answer, self._there.submit(send, self._input, [content]))

    def _answer(self, sent: Future[None]) -> memoryview:
        try:
            sent.result()
            return receive(self._output)
        except (OSError, EOFError, ValueError) as error:
            raise LostError(f"process {self._process.pid} ended with status {self._process.wait()}") from error

    def stop(self) -> None:
        """See `Worker`."""
        self._process.kill()
        self._process.wait()
        for turn in (self._there, self._back):
            turn.shutdown(wait=True, cancel_futures=True)
        for stream in (self._input, self._output):
            with contextlib.suppress(OSError):  # what was not sent is lost
                stream.close()


@dataclass(frozen=True)
class Shard:
    """A shard that a worker was given, and when."""

    number: int
    worker: Worker
    since: float


class Crew:
    """A number of workers, who stay for more than one task.

    Parameters
    ----------
    size
        How many.
    hire
        Makes one.
    close
        What else is closed in the end.
    elsewhere
        Whether they have the memory of other machines.
    """

    def __init__(
        self, size: int, hire: Callable[[], Worker], close: Callable[[], object] = lambda: None, *, elsewhere: bool = False
    ) -> None:
        self.size, self.elsewhere, self._hire, self._close = size, elsewhere, hire, close
        self._idle: list[Worker] = []
        self._left: dict[Worker, tuple[list[Future[Content]], float]] = {}
        """Workers at what nobody waits for any more, and since when."""
        self._knows: dict[Worker, Task] = {}
        self._message: tuple[Task, bytes] | None = None

    def map(
        self, task: Task, numbers: Sequence[int], cut: Callable[[int], Parcel], done: Callable[[int], None]
    ) -> Generator[tuple[int, Parcel], None, None]:
        """What workers find on shards, in any order, each once. A worker is told of the task once, however often it comes.

        Whoever closes the generator has seen enough: what has been begun is done, and left aside.

        Parameters
        ----------
        cut
            A shard by its number.
        done
            Called with the number of a shard that is done.

        Raises
        ------
        LostWorkersError
            A shard was lost with every worker that tried it.
        MscompileError
            What a worker met, and any other would.
        """
        order = Handing(numbers)
        team: list[Worker] = []
        begun: dict[Future[Content], Shard] = {}
        try:
            while not order.finished:
                team += self._returned()
                while len(team) + len(self._left) < self.size:
                    team.append(self._idle.pop() if self._idle else self._hire())
                while (worker := _freest(team, begun)) is not None:
                    number = order.next(AHEAD * self.size, self.size if _load(worker, begun) else 0)
                    if number is None:
                        break
                    if self._knows.get(worker) is not task:
                        worker.send(self._packed(task))
                        self._knows[worker] = task
                    begun[worker.send(cut(number).pack())] = Shard(number, worker, time.monotonic())
                left = [future for futures, _ in self._left.values() for future in futures]
                for future in wait([*begun, *left], LOOK_SECONDS, FIRST_COMPLETED).done & begun.keys():
                    if (shard := begun.pop(future, None)) is None:
                        continue  # gone with its worker
                    try:
                        content = future.result()
                    except LostError as error:
                        order.lost(shard.number, error)
                        self._dismiss(shard.worker)
                        team.remove(shard.worker)
                        for queued in [f for f, other in begun.items() if other.worker is shard.worker]:
                            order.lost(begun.pop(queued).number)
                        continue
                    if order.take(shard.number, time.monotonic() - shard.since):
                        found = found_in(content)
                        done(shard.number)
                        yield shard.number, found
        except GeneratorExit:
            for future, shard in begun.items():
                self._left.setdefault(shard.worker, ([], time.monotonic()))[0].append(future)
            raise
        finally:
            busy = {shard.worker for shard in begun.values()}
            self._idle += [worker for worker in team if worker not in busy]
            for worker in busy - self._left.keys():
                self._dismiss(worker)

    def _packed(self, task: Task) -> bytes:
        """A task as a message."""
        if self._message is None or self._message[0] is not task:
            parcel = task.pack()
            self._message = task, Parcel({**parcel.header, "versions": versions()}, parcel.arrays).pack()
        return self._message[1]

    def _returned(self) -> Iterator[Worker]:
        """Those who have done what nobody waits for any more; who takes too long is given up."""
        for worker, (futures, since) in list(self._left.items()):
            over = all(future.done() for future in futures)
            if over or time.monotonic() - since > LEFT_SECONDS:
                del self._left[worker]
                if over and not any(future.exception() for future in futures):
                    yield worker
                else:
                    self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> None:
        self._knows.pop(worker, None)
        worker.stop()

    def close(self) -> None:
        """Let all workers go."""
        for worker in (*self._idle, *self._left):
            self._dismiss(worker)
        self._idle.clear()
        self._left.clear()
        self._close()


def _load(worker: Worker, begun: Mapping[Future[Content], Shard]) -> int:
    return sum(shard.worker is worker for shard in begun.values())


def _freest(team: Sequence[Worker], begun: Mapping[Future[Content], Shard]) -> Worker | None:
    """A worker that has nothing to do or, if there is none, little."""
    worker = min(team, key=lambda worker: _load(worker, begun), default=None)
    return None if worker is None or _load(worker, begun) >= DEPTH else worker


class Handing:
    """Which shard is next: those not begun in their order, then those that take others too long."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._waiting = deque(numbers)
        self._begun: dict[int, float] = {}
        self._doing: Counter[int] = Counter()
        self._lost: Counter[int] = Counter()
        self._open = sorted(numbers)
        self._seconds: list[float] = []

    @property
    def finished(self) -> bool:
        """Whether all shards are done."""
        return not self._open

    def next(self, ahead: int, spare: int = 0) -> int | None:
        """A shard to do now, not further ahead of the first open one than that; None to wait.

        Where some are to be to spare, for others, it is one of more, and none that another is late with.
        """
        number = None
        if len(self._waiting) > spare and self._waiting[0] < self._open[min(ahead, len(self._open)) - 1] + 1:
            number = self._waiting.popleft()
        elif self._seconds and not spare:
            patience = max(SLOW * statistics.median(self._seconds), LEAST_SECONDS)
            late = [i for i, since in self._begun.items() if self._doing[i] == 1 and time.monotonic() - since > patience]
            number = min(late, default=None)
        if number is not None:
            self._begun.setdefault(number, time.monotonic())
            self._doing[number] += 1
        return number

    def take(self, number: int, seconds: float) -> bool:
        """A shard is done; False where it was done before."""
        self._doing[number] -= 1
        if number not in self._begun:
            return False
        del self._begun[number]
        self._open.remove(number)
        self._seconds.append(seconds)
        return True

    def lost(self, number: int, error: LostError | None = None) -> None:
        """A worker is gone with a shard: it waits again, unless another is at it or has done it.

        Without an error the shard was not yet begun, and has nothing to do with it.
        """
        self._doing[number] -= 1
        if number not in self._begun:
            return
        self._lost[number] += error is not None
        if self._lost[number] > RETRIES:
            raise LostWorkersError(
                "workers are lost over and over",
                where=f"shard {number}, {self._lost[number]} times",
                why=str(error),
                hint="give them more memory, use fewer of them, or a smaller --batch-size; what others found is kept",
            )
        if not self._doing[number]:
            del self._begun[number]
            self._waiting.appendleft(number)


def crew_of(asked: str) -> Crew | None:
    """The crew that ``--workers`` names: a number of processes, or Ray; None for 1, which is this process.

    Raises
    ------
    UsageError
        It names neither.
    """
    if asked == "ray" or asked.startswith("ray://"):
        from mscompile.runs.on_ray import ray_crew

        return ray_crew(asked)
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(
            "there are no such workers",
            where=f"--workers {asked}",
            why="it is neither a positive number nor ray or ray://HOST:PORT",
            hint="write --workers 4",
        )
    count = int(asked)
    threads = max(1, cores() // count)
    return None if count == 1 else Crew(count, lambda: Process(threads))
