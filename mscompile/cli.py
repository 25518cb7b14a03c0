"""The command line. Results go to stdout; everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mscompile.errors import MscompileError, ResourceError, UsageError

if TYPE_CHECKING:
    from mscompile.inspection import Inspection
    from mscompile.pipeline import Compilation
    from mscompile.report import LawReport, Report
    from mscompile.runtime import Progress

ROWS = 60
"""Sites listed at most; the report file lists all."""
NAME = 44
"""Characters of a name that still stands in one line with its numbers on a terminal."""
WIDE = 1000
"""Columns of an output that is no terminal: nothing is wrapped there, so that lines can be searched."""


class _DefaultToCompile(click.Group):
    """``mscompile MODEL.onnx`` means ``mscompile compile MODEL.onnx``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        if args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from mscompile.version import __version__

        click.echo(f"mscompile {__version__}")
        ctx.exit()


@click.group(cls=_DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Compile a trained ONNX network into a smaller one that is a verified causal abstraction of it.

    \b
    mscompile MODEL.onnx              smallest model that is certified to agree
                                      with MODEL under interchange (IIA >= 0.95)
    mscompile MODEL.onnx --keep 0.5   half of the channels of every site
    mscompile inspect MODEL.onnx      what can be cut, and why the rest is not
    mscompile compile --help          all options of compiling
    """


@cli.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. [default: MODEL.ms.onnx]")
@click.option(
    "--calib",
    metavar="SRC",
    help="Data: .npz, .npy, .safetensors, a folder, script.py. [default: MODEL.calib.npz beside the model]",
)
@click.option(
    "--fidelity", type=float, metavar="F", help="Smallest model whose IIA is certified to be at least F. [default: 0.95]"
)
@click.option(
    "--keep",
    multiple=True,
    metavar="[SITE=]N",
    help="Share of the channels to keep at every site, or at one: SITE=0.5 (share), SITE=128 (number). Repeatable.",
)
@click.option(
    "--objective",
    default="logit-mse",
    show_default=True,
    help="Score: logit-mse, kl, cross-entropy, cwvar, variance, magnitude, random.",
)
@click.option("--selection", default="joint", show_default=True, help="Choose units by joint elimination, or additive.")
@click.option("--probes", type=click.IntRange(min=1), default=4, show_default=True, help="Random seeds of the curvature.")
@click.option(
    "--replacement", default="affine", show_default=True, help="affine, affine-pointwise, affine-parents or constant."
)
@click.option("--law", default="one-site", show_default=True, help="Interchange at one-site a trial, or all-sites.")
@click.option("--swap", type=float, default=0.1, show_default=True, help="Interchange probability of each retained unit.")
@click.option("--delta", type=float, default=0.05, show_default=True, help="Error probability of the certificate.")
@click.option("--metric", help="Agreement: argmax, distance or cosine. [default: by the output's shape]")
@click.option("--labels", metavar="NAME", help="Name of the labels in the data.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Samples to use at most.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--only", metavar="REGEX", help="Cut only sites whose name matches.")
@click.option("--freeze", metavar="REGEX", help="Never cut sites whose name matches.")
@click.option("--force", is_flag=True, help="Overwrite existing outputs.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
@click.option("-v", "--verbose", count=True, help="Timings and warnings of libraries; -vv: tracebacks.")
@click.pass_obj
def compile_command(
    command: str,
    /,
    model: Path,
    output: Path | None,
    calib: str | None,
    fidelity: float | None,
    keep: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: int,
    force: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Compile MODEL into a smaller, verified ONNX file."""
    from mscompile.options import Options
    from mscompile.pipeline import compile_model

    if keep and fidelity is not None:
        raise UsageError(
            "there are two goals", where="--keep, --fidelity", why="only one can lead the search", hint="leave one out"
        )
    if fidelity is not None:
        chosen["fidelity"] = fidelity
    options = Options(keep=_parse_keep(keep), **chosen)
    silent = quiet or as_json
    with _bars(silent=silent) as progress:
        result = compile_model(
            model,
            calib,
            output if output is not None else model.parent / f"{model.stem}.ms.onnx",
            options,
            force=force,
            dry_run=dry_run,
            command=command,
            progress=progress,
            on_warning=lambda text: None if silent else _say(f"warning: {plain(text, 1000)}", fg="yellow"),
        )
    if as_json:
        _result(_ascii(result.report.model_dump_json()))
        return
    if not quiet:
        _say("\n".join(_report_lines(result.report, _width(sys.stderr), timings=verbose > 0)))
    _result(_verdict(result))


@cli.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-v", "--verbose", count=True, help="-vv: tracebacks.")
def inspect_command(model: Path, as_json: bool, verbose: int) -> None:
    """List the sites of MODEL, their units, and what will be left alone and why."""
    del verbose  # read by `run` from the command line, so that it holds for every error
    from mscompile.pipeline import inspect_model

    inspection = inspect_model(model)
    if as_json:
        import json

        _result(json.dumps(_inspection_data(inspection)))
    else:
        _result("\n".join(_inspection_lines(inspection, _width(sys.stdout))))


def _parse_keep(entries: tuple[str, ...]) -> float | Mapping[str, float | int] | None:
    """``0.5`` for all sites, or ``SITE=0.5`` and ``SITE=128``."""
    if not entries:
        return None
    where = "--keep " + " --keep ".join(entries)
    if any("=" not in entry for entry in entries):
        if len(entries) > 1:
            raise UsageError(
                "one share for all sites stands alone",
                where=where,
                why="a share without a site is for every site",
                hint="name a site in each: --keep SITE=0.5",
            )
        return _number(entries[0], entries[0], whole=False)
    named: dict[str, float | int] = {}
    for entry in entries:
        site, _, text = entry.rpartition("=")
        if site in named:
            raise UsageError("a site is named twice", where=where, why=f"two numbers for {site!r}", hint="leave one out")
        named[site] = _number(text, entry, whole=True)
    return named


def _number(text: str, entry: str, *, whole: bool) -> float | int:
    try:
        return int(text) if whole and re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
    except ValueError:
        raise UsageError(
            "this is no number", where=f"--keep {entry}", why=f"{text!r} cannot be read", hint="write 0.5, or SITE=128"
        ) from None


# --- words ------------------------------------------------------------------------------------------------------------


def plain(text: str, limit: int = 200) -> str:
    """Text from outside made safe for a terminal: no control characters, one line, not too long."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _say(text: str, **style: Any) -> None:
    """Print to stderr, in colour only where that is wanted."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(click.style(text, **style) if style and not os.environ.get("NO_COLOR") else text, err=True)


def _result(text: str) -> None:
    """Print to stdout."""
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed in the end
        raise _End(141) from None
    except OSError as error:
        raise ResourceError(
            "the result cannot be printed",
            where="standard output",
            why=error.strerror or str(error),
            hint="check where it is redirected to",
        ) from error


def _ascii(document: str) -> str:
    """A JSON text in ASCII only, which no terminal or pipe can garble."""
    return "".join(c if c < "\x7f" else c.encode("unicode_escape").decode() for c in document)


def _width(stream: Any) -> int:
    return max(shutil.get_terminal_size().columns, 40) if stream.isatty() else WIDE


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int, *, text: bool = False) -> list[str]:
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


