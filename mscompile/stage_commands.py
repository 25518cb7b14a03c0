"""The commands of the stages alone: calibrate, plan, apply."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mscompile.errors import UsageError
from mscompile.intake.trial import TRIALS
from mscompile.providers import TITLES, Provider, choose
from mscompile.runs.command import HOW, RUNNING, running
from mscompile.terminal import answer, bars, plain, say, table, width_of

if TYPE_CHECKING:
    from mscompile.calibration.prediction import SiteCheck

MODEL = click.argument("model", type=click.Path(path_type=Path))


def _try_models(_: click.Context, __: click.Parameter, trusted: bool) -> None:
    if trusted:
        TRIALS.end()
    else:
        TRIALS.begin()


TRUST = click.option(
    "--trust",
    is_flag=True,
    expose_value=False,
    callback=_try_models,
    help="Take the model in without a trial in a process of its own, within limits of memory and time.",
)


def _choose_provider(_: click.Context, __: click.Parameter, name: Provider) -> None:
    choose(name)


PROVIDER = click.option(
    "--provider",
    type=click.Choice(list(TITLES)),
    default="cpu",
    show_default=True,
    expose_value=False,
    callback=_choose_provider,
    help="Where onnxruntime runs.",
)
FORCE = click.option("--force", is_flag=True, help="Overwrite existing outputs.")
ANCHORS = click.option(
    "--anchors",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Units per site to intervene on, to scale predictions for constants.",
)
OUTPUTS = click.option(
    "--output",
    "outputs",
    multiple=True,
    metavar="NAME[=W]",
    help="Score the change of this output, W times. Repeatable. [default: all of floating point]",
)
SCORING: tuple[Callable[[Any], Any], ...] = (
    click.option("--objective", default="logit-mse", show_default=True, help="See `mscompile compile --help`."),
    click.option("--replacement", default="affine", show_default=True, help="See `mscompile compile --help`."),
    click.option("--swap", type=float, default=0.1, show_default=True, help="Interchange probability to fit for."),
    click.option("--only", metavar="REGEX", help="Only sites whose name matches."),
    click.option("--freeze", metavar="REGEX", help="Never sites whose name matches."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
)
DATA: tuple[Callable[[Any], Any], ...] = (
    click.option("--calib", metavar="SRC", help="Data. [default: MODEL.calib.npz beside the model]"),
    click.option("--labels", metavar="NAME", help="Name of the labels in the data."),
    click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Samples to use at most."),
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="[default: 64, or as many as fit]"),
)


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options that several commands share, as one decorator."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def given_options() -> list[str]:
    """Names of the parameters that the command line gives, and does not leave at their defaults."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def option_of(name: str) -> str:
    """A parameter as the command line has it."""
    return next(p.opts[-1] for p in click.get_current_context().command.params if p.name == name)


def parse_keep(entries: tuple[str, ...]) -> float | Mapping[str, float | int] | None:
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


def parse_outputs(entries: tuple[str, ...]) -> Mapping[str, float] | None:
    """``NAME`` or ``NAME=WEIGHT``, each once."""
    found: dict[str, float] = {}
    for entry in entries:
        name, weight = entry, 1.0
        head, equals, tail = entry.rpartition("=")
        if equals:
            with contextlib.suppress(ValueError):
                name, weight = head, float(tail)
        if name in found:
            raise UsageError(
                "an output is named twice", where=f"--output {entry}", why="one weight each", hint="leave one out"
            )
        found[name] = weight
    return found or None


CHECKED = ("site", "units", "Spearman", "variance", "predicted/measured", "of")


def check_rows(checks: Sequence[SiteCheck]) -> list[tuple[str, ...]]:
    """Cells of the table of predicted against measured risks: `CHECKED`, `variance` being its rank correlation."""
    return [
        (
            c.tensor,
            str(len(c.units)),
            f"{c.spearman:.3f}",
            f"{c.of_variance:.3f}",
            f"{c.ratio:.3f}",
            c.basis.partition(":")[0],
        )
        for c in checks
    ]


def check_page(checks: Sequence[SiteCheck]) -> str:
    """Table and plot as one offline HTML page."""
    from mscompile.calibration.prediction import plot_checks
    from mscompile.pages import Figure, figures_html

    caption = "One point a unit that was really replaced; on the dashed line both are equal."
    figure = Figure("Units one by one", plot_checks(checks), caption, CHECKED, check_rows(checks))
    return figures_html("Predicted against measured risk", "What replacing single units costs at the outputs.", [figure])


