"""Workers: shards are handed out to processes here or elsewhere, and what they find is taken once each.

A worker that is gone, or slow, is no loss: its shard is given to another, and what comes twice is taken once. Since shards
are merged in their order, who did which does not show in the result.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mscompile.errors import ResourceError, UsageError
from mscompile.runs.parcel import Parcel
from mscompile.runs.work import versions
from mscompile.runs.worker import found_in, receive, send

if TYPE_CHECKING:
    from mscompile.runs.run import Task

RETRIES = 2
"""Times that a shard is given to another worker after one was lost with it."""
SLOW = 3.0
"""Times the median time of a shard after which an idle worker does it, too."""
LEAST_SECONDS = 1.0
"""Time below which no worker is slow."""
AHEAD = 8
"""Shards per worker that are begun beyond the first that is not done: what is found on them waits for its turn."""
LOOK_SECONDS = 0.2
"""Between looks at who is slow."""
LEFT_SECONDS = 30.0
"""After which a worker that is still at a shard of an earlier task is given up."""


class LostError(Exception):
    """A worker is gone, with what it was doing."""


class LostWorkersError(ResourceError):
    """So is every other that was given the same to do."""


class Worker(Protocol):
    """Takes messages in turn, and answers each."""

    def send(self, content: bytes) -> Future[bytes]:
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
        self._turn = ThreadPoolExecutor(1)

    def send(self, content: bytes) -> Future[bytes]:
        """See `Worker`."""
        return self._turn.submit(self._exchange, content)

    def _exchange(self, content: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, content)
            return receive(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:
            raise LostError(f"process {self._process.pid} ended with status {self._process.wait()}") from error

    def stop(self) -> None:
        """See `Worker`."""
        self._process.kill()
        self._process.wait()
        self._turn.shutdown(wait=True, cancel_futures=True)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not sent is lost
                stream.close()


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
    """

    def __init__(self, size: int, hire: Callable[[], Worker], close: Callable[[], object] = lambda: None) -> None:
        self.size, self._hire, self._close = size, hire, close
        self._idle: list[Worker] = []
        self._busy: dict[Future[bytes], tuple[Worker, int, float]] = {}
        self._left: dict[Future[bytes], tuple[Worker, int, float]] = {}
        """Shards that nobody waits for any more."""
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
        ready, busy = list[Worker](), self._busy
        try:
            while not order.finished:
                ready += self._returned()
                while len(ready) + len(busy) + len(self._left) < self.size:
                    ready.append(self._idle.pop() if self._idle else self._hire())
                while ready and (number := order.next(AHEAD * self.size)) is not None:
                    worker = ready.pop()
                    if self._knows.get(worker) is not task:
                        worker.send(self._packed(task))
                        self._knows[worker] = task
                    busy[worker.send(cut(number).pack())] = worker, number, time.monotonic()
                for future in wait([*busy, *self._left], LOOK_SECONDS, FIRST_COMPLETED).done & busy.keys():
                    worker, number, since = busy.pop(future)
                    try:
                        content = future.result()
                    except LostError as error:
                        self._dismiss(worker)
                        order.lost(number, error)
                        continue
                    ready.append(worker)
                    if order.take(number, time.monotonic() - since):
                        found = found_in(content)
                        done(number)
                        yield number, found
        except GeneratorExit:
            self._left.update(busy)
            busy.clear()
            raise
        finally:
            self._idle += ready
            self._stop(busy)

    def _packed(self, task: Task) -> bytes:
        """A task as a message."""
        if self._message is None or self._message[0] is not task:
            parcel = task.pack()
            self._message = task, Parcel({**parcel.header, "versions": versions()}, parcel.arrays).pack()
        return self._message[1]

    def _returned(self) -> Iterator[Worker]:
        """Those who have done what nobody waits for any more; who takes too long is given up."""
        for future, (worker, _, since) in list(self._left.items()):
            if future.done() or time.monotonic() - since > LEFT_SECONDS:
                del self._left[future]
                if future.done() and future.exception() is None:
                    yield worker
                else:
                    self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> None:
        self._knows.pop(worker, None)
        worker.stop()

    def _stop(self, busy: dict[Future[bytes], tuple[Worker, int, float]]) -> None:
        for worker, _, _ in busy.values():
            self._dismiss(worker)
        busy.clear()

    def close(self) -> None:
        """Let all workers go."""
        for busy in (self._busy, self._left):
            self._stop(busy)
        for worker in self._idle:
            self._dismiss(worker)
        self._idle.clear()
        self._close()


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

    def next(self, ahead: int) -> int | None:
        """A shard to do now, not further ahead of the first open one than that; None to wait."""
        number = None
        if self._waiting and self._waiting[0] < self._open[min(ahead, len(self._open)) - 1] + 1:
            number = self._waiting.popleft()
        elif self._seconds:
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

    def lost(self, number: int, error: LostError) -> None:
        """A worker is gone with a shard: it waits again, unless another is at it or has done it."""
        self._doing[number] -= 1
        if number not in self._begun:
            return
        self._lost[number] += 1
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
            why="it is neither a number nor ray or ray://HOST:PORT",
            hint="write --workers 4",
        )
    count = int(asked)
    threads = max(1, (os.cpu_count() or 1) // count)
    return None if count == 1 else Crew(count, lambda: Process(threads))
