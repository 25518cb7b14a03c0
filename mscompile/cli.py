"""The command line. Results go to stdout; everything else to stderr."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mscompile.errors import MscompileError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mscompile.inspection import Inspection
    from mscompile.pipeline import Compilation
    from mscompile.report import LawReport, Report


class _DefaultToCompile(click.Group):
    """``mscompile MODEL.onnx`` means ``mscompile compile MODEL.onnx``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="mscompile")
def cli() -> None:
    """Compile a trained ONNX network into a smaller one that is a verified causal abstraction of it.

    \b
    mscompile MODEL.onnx                  smallest model certified to agree under interchange (IIA >= 0.95)
    mscompile MODEL.onnx --keep 0.5       half of the units of every site
    mscompile inspect MODEL.onnx          what can be cut, and why the rest is left alone

    `mscompile compile --help` lists the options of compiling.
    """


@cli.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. [default: MODEL.ms.onnx]")
@click.option("--calib", metavar="SRC", help="Calibration data: .npz, .npy, .safetensors, folder, script.py. "
              "[default: MODEL.calib.npz beside the model]")  # fmt: skip
@click.option(
    "--fidelity", type=float, metavar="F", help="Smallest model whose IIA is certified at least F. [default: 0.95]"
)
@click.option("--keep", multiple=True, metavar="[SITE=]N", help="Share of channels to keep, or SITE=share, SITE=number.")
@click.option("--objective", default="logit-mse", show_default=True, help="Score: logit-mse, kl, cross-entropy, cwvar, "
              "variance, magnitude, random.")  # fmt: skip