@click.command("calibrate")
@MODEL
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), help="[default: MODEL.statistics.safetensors]")
@click.option("--probes", type=click.IntRange(min=1), default=4, show_default=True, help="Random seeds of the curvature.")
@ANCHORS
@OUTPUTS
@click.option(
    "--check", type=click.IntRange(min=0), default=0, metavar="N", help="Measure the risk of N units per site to compare."
)
@click.option("--svg", type=click.Path(path_type=Path), help="Write the plot of --check.")
@click.option("--html", type=click.Path(path_type=Path), help="Write table and plot of --check.")
@with_options(*SCORING, *DATA, *RUNNING, PROVIDER, TRUST)
@FORCE
@click.option("-v", "--verbose", count=True, help="-vv prints tracebacks.")
def calibrate_command(
    model: Path,
    output: Path | None,
    outputs: tuple[str, ...],
    check: int,
    svg: Path | None,
    html: Path | None,
    force: bool,
    calib: str | None,
    verbose: int,
    **chosen: Any,
) -> None:
    """Collect the statistics of MODEL's sites over calibration data."""
    del verbose
    from mscompile.calibration.prediction import plot_checks
    from mscompile.files import beside, output_conflict, staged
    from mscompile.network.dense import files_read
    from mscompile.options import Options
    from mscompile.runs.locks import claimed
    from mscompile.stages import calibrate_model

    pages = {path: text for path, text in ((svg, plot_checks), (html, check_page)) if path is not None}
    if pages and not check:
        raise UsageError("there is nothing to plot", where="--svg, --html", why="no unit is checked", hint="add --check 50")
    target = output if output is not None else beside(model, ".statistics.safetensors")
    how = {name: chosen.pop(name) for name in HOW}
    options = Options(output=parse_outputs(outputs), **chosen)
    with claimed(*pages):
        output_conflict([*pages, target], force=force, inputs=files_read(model, calib))
        with running(cache=options.cache, **how) as run, bars(silent=False) as progress:
            found = calibrate_model(model, calib, target, options, check=check, force=force, run=run, progress=progress)
        for path, text in pages.items():
            with staged(path) as draft:
                draft.write_text(text(found.checks), encoding="utf-8")
    for note in found.notes:
        say(f"warning: {plain(note, 1000)}", fg="yellow")
    rows = [(plain(site.tensor), str(site.size), plain(found.scores.basis[site.tensor], 400)) for site in found.dense.sites]
    say("\n".join(table(("site", "channels", "scored by"), rows, width_of(sys.stderr), text=True)))
    if found.checks:
        lines = table(CHECKED, [tuple(map(plain, row)) for row in check_rows(found.checks)], width_of(sys.stderr))
        say("\n".join(lines))
    answer(f"{target}: {len(found.statistics.moments)} sites, {found.statistics.samples} samples")


@click.command("plan")
@MODEL
@click.argument("statistics", type=click.Path(path_type=Path))
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), help="[default: MODEL.plan.json]")
@click.option("--keep", multiple=True, metavar="[SITE=]N", help="Share of channels to keep, or SITE=share, SITE=number.")
@with_options(*SCORING, TRUST)
@FORCE
@click.option("-v", "--verbose", count=True, help="-vv prints tracebacks.")
def plan_command(
    model: Path, statistics: Path, output: Path | None, keep: tuple[str, ...], force: bool, verbose: int, **chosen: Any
) -> None:
    """Choose units of MODEL from STATISTICS and fit what stands in for the others."""
    del verbose
    from mscompile.files import beside
    from mscompile.options import Options
    from mscompile.stages import plan_model

    target = output if output is not None else beside(model, ".plan.json")
    plan = plan_model(model, statistics, target, Options(keep=parse_keep(keep), **chosen), force=force)
    answer(f"{target}: {len(plan.sites)} sites cut")


@click.command("apply")
@MODEL
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), help="[default: MODEL.ms.onnx]")
@with_options(*DATA, PROVIDER, TRUST)
@FORCE
@click.option("-v", "--verbose", count=True, help="-vv prints tracebacks.")
def apply_command(
    model: Path, plan: Path, output: Path | None, calib: str | None, force: bool, verbose: int, **chosen: Any
) -> None:
    """Carry out PLAN on MODEL, and prove the result on data."""
    del verbose
    from mscompile.files import beside, spare_inputs
    from mscompile.options import Options
    from mscompile.planning.plan import Plan
    from mscompile.stages import apply_plan

    target = output if output is not None else beside(model, ".ms.onnx")
    spare_inputs([target], [plan])
    done = apply_plan(model, Plan.read(plan), calib, target, Options(**chosen), force=force)
    proof = "fold error not measured" if done.fold_error is None else f"fold error {done.fold_error:.1e}"
    answer(f"{target}: {proof}")
