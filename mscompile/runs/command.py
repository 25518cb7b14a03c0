"""How to run, as the command line has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mscompile.errors import UsageError
from mscompile.terminal import End, plain, say

if TYPE_CHECKING:
    from mscompile.runs.run import Run

RUNNING: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--work",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder for what the run finds on its way. [default: in the user's cache folder]",
    ),
    click.option("--cache/--no-cache", default=True, help="Keep anything at all, also measured latencies. [default: cache]"),
    click.option("--resume/--no-resume", default=True, help="Go on from what is kept there. [default: resume]"),
)


@contextlib.contextmanager
def running(*, work: Path | None, resume: bool, cache: bool) -> Iterator[Run]:
    """Open what a run keeps; where it is stopped, say how to go on."""
    from mscompile.runs.run import Run
    from mscompile.runs.work import Work, default_root

    if work is not None and not cache:
        why = "one names a folder to keep things in, the other keeps nothing"
        raise UsageError("two options contradict each other", where="--work, --no-cache", why=why, hint="leave one out")
    kept = Work(work or (default_root() if cache else None), resume=resume, asked=work is not None)
    with kept:
        try:
            yield Run(kept)
        except (KeyboardInterrupt, End):
            if kept.begun is not None and kept.root is not None:
                where = plain(str(kept.root), 4096)
                say(f"mscompile: what was found is kept in {where}: the same command goes on from there")
            raise