@click.option("--probes", type=click.IntRange(min=1), default=4, show_default=True, help="Random seeds of the curvature.")
@click.option("--replacement", default="affine", show_default=True, help="affine, affine-parents or constant.")
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
@click.option("-v", "--verbose", count=True, help="-vv prints tracebacks.")
def compile_command(
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
    del verbose  # read by `main` from the command line, so that it holds for every error
    from mscompile.options import Options
    from mscompile.pipeline import compile_model

    if keep and fidelity is not None:
        raise UsageError(
            "there are two goals", where="--keep, --fidelity", why="only one can lead the search", hint="leave one out"
        )
    if fidelity is not None:
        chosen["fidelity"] = fidelity
    options = Options(keep=_parse_keep(keep), **chosen)
    target = output if output is not None else model.with_suffix(".ms.onnx")
    console = _console(quiet or as_json)
    result = compile_model(
        model,
        calib,
        target,
        options,
        force=force,
        dry_run=dry_run,
        command=shlex.join(["mscompile", *sys.argv[1:]]),
        progress=_progress(console),
        on_warning=lambda text: console.print(f"warning: {text}", style="yellow", markup=False),
    )
    if as_json:
        click.echo(result.report.model_dump_json())
        return
    _print_report(console, result.report)
    click.echo(_verdict(result))


@cli.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-v", "--verbose", count=True, help="-vv prints tracebacks.")
def inspect_command(model: Path, as_json: bool, verbose: int) -> None:
    """List the sites of MODEL, their units, and what will be left alone and why."""
    del verbose
    from mscompile.pipeline import inspect_model

    inspection = inspect_model(model)
    if as_json:
        import json

        click.echo(json.dumps(_inspection_data(inspection)))
        return
    _print_inspection(inspection)


def _parse_keep(entries: tuple[str, ...]) -> float | Mapping[str, float | int] | None:
    """``0.5`` for all sites, or ``SITE=0.5`` and ``SITE=128``."""
    if not entries:
        return None
    if any("=" not in entry for entry in entries):
        if len(entries) > 1:
            raise UsageError(
                "one share for all sites stands alone",
                where="--keep " + " --keep ".join(entries),
                why="a share without a site is for every site",
                hint="name a site in each: --keep SITE=0.5",
            )
        return _number(entries[0], entries[0], whole=False)
    named = {}
    for entry in entries:
        site, _, text = entry.rpartition("=")
        named[site] = _number(text, entry, whole=True)
    return named


def _number(text: str, entry: str, *, whole: bool) -> float | int:
    try:
        return int(text) if whole and text.isdigit() else float(text)
    except ValueError:
        raise UsageError(
            "this is no number", where=f"--keep {entry}", why=f"{text!r} cannot be read", hint="write 0.5, or SITE=128"
        ) from None


# --- what is printed --------------------------------------------------------------------------------------------------


def _console(silent: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=silent, highlight=False)


def _progress(console: Console) -> Any:
    def show(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        if not console.is_terminal or console.quiet:
            yield from items
            return
        from rich.progress import track

        yield from track(items, description, total, console=console, transient=True)

    return show


def _print_report(console: Console, report: Report) -> None:
    from rich.table import Table

    table = Table("site", "channels", "left", "retained", "predicted risk", title=None, box=None, padding=(0, 2))
    for site in report.sites:
        if site.left_alone is not None:
            table.add_row(_plain(site.name), str(site.size), "all", "", f"left alone: {_plain(site.left_alone)}")
        else:
            risk = "" if site.predicted_risk is None else f"{site.predicted_risk:.3g} ({site.basis})"
            table.add_row(_plain(site.name), str(site.size), str(site.width), str(site.kept), risk)
    console.print(table)
    dense, compiled = report.sizes.dense, report.sizes.compiled
    sizes = Table("", "dense", "compiled", "share", box=None, padding=(0, 2))
    for name, a, b, unit in (
        ("parameters", dense.params, compiled.params, ""),
        ("multiply-accumulates", dense.macs, compiled.macs, ""),
        ("bytes", dense.bytes, compiled.bytes, ""),
        (f"latency, batch {report.sizes.latency_batch}", dense.latency_ms, compiled.latency_ms, " ms"),
    ):
        if a is not None and b is not None:
            shown = (f"{a:,.3g}{unit}", f"{b:,.3g}{unit}") if unit else (f"{a:,}", f"{b:,}")
            sizes.add_row(name, *shown, f"{b / a:.1%}" if a else "")
    console.print(sizes)
    if report.fold_error is not None:
        console.print(f"fold error {report.fold_error:.1e} standard deviations, {report.fold_check}")
    fidelity = report.fidelity
    if fidelity is None:
        return
    laws = Table("law", "swap", "IIA", "relative logit MSE", "KL (nats)", box=None, padding=(0, 2))
    laws_shown: list[LawReport] = [fidelity, *fidelity.stress]
    for law in sorted(laws_shown, key=lambda entry: (entry.law, entry.swap)):
        kl = "" if law.kl is None else f"{law.kl:.3g}"
        laws.add_row(law.law, f"{law.swap:g}", f"{law.iia:.4f}", f"{law.logit_mse_relative:.3g}", kl)
    console.print(laws)
    accuracy = ""
    if fidelity.accuracy_dense is not None and fidelity.accuracy_compiled is not None:
        accuracy = f", accuracy {fidelity.accuracy_dense:.4f} dense, {fidelity.accuracy_compiled:.4f} compiled"
    console.print(f"agreement without intervention {fidelity.agreement:.4f}{accuracy}")


def _plain(text: str, limit: int = 80) -> str:
    """Model text made safe for a terminal: no control characters, no markup, not too long."""
    from rich.markup import escape

    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return escape(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def _verdict(result: Compilation) -> str:
    report = result.report
    share = report.sizes.compiled.params / report.sizes.dense.params if report.sizes.dense.params else 1.0
    where = "nothing written (dry run)" if result.path is None else str(result.path)
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


def _print_inspection(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    from mscompile.inspection import readers_of

    console = Console(highlight=False)
    sites = Table("site", "axis", "channels", "read by", "can be cut", box=None, padding=(0, 2))
    for site in inspection.scm.sites:
        reason = inspection.left_alone[site.tensor]
        readers = _plain(", ".join(readers_of(site)))
        sites.add_row(
            _plain(site.tensor), str(site.axis), str(site.size), readers, "yes" if reason is None else _plain(reason)
        )
    console.print(sites)
    left = [entry for entry in inspection.coverage if entry.status == "left alone"]
    if left:
        weights = Table("weight left alone", "shape", "why", box=None, padding=(0, 2))
        for entry in left:
            weights.add_row(_plain(entry.tensor), "×".join(map(str, entry.shape)), _plain(entry.reason or "", 160))
        console.print(weights)
    console.print(f"{inspection.reachable:.1%} of the weight elements can be cut on at least one axis")


# --- errors -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; every ending has its exit code."""
    arguments = sys.argv[1:]
    try:
        cli.main(args=arguments, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except MscompileError as error:
        if "-vv" in arguments:
            traceback.print_exc()
        click.echo(f"mscompile: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        with tempfile.NamedTemporaryFile("w", prefix="mscompile-crash-", suffix=".txt", delete=False) as file:
            file.write(shlex.join(["mscompile", *arguments]) + "\n")
            traceback.print_exc(file=file)
        if "-vv" in arguments:
            traceback.print_exc()
        click.echo(f"mscompile: this is a bug in mscompile; please report it with {file.name}", err=True)
        sys.exit(1)
