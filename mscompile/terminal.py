"""What a user sees: text made safe, tables, progress bars. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from mscompile.errors import MscompileError, ResourceError

if TYPE_CHECKING:
    from mscompile.runtime import Progress

NAME = 44
"""Characters of a name that still stands in one line with its numbers on a terminal."""
MARGIN = " " * 9
"""Before the lines of an error's parts."""
WIDE = 1000
"""Columns of an output that is no terminal: nothing is wrapped there, so that lines can be searched."""


class End(BaseException):
    """The end, with an exit code. Not an Exception, so that nothing on the way mistakes it for an error of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def plain(text: str, limit: int = 200) -> str:
    """Text from outside made safe for a terminal: no control characters, one line, not too long."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(text: str, **style: Any) -> None:
    """Print to stderr, in colour only where that is wanted."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(click.style(text, **style) if style and not os.environ.get("NO_COLOR") else text, err=True)


def answer(text: str) -> None:
    """Print to stdout."""
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed in the end
        raise End(141) from None
    except OSError as error:
        raise ResourceError(
            "the result cannot be printed",
            where="standard output",
            why=error.strerror or str(error),
            hint="check where it is redirected to",
        ) from error


def ascii_json(document: str) -> str:
    """A JSON text in ASCII only, which no terminal or pipe can garble."""
    return json.dumps(json.loads(document))


def width_of(stream: Any) -> int:
    """Columns to fill."""
    return max(shutil.get_terminal_size().columns, 40) if stream.isatty() else WIDE


def table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int, *, text: bool = False) -> list[str]:
    """Lines of a table: names to the left, numbers to the right, and, with `text`, a last column that is wrapped.

    A name too long for its column takes a line of its own: names are there to be copied.
    """
    cells = [header, *rows]
    count = len(header) - text
    widths = [max(len(row[i]) for row in cells) for i in range(count)]
    rest = sum(widths[1:]) + 2 * (count - 1)
    free = max(len(row[-1]) for row in cells) + 2 if text else 0
    room = min(max(width - rest - min(free, 34), 16), WIDE if width == WIDE else NAME)
    widths[0] = max((len(row[0]) for row in cells if len(row[0]) <= room), default=16)
    lines = []
    for row in cells:
        name = row[0]
        if len(name) > widths[0]:
            lines.append(name)
            name = ""
        line = name.ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:count], widths[1:], strict=True))
        if text:
            left = widths[0] + rest + 2
            wrapped = textwrap.wrap(row[-1], max(width - left, 20), break_on_hyphens=False) or [""]
            line = f"\n{' ' * left}".join([f"{line}  {wrapped[0]}", *wrapped[1:]])
        lines.append(line.rstrip())
    return lines


def sentence(text: str, width: int) -> list[str]:
    """Lines of a sentence."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


@contextlib.contextmanager
def bars(*, silent: bool) -> Iterator[Progress]:
    """Progress bars on a terminal, for whatever takes longer than a second; they vanish in the end."""
    if silent or not sys.stderr.isatty():
        from mscompile.runtime import no_progress

        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Late(Progress):
        def get_renderables(self) -> Iterator[Any]:
            late = [task for task in self.tasks if (task.elapsed or 0.0) > 1.0]
            if late:
                yield self.make_tasks_table(late)

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Late(*columns, console=Console(stderr=True), transient=True) as progress:

        def show(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
            task = progress.add_task(description, total=total)
            try:
                for item in items:
                    yield item
                    progress.advance(task)
            finally:
                progress.remove_task(task)

        yield show


def error_text(error: MscompileError, width: int) -> str:
    """The four parts of an error. Only hints, which are ours, keep their lines; others continue indented."""
    parts = [f"mscompile: {plain(error.what, 1000)}"]
    for label, text in (("where:", error.where), ("why:  ", error.why), ("try:  ", error.hint)):
        lines = [plain(line, 4096) for line in text.splitlines()[:200]] or [""]
        if label == "try:  ":
            first, *rest = lines
            parts += [f"  {label} {_hang(first, width)}", *rest]
        else:
            parts.append(f"  {label} " + f"\n{MARGIN}".join(_hang(line.strip(), width) for line in lines))
    return "\n".join(parts)


def _hang(text: str, width: int) -> str:
    """A text wrapped between words, to stand behind a margin."""
    if len(MARGIN + text) <= width or width == WIDE:
        return text
    lines = textwrap.wrap(text, max(width - len(MARGIN), 20), break_long_words=False, break_on_hyphens=False)
    return f"\n{MARGIN}".join(lines)
