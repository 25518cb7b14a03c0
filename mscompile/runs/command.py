"""How to run, as the command line has it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mscompile.errors import ResourceError, UsageError
from mscompile.terminal import End, plain, say

if TYPE_CHECKING:
    from mscompile.runs.run import Run
    from mscompile.runs.work import Work

RUNNING: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--work",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder for what the run finds on its way. [default: in the user's cache folder]",
    ),
    click.option("--cache/--no-cache", default=True, help="Keep anything at all, also measured latencies. [default: cache]"),
    click.option("--resume/--no-resume", default=True, help="Go on from what is kept there. [default: resume]"),
    click.option(
        "--workers",
        default="1",
        metavar="N",
        help="Processes that calibrate, and run an audit's trials; or ray, ray://HOST:PORT. [default: 1]",
    ),
    click.option("--memory-limit", metavar="SIZE", help="Memory to use at most: 2GB, 512MiB."),
    click.option("--time-limit", metavar="TIME", help="Time to take at most: 90s, 15m, 2h. The run can be resumed."),
)
VALUED = ("--work", "--workers", "--memory-limit", "--time-limit")
FLAGS = ("--cache", "--no-cache", "--resume", "--no-resume")
"""Their names, with a value and without."""
HOW = ("work", "resume", "workers", "memory_limit", "time_limit")
"""Names of those that are no options of what is done."""


def without_how(command: str) -> str:
    """A command line without those of its options that say how to run, and change nothing in what comes out."""
    kept, words = [], iter(shlex.split(command))
    for word in words:
        if word == "--":
            kept += [word, *words]
        elif word in VALUED:
            next(words, None)
        elif word not in FLAGS and word.partition("=")[0] not in VALUED:
            kept.append(word)
    return shlex.join(kept)


@contextlib.contextmanager
def running(
    *, work: Path | None, resume: bool, cache: bool, workers: str, memory_limit: str | None, time_limit: str | None
) -> Iterator[Run]:
    """Open what a run keeps, and whom it works with; where it is stopped, say how to go on.

    Raises
    ------
    ResourceError
        A limit stopped it.
    """
    from mscompile.runs.limits import Limits, Stopped, parse_bytes, parse_seconds
    from mscompile.runs.run import Run
    from mscompile.runs.work import Work, default_root
    from mscompile.runs.workers import crew_of

    if work is not None and not cache:
        why = "one names a folder to keep things in, the other keeps nothing"
        raise UsageError("two options contradict each other", where="--work, --no-cache", why=why, hint="leave one out")
    memory = None if memory_limit is None else parse_bytes(memory_limit)
    seconds = None if time_limit is None else parse_seconds(time_limit)
    with Work(work or (default_root() if cache else None), resume=resume, asked=work is not None) as kept:
        crew, limits = crew_of(workers), Limits(seconds, memory)
        try:
            with limits:
                yield Run(kept, crew, memory)
        except (KeyboardInterrupt, End):
            if kept.resumable:
                say(f"mscompile: what was found is kept: {_how(kept)}")
            raise
        except (Stopped, Exception):
            if (error := limits.exceeded) is None:
                raise
            hint = f"{error.hint}: {_how(kept)}" if kept.resumable else f"{error.hint}; nothing was kept to go on from"
            raise ResourceError(error.what, where=error.where, why=error.why, hint=hint) from None
        finally:
            if crew is not None:
                crew.close()


def _how(kept: Work) -> str:
    return f"the same command goes on from what is in {plain(str(kept.root), 4096)}"