def _note(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


# --- progress ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bars(*, silent: bool) -> Iterator[Progress]:
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


# --- what is printed --------------------------------------------------------------------------------------------------


def _report_lines(report: Report, width: int, *, timings: bool) -> Iterator[str]:
    yield from _site_lines(report, width)
    yield ""
    yield from _size_lines(report, width)
    yield ""
    if report.fidelity is not None:
        yield from _fidelity_lines(report, width)
        yield ""
    if report.fold_error is not None:
        yield from _note(f"largest rounding error of the rewrite: {report.fold_error:.1e} of the outputs' spread", width)
    if report.compiled is not None:
        stem = Path(report.compiled.path or "")
        yield from _note(
            plain(f"beside it: {stem.with_suffix('.plan.json').name}, {stem.with_suffix('.report.json').name}"), width
        )
    if timings:
        spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.timings.items())
        yield from _note(f"time: {spent}", width)


def _site_lines(report: Report, width: int) -> Iterator[str]:
    """What was cut at each site, and what that is predicted to cost."""
    cut = [site for site in report.sites if site.left_alone is None]
    bases = list(dict.fromkeys(site.basis for site in cut if site.predicted_risk is not None and site.basis))
    marks = dict(zip(bases, ("", "*", "†", "‡"), strict=False))
    rows = []
    for site in cut[:ROWS]:
        risk = "" if site.predicted_risk is None else f"{site.predicted_risk:.3g}"
        mark = marks.get(site.basis or "", "") if risk else ""
        rows.append(
            (plain(site.name), f"{site.size:,}", f"{site.width:,}", risk + (mark if len(marks) < 2 else f"{mark:1}"))
        )
    if bases:
        yield from _table(("site", "channels", "left", "risk" if len(bases) < 2 else "risk "), rows, width)
    else:
        yield from _table(("site", "channels", "left"), [row[:3] for row in rows], width)
    if len(cut) > ROWS:
        yield f"and {len(cut) - ROWS} more, which the report lists"
    if bases:
        listed = "; ".join(f"{marks.get(basis, '')} {plain(basis)}".strip() for basis in bases)
        yield from _note(f"risk: predicted cost of what was replaced, in {listed}", width)
    if left := len(report.sites) - len(cut):
        yield from _note(
            f"{left} more {'site is' if left == 1 else 'sites are'} left alone: `mscompile inspect` says why", width
        )


