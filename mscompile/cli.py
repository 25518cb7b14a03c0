"""The command line. Results go to stdout; everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mscompile.audit.commands import audit_command, report_command
from mscompile.errors import MscompileError, ResourceError, UsageError
from mscompile.intake.trial import TRIALS
from mscompile.providers import choose
from mscompile.runs.command import HOW, RUNNING, running
from mscompile.stage_commands import (
    ANCHORS,
    OUTPUTS,
    PROVIDER,
    TRUST,
    apply_command,
    calibrate_command,
    given_options,
    parse_keep,
    parse_outputs,
    plan_command,
    with_options,
)
from mscompile.terminal import End, answer, ascii_json, bars, error_text, plain, say, sentence, table, width_of

if TYPE_CHECKING:
    from mscompile.network.inspection import Inspection
    from mscompile.pipeline import Compilation
    from mscompile.report import LawReport, Report

ROWS = 60
"""Sites listed at most; the report file lists all."""


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
    mscompile audit DENSE SMALL --data SRC   is SMALL an abstraction of DENSE?
    mscompile compile --help          all options of compiling

    The stages alone: calibrate, plan, apply.
    """


for _command in (calibrate_command, plan_command, apply_command, audit_command, report_command):
    cli.add_command(_command)


@cli.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), help="File to write. [default: MODEL.ms.onnx]")
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
@click.option("--params", type=float, metavar="SHARE", help="Share of the parameters to reach, at least risk.")
@click.option("--macs", type=float, metavar="SHARE", help="Share of the multiply-accumulates to reach, at least risk.")
@click.option("--latency", type=float, metavar="SHARE", help="Share of the time per batch to reach, as measured here.")
@click.option(
    "--recalibrate/--no-recalibrate", default=True, help="Fit readers again on the compiled network. [default: recalibrate]"
)
@click.option(
    "--objective",
    default="logit-mse",
    show_default=True,
    help="Score: logit-mse, kl, cross-entropy, cwvar, variance, magnitude, random.",
)
@click.option("--selection", default="joint", show_default=True, help="Choose units by joint elimination, or additive.")
@click.option("--probes", type=click.IntRange(min=1), default=4, show_default=True, help="Random seeds of the curvature.")
@ANCHORS
@OUTPUTS
@click.option(
    "--replacement", default="affine", show_default=True, help="affine, affine-pointwise, affine-parents or constant."
)
@click.option("--law", default="one-site", show_default=True, help="Interchange law: one-site or all-sites.")
@click.option("--swap", type=float, default=0.1, show_default=True, help="Interchange probability of each retained unit.")
@click.option("--delta", type=float, default=0.05, show_default=True, help="Error probability of the certificate.")
@click.option("--metric", help="Agreement: argmax, kl, distance, cosine, equality. [default: by the output]")
@click.option("--labels", metavar="NAME", help="Name of the labels in the data.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Samples to use at most.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="[default: 64, or as many as fit]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--only", metavar="REGEX", help="Cut only sites whose name matches.")
@click.option("--freeze", metavar="REGEX", help="Never cut sites whose name matches.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where the report goes. [default: beside the file written, where audit looks for it]",
)
@click.option("--html", type=click.Path(path_type=Path), metavar="PATH", help="One offline page to write.")
@with_options(*RUNNING, PROVIDER, TRUST)
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
    outputs: tuple[str, ...],
    report: Path | None,
    html: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    force: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Compile MODEL into a smaller, verified ONNX file."""
    from mscompile.files import beside
    from mscompile.options import Options, idle
    from mscompile.pipeline import compile_model

    goals = {"keep": keep or None, "fidelity": fidelity, **{name: chosen[name] for name in ("params", "macs", "latency")}}
    given = [f"--{name}" for name, goal in goals.items() if goal is not None]
    if len(given) > 1:
        raise UsageError(
            "there are two goals", where=", ".join(given), why="only one can lead the search", hint="leave one out"
        )
    if fidelity is not None:
        chosen["fidelity"] = fidelity
    how = {name: chosen.pop(name) for name in HOW}
    options = Options(keep=parse_keep(keep), output=parse_outputs(outputs), **chosen)
    silent = quiet or as_json

    def warn(text: str) -> None:
        if not silent:
            say(f"warning: {plain(text, 1000)}", fg="yellow")

    for text in idle(options, given_options()):
        warn(text)
    with running(cache=options.cache, **how) as run, bars(silent=silent) as progress:
        result = compile_model(
            model,
            calib,
            output if output is not None else beside(model, ".ms.onnx"),
            options,
            report=report,
            html=html,
            force=force,
            dry_run=dry_run,
            command=command,
            run=run,
            progress=progress,
            on_warning=warn,
        )
    if as_json:
        answer(ascii_json(result.report.model_dump_json()))
        return
    if not quiet:
        say("\n".join(_report_lines(result, width_of(sys.stderr), timings=verbose > 0)))
    answer(_verdict(result))


@cli.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@TRUST
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-v", "--verbose", count=True, help="-vv: tracebacks.")
def inspect_command(model: Path, as_json: bool, verbose: int) -> None:
    """List what of MODEL can be cut, and why the rest cannot."""
    del verbose  # read by `run` from the command line, so that it holds for every error
    from mscompile.pipeline import inspect

    inspection = inspect(model)
    if as_json:
        import json

        answer(json.dumps(_inspection_data(inspection)))
    else:
        answer("\n".join(_inspection_lines(inspection, width_of(sys.stdout))))


# --- what is printed --------------------------------------------------------------------------------------------------


def _report_lines(result: Compilation, width: int, *, timings: bool) -> Iterator[str]:
    report = result.report
    yield from _site_lines(report, width)
    yield ""
    yield from _size_lines(report, width)
    yield ""
    if report.fidelity is not None:
        yield from _fidelity_lines(report, width)
        yield ""
    yield from _frontier_lines(report, width)
    if report.fold_error is not None:
        yield from sentence(f"largest rounding error of the rewrite: {report.fold_error:.1e} of the outputs' spread", width)
    if result.path is not None:
        others = (path for path in result.files.all if path != result.path)
        listed = (path.name if path.parent == result.path.parent else str(path) for path in others)
        yield from sentence(plain(f"beside it: {', '.join(listed)}", 4096), width)
    if report.reused:
        yield from sentence(f"found in the work folder, and not done again: {plain(', '.join(report.reused), 1000)}", width)
    if timings:
        spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.timings.items())
        yield from sentence(f"time: {spent}", width)


def _site_lines(report: Report, width: int) -> Iterator[str]:
    """What was cut at each site, and what that is predicted and found to cost."""
    cut = [site for site in report.sites if site.left_alone is None]
    bases = list(dict.fromkeys(site.basis for site in cut if site.predicted_risk is not None and site.basis))
    marks = dict(zip(bases, ("", "*", "†", "‡"), strict=False))
    pad = "" if len(bases) < 2 else " "
    rows = []
    for site in cut[:ROWS]:
        risks = [f"{risk:.3g}" if risk is not None else "" for risk in (site.predicted_risk, site.measured_risk)]
        mark = marks.get(site.basis or "", "") or pad
        rows.append((plain(site.name), f"{site.size:,}", f"{site.width:,}", risks[0] + mark, risks[1]))
    header = ("site", "channels", "left", f"risk{pad}", "measured")
    columns = 5 if any(row[4] for row in rows) else 4 if bases else 3
    yield from table(header[:columns], [row[:columns] for row in rows], width)
    if len(cut) > ROWS:
        yield f"and {len(cut) - ROWS} more, which the report lists"
    if bases:
        listed = "; ".join(f"{marks.get(basis, '')} {plain(basis)}".strip() for basis in bases)
        where = ", and as measured on data held out" if columns == 5 else ""
        yield from sentence(f"risk: predicted cost of what was replaced{where}, in {listed}", width)
    if lossless := sum(site.lossless for site in cut):
        yield from sentence(
            f"lossless: {lossless} of the channels replaced are affine functions of others on the data", width
        )
    if left := len(report.sites) - len(cut):
        yield from sentence(
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
    yield from table(("size", "dense", "compiled", "share"), rows, width)


SHOWN = (0.9, 0.75, 0.5, 0.35, 0.25, 0.15)
"""Sizes of the frontier that are printed; the report file lists all."""


def _frontier_lines(report: Report, width: int) -> Iterator[str]:
    """What other sizes would give, and whether the goal was reached."""
    if report.candidates:
        sizes = [entry.size for entry in report.candidates]
        near = sorted({min(range(len(sizes)), key=lambda i: abs(sizes[i] - size)) for size in SHOWN})
        rows = [
            (f"{e.size:.1%}", f"{e.params:.1%}", f"{e.macs:.1%}", f"{e.latency:.1%}", f"{e.iia:.4f}", f"{e.agreement:.4f}")
            for e in (report.candidates[i] for i in near)
        ]
        yield from table(("frontier", "parameters", "MACs", "time", "IIA", "agreement"), rows, width)
        note = f"{len(sizes)} candidates before re-calibration, on {report.candidates[0].trials:,} trials; time as foretold"
        yield from sentence(note, width)
        yield ""
    goal = report.goal_reached
    if goal is not None and goal.asked is not None and goal.reached is not None:
        yield from sentence(f"goal: {goal.kind} {goal.asked:g} asked, {goal.reached:.4g} reached", width)


def _fidelity_lines(report: Report, width: int) -> Iterator[str]:
    fidelity = report.fidelity
    assert fidelity is not None
    laws: list[LawReport] = [fidelity, *fidelity.stress]
    rows = []
    for law in sorted(laws, key=lambda entry: (entry.law != fidelity.law, entry.swap)):
        kl = "" if law.kl is None else f"{law.kl:.3g}"
        bound = f"{fidelity.iia_lower:.4f}" if law is fidelity else ""
        rows.append((law.law, f"{law.swap:g}", f"{law.iia:.4f}", bound, f"{law.logit_mse_relative:.3g}", kl))
    yield from table(("interchange", "swap", "IIA", "certified", "logit MSE", "KL"), rows, width)
    classes = ", KL in nats" if fidelity.kl is not None else ""
    note = (
        f"agreement by {plain(fidelity.metric)} over {fidelity.trials:,} trials each; logit MSE over the variance{classes}"
    )
    yield from sentence(note, width)
    accuracy = ""
    if fidelity.accuracy_dense is not None and fidelity.accuracy_compiled is not None:
        accuracy = f"; accuracy {fidelity.accuracy_dense:.4f} dense, {fidelity.accuracy_compiled:.4f} compiled"
    yield from sentence(f"without intervention: agreement {fidelity.agreement:.4f}{accuracy}", width)


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
    from mscompile.network.inspection import readers_of

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
    from mscompile.network.inspection import readers_of

    rows = []
    for site in inspection.scm.sites:
        reason = inspection.left_alone[site.tensor]
        readers = plain(", ".join(readers_of(site)[:8]))
        verdict = f"read by {readers}" if reason is None else f"left alone: {plain(reason)}"
        rows.append((plain(site.tensor), str(site.axis), f"{site.size:,}", verdict))
    if rows:
        yield from table(("site", "axis", "channels", ""), rows, width, text=True)
    else:
        yield "no site: no operator contracts a channel axis with a weight"
    left = [(entry, entry.reason) for entry in inspection.coverage if entry.reason is not None]
    if left:
        yield ""
        weights = [(plain(w.tensor), "×".join(map(str, w.shape)), plain(reason, 400)) for w, reason in left]
        yield from table(("weight left alone", "shape", "why"), weights, width, text=True)
    yield ""
    yield from sentence(f"{inspection.reachable:.1%} of the weight elements can be cut on at least one axis", width)


# --- errors -----------------------------------------------------------------------------------------------------------


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


_ENDED: list[End | KeyboardInterrupt] = []
"""What a signal has raised: in some places, such as imports of compiled modules, it comes out as an error of theirs."""


def _end(number: int, _: object) -> NoReturn:
    _ENDED.append(KeyboardInterrupt() if number == signal.SIGINT else End(143))
    raise _ENDED[-1]


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
    except (click.exceptions.Abort, KeyboardInterrupt, End) as end:
        return _ended(end)
    except click.ClickException as error:
        say(error_text(_usage_error(error), width_of(sys.stderr)))
        return UsageError.exit_code
    except Exception as error:
        if _ENDED:
            return _ended(_ENDED[-1])
        if verbosity >= 2:
            traceback.print_exc()
        if isinstance(error, MemoryError):
            hint = "use fewer --samples or a smaller --batch-size"
            error = ResourceError("memory ran out", where=command, why=str(error) or "MemoryError", hint=hint)
        ours = error if isinstance(error, MscompileError) else _crash(error, command)
        say(error_text(ours, width_of(sys.stderr)))
        return ours.exit_code
    finally:
        TRIALS.end()
        choose("cpu")
    return code if isinstance(code, int) else 0


def _ended(end: BaseException) -> int:
    """Exit code of a run that a signal has ended."""
    if isinstance(end, End):
        return end.code
    say("mscompile: interrupted")
    return 130


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


def _open_streams() -> None:
    """Put the null device where the caller has closed a standard stream: no file that is opened must take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> NoReturn:
    """Entry point."""
    _open_streams()
    signal.signal(signal.SIGTERM, _end)  # unwinding removes temporary files
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, _end)
    sys.exit(run(sys.argv[1:]))
