"""How to run, whatever is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mscompile.runs.parcel import Parcel
from mscompile.runs.work import NOWHERE, Work
from mscompile.runs.workers import Crew
from mscompile.runtime import Progress

Tick = Callable[[int], None]
"""Says how many batches more are done."""
Cut = Callable[[int], Parcel]
"""A shard by its number."""


class Task(Protocol):
    """What is done with shards."""

    def open(self, threads: int | None = None) -> Callable[[Parcel, Tick], Parcel]:
        """Get ready; gives what takes a shard and returns what is found on it."""

    def pack(self) -> Parcel:
        """All of it, to travel."""


@dataclass(frozen=True)
class Run:
    """Where a run keeps what it finds, and who works.

    Attributes
    ----------
    work
        The work folder.
    crew
        Workers; None for this process alone.
    memory
        Bytes to use at most.
    """

    work: Work = NOWHERE
    crew: Crew | None = None
    memory: int | None = None

    @property
    def sharing(self) -> int:
        """How many processes share the memory of this machine, where all work."""
        return 1 if self.crew is None or self.crew.elsewhere else self.crew.size

    def map(
        self, task: Task, numbers: Sequence[int], cut: Cut, tick: Tick, batches: Sequence[int]
    ) -> Generator[tuple[int, Parcel], None, None]:
        """What a task finds on shards of the given numbers, in any order, each once; `batches` of each shard are ticked."""
        if self.crew is not None and len(numbers) > 1:
            yield from self.crew.map(task, numbers, cut, lambda number: tick(batches[number]))
        elif numbers:
            work = task.open()
            for number in numbers:
                yield number, work(cut(number), tick)


ALONE = Run()
"""Keeps nothing, in this process alone."""


@contextlib.contextmanager
def counting(progress: Progress, description: str, total: int) -> Iterator[Tick]:
    """A progress bar that is moved by hand."""
    bar = progress(range(total), description, total)
    items = iter(bar)

    def tick(count: int) -> None:
        for _ in range(count):
            next(items, None)

    try:
        yield tick
    finally:
        if hasattr(items, "close"):
            items.close()