def _size_lines(report: Report, width: int) -> Iterator[str]:
    dense, compiled = report.sizes.dense, report.sizes.compiled
    rows = []
    for name, a, b, form in (
        ("parameters", dense.params, compiled.params, ","),
        ("multiply-accumulates", dense.macs, compiled.macs, ","),
        ("bytes", dense.bytes, compiled.bytes, ","),
        (f"ms per batch of {report.sizes.latency_batch}", dense.latency_ms, compiled.latency_ms, ".3g"),
    ):
        if a is not None and b is not None:
            rows.append((name, format(a, form), format(b, form), f"{b / a:.1%}" if a else ""))
    yield from _table(("size", "dense", "compiled", "share"), rows, width)


def _fidelity_lines(report: Report, width: int) -> Iterator[str]:
    fidelity = report.fidelity
    assert fidelity is not None
    laws: list[LawReport] = [fidelity, *fidelity.stress]
    rows = []
    for law in sorted(laws, key=lambda entry: (entry.law != fidelity.law, entry.swap)):
        kl = "" if law.kl is None else f"{law.kl:.3g}"
        bound = f"{fidelity.iia_lower:.4f}" if law is fidelity else ""
        rows.append((law.law, f"{law.swap:g}", f"{law.iia:.4f}", bound, f"{law.logit_mse_relative:.3g}", kl))
    yield from _table(("interchange", "swap", "IIA", "certified", "logit MSE", "KL"), rows, width)
    classes = ", KL in nats" if fidelity.kl is not None else ""
    note = (
        f"agreement by {plain(fidelity.metric)} over {fidelity.trials:,} trials each; logit MSE over the variance{classes}"
    )
    yield from _note(note, width)
    accuracy = ""
    if fidelity.accuracy_dense is not None and fidelity.accuracy_compiled is not None:
        accuracy = f"; accuracy {fidelity.accuracy_dense:.4f} dense, {fidelity.accuracy_compiled:.4f} compiled"
    yield from _note(f"without intervention: agreement {fidelity.agreement:.4f}{accuracy}", width)


def _verdict(result: Compilation) -> str:
    report = result.report
    share = report.sizes.compiled.params / report.sizes.dense.params if report.sizes.dense.params else 1.0
    where = "nothing written (dry run)" if result.path is None else plain(str(result.path), 4096)
    fidelity = report.fidelity
    if fidelity is None:
        return f"{where}: {share:.1%} of the parameters; fidelity not measured"
    return (
        f"{where}: {share:.1%} of the parameters; IIA {fidelity.iia:.4f}, at least {fidelity.iia_lower:.4f} with confidence "
        f"{1 - fidelity.delta:g} ({fidelity.law}, swap {fidelity.swap:g}, {fidelity.trials} trials)"
    )


def _inspection_data(inspection: Inspection) -> dict[str, Any]:
    from mscompile.inspection import readers_of

    return {
        "sites": [
            {
                "name": site.tensor,
                "axis": site.axis,
                "size": site.size,
                "readers": readers_of(site),
                "left_alone": inspection.left_alone[site.tensor],
            }
            for site in inspection.scm.sites
        ],
        "coverage": [entry.model_dump() for entry in inspection.coverage],
        "reachable": inspection.reachable,
    }


def _inspection_lines(inspection: Inspection, width: int) -> Iterator[str]:
    from mscompile.inspection import readers_of

    rows = []
    for site in inspection.scm.sites:
        reason = inspection.left_alone[site.tensor]
        readers = plain(", ".join(readers_of(site)[:8]))
        verdict = f"read by {readers}" if reason is None else f"left alone: {plain(reason)}"
        rows.append((plain(site.tensor), str(site.axis), f"{site.size:,}", verdict))
    if rows:
        yield from _table(("site", "axis", "channels", ""), rows, width, text=True)
    else:
        yield "no site: no operator contracts a channel axis with a weight"
    left = [entry for entry in inspection.coverage if entry.status == "left alone"]
    if left:
        yield ""
        weights = [(plain(w.tensor), "×".join(map(str, w.shape)), plain(w.reason or "", 400)) for w in left]
        yield from _table(("weight left alone", "shape", "why"), weights, width, text=True)
    yield ""
    yield from _note(f"{inspection.reachable:.1%} of the weight elements can be cut on at least one axis", width)


# --- errors -----------------------------------------------------------------------------------------------------------


def _error_text(error: MscompileError) -> str:
    """The four parts of an error. Only hints, which are ours, keep their lines; others continue indented."""
    parts = [f"mscompile: {plain(error.what, 1000)}"]
    for label, text in (("where", error.where), ("why", error.why), ("try", error.hint)):
        lines = [plain(line.strip() if label != "try" else line, 4096) for line in text.splitlines()[:200]] or [""]
        indent = "" if label == "try" else " " * 9
        parts.append(f"  {label + ':':<6} " + f"\n{indent}".join(lines))
    return "\n".join(parts)


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mscompile"
    why = error.format_message()
    return UsageError("the command line is not understood", where=command, why=why, hint=f"see `{command} --help`")


def _crash(error: Exception, command: str) -> MscompileError:
    """What to say about a bug of ours; the traceback goes to a file."""
    report = f"{command}\n" + "".join(traceback.format_exception(error))
    hint = "report it with what -vv prints"
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="mscompile-crash-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(report)
        hint = f"report it with the file {file.name}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = next((f for f in reversed(frames) if Path(__file__).parent in Path(f.filename).parents), frames[-1])
    where = f"{Path(ours.filename).name}, line {ours.lineno}"
    return MscompileError("this is a bug in mscompile", where=where, why=f"{type(error).__name__}: {error}", hint=hint)


class _End(BaseException):
    """The end, with an exit code. Not an Exception, so that nothing on the way mistakes it for an error of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _terminate(*_: object) -> NoReturn:
    raise _End(143)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; every ending has its exit code."""
    verbosity = sum(len(a) - 1 if re.fullmatch("-v+", a) else a == "--verbose" for a in arguments)
    command = shlex.join(["mscompile", *arguments])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    try:
        with _quiet_libraries(verbosity):
            code = cli.main(args=list(arguments), prog_name="mscompile", standalone_mode=False, obj=command)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _say("mscompile: interrupted")
        return 130
    except _End as end:
        return end.code
    except click.ClickException as error:
        _say(_error_text(_usage_error(error)))
        return UsageError.exit_code
    except Exception as error:
        if verbosity >= 2:
            traceback.print_exc()
        if isinstance(error, MemoryError):
            hint = "use fewer --samples or a smaller --batch-size"
            error = ResourceError("memory ran out", where=command, why=str(error) or "MemoryError", hint=hint)
        ours = error if isinstance(error, MscompileError) else _crash(error, command)
        _say(_error_text(ours))
        return ours.exit_code
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _quiet_libraries(verbosity: int) -> Iterator[None]:
    """Keep warnings of libraries, which are not addressed to users, off the screen unless asked for."""
    import logging
    import warnings

    with warnings.catch_warnings():
        if not verbosity and not sys.warnoptions:
            warnings.simplefilter("ignore")
            logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        yield


def main() -> NoReturn:
    """Entry point."""
    signal.signal(signal.SIGTERM, _terminate)  # unwinding removes temporary files
    sys.exit(run(sys.argv[1:]))
