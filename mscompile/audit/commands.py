"""The commands `audit` and `report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mscompile.errors import GoalError, UsageError, VerificationError
from mscompile.runs.command import HOW, RUNNING, running, without_how
from mscompile.stage_commands import PROVIDER, TRUST, given_options, option_of, with_options
from mscompile.terminal import answer, ascii_json, bars, plain, say, sentence, table, width_of

if TYPE_CHECKING:
    from mscompile.audit.report import AuditReport, Claim

EXIT = {"certified": 0, "refuted": VerificationError.exit_code, "undecided": GoalError.exit_code}
PATH = click.Path(path_type=Path)
REPLAYED = {
    "replay",
    "dense",
    "compiled",
    "data",
    "against",
    "explain",
    "as_json",
    "quiet",
    "verbose",
    "force",
    *HOW,
    "cache",
}
"""Parameters that mean something to a replay."""


@click.command("audit")
@click.argument("dense", type=PATH, required=False)
@click.argument("compiled", type=PATH, required=False)
@click.option(
    "--data", metavar="SRC", help="Audit data that took no part in compiling: .npz, .npy, .safetensors, folder, script.py."
)
@click.option("--fidelity", type=float, default=0.95, show_default=True, metavar="F", help="IIA to certify.")
@click.option(
    "--law", "laws", multiple=True, default=("one-site",), show_default=True, help="one-site or all-sites. Repeatable."
)
@click.option(
    "--swap", "swaps", type=float, multiple=True, default=(0.1,), show_default=True, help="Swap probability. Repeatable."
)
@click.option(
    "--convention", "conventions", multiple=True, default=("matched",), show_default=True,
    help="Values patched into the compiled model: matched (the dense model's) or own. Repeatable.",
)  # fmt: skip
@click.option(
    "--output", "outputs", multiple=True, metavar="NAME[=W]",
    help="Compare this output, of weight W among several. Repeatable. [default: all with a result per sample]",
)  # fmt: skip
@click.option(
    "--metric", "metrics", multiple=True, metavar="[OUTPUT=]METRIC",
    help="Agreement: argmax, kl, cosine, distance, equality, script.py:function. Repeatable. [default: by the output]",
)  # fmt: skip
@click.option("--delta", type=float, default=0.05, show_default=True, help="Error probability, shared by all claims.")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Interchanges per claim at most.")
@click.option(
    "--tau", type=PATH, metavar="FILE", help="JSON: which units correspond. [default: metadata, or by the weights]"
)
@click.option(
    "--plan", type=PATH, metavar="FILE", help="Plan that was carried out. [default: beside COMPILED, where it fits]"
)
@click.option(
    "--calib", metavar="SRC", help="Data that COMPILED was made with, to tell apart. [default: its report's digests]"
)
@click.option(
    "--shared", type=click.Choice(["refuse", "drop", "keep"]), default="refuse", show_default=True,
    help="Audit samples that took part in compiling: refuse them, leave them out, or keep them, uncertified.",
)  # fmt: skip
@click.option("--against", type=PATH, metavar="OTHER", help="Another compiled model to compare with on the same trials.")
@click.option(
    "--table", type=click.IntRange(min=0), default=500, show_default=True, help="Interchanges per line of the table."
)
@click.option("--explain/--no-explain", default=True, show_default=True, help="Look for what explains the number.")
@click.option(
    "--provenance/--no-provenance", default=True, show_default=True,
    help="Refute a file that says mscompile made it and was changed since; --no-provenance: judge by trials alone.",
)  # fmt: skip
@click.option("--replay", type=PATH, metavar="CERTIFICATE", help="Make a certificate's audit again, and compare.")
@click.option("-o", "--out", "output", type=PATH, help="Certificate to write. [default: COMPILED.audit.json]")
@click.option("--html", type=PATH, metavar="PATH", help="One offline page to write.")
@click.option("--markdown", type=PATH, metavar="PATH", help="Markdown to write.")
@click.option("--statement", type=PATH, metavar="PATH", help="Unsigned in-toto Statement to write.")
@click.option("--labels", metavar="NAME", help="Name of the labels in the data.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Samples to use at most.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@with_options(*RUNNING, PROVIDER, TRUST)
@click.option("--force", is_flag=True, help="Overwrite existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict only.")
@click.option("-v", "--verbose", count=True, help="-vv: tracebacks.")
@click.pass_obj
def audit_command(
    command: str,
    /,
    dense: Path | None,
    compiled: Path | None,
    data: str | None,
    replay: Path | None,
    output: Path | None,
    html: Path | None,
    markdown: Path | None,
    statement: Path | None,
    as_json: bool,
    quiet: bool,
    force: bool,
    verbose: int,
    **chosen: Any,
) -> int:
    """Is COMPILED an abstraction of DENSE? Any two ONNX files, whoever made them.

    Exit code 0: certified, 5: refuted, 6: undecided within the data given.
    """
    del verbose
    how = {name: chosen.pop(name) for name in (*HOW, "cache")}
    if replay is not None:
        if unheard := [name for name in given_options() if name not in REPLAYED]:
            raise UsageError(
                "a certificate is made again as it says",
                where=f"--replay {plain(str(replay), 4096)}",
                why=f"{', '.join(map(option_of, unheard))} would change nothing",
                hint="leave that out, or make another audit",
            )
        files = {"against": chosen["against"], "explain": chosen["explain"]}
        return _replay(replay, dense, compiled, data, how, silent=quiet or as_json, as_json=as_json, **files)
    if dense is None or compiled is None or data is None:
        raise UsageError(
            "an audit needs two models and data",
            where="mscompile audit DENSE COMPILED --data SRC",
            why="data that chose a model cannot certify it, so none is looked for",
            hint="give samples that took no part in training or compiling",
        )
    from mscompile.audit.counterexample import folder_of
    from mscompile.audit.pipeline import audit
    from mscompile.audit.setup import AuditOptions
    from mscompile.files import beside, output_conflict
    from mscompile.intake.sources import files_of
    from mscompile.runs.locks import claimed
    from mscompile.stage_commands import parse_outputs

    target = output if output is not None else beside(compiled, ".audit.json")
    written = [path for path in (target, html, markdown, statement) if path is not None]
    files = {name: chosen.pop(name) for name in ("tau", "plan", "calib", "against")}
    chosen["metrics"] = chosen["metrics"] or (None,)
    chosen["outputs"] = parse_outputs(chosen["outputs"])
    options = AuditOptions(**chosen)
    sources = (
        dense,
        data,
        compiled,
        *(beside(compiled, f".{kind}.json") for kind in ("plan", "report")),
        *files.values(),
    )
    read = [file for source in sources if source is not None for file in files_of(source)]
    with claimed(*written, folder_of(target) if options.explain else None):
        output_conflict(written, force=force, inputs=read)
        with running(**how) as run, bars(silent=quiet or as_json) as progress:
            report = audit(
                dense,
                compiled,
                data,
                options,
                **files,
                output=target,
                command=without_how(command),
                run=run,
                progress=progress,
            )
            notes = run.work.notes
        _write(report, target, html, markdown, statement)
    for note in notes:
        say(f"warning: {plain(note, 1000)}", fg="yellow")
    if as_json:
        answer(ascii_json(report.to_json()))
    else:
        if not quiet:
            say("\n".join(_lines(report, width_of(sys.stderr), target)))
        answer(f"{report.verdict}: {plain(report.because, 1000)}")
    return EXIT[report.verdict]


def _replay(
    certificate: Path,
    dense: Path | None,
    compiled: Path | None,
    data: str | None,
    how: dict[str, Any],
    *,
    silent: bool,
    as_json: bool,
    **more: Any,
) -> int:
    from mscompile.audit.replay import replay
    from mscompile.version import __version__

    if not certificate.is_file():
        raise UsageError(
            "there is no such file", where=str(certificate), why="a certificate was to be read", hint="check the path"
        )
    if how["work"] is not None:
        why = "what an earlier run has kept would not be made again"
        raise UsageError("nothing is kept when replaying", where="--replay, --work", why=why, hint="leave out --work")
    with running(**{**how, "cache": False}) as run, bars(silent=silent) as progress:
        found = replay(certificate, dense, compiled, data, progress, run=run, **more)
    if as_json:
        claims = [{"disagreements": c.disagreements, "trials": c.trials} for c in found.claims]
        answer(
            json.dumps(
                {
                    "kind": "replay",
                    "reproduced": not found.differences,
                    "exact": found.exact,
                    "differences": found.differences,
                    "left_out": found.left_out,
                    "claims": claims,
                    "verdict": found.report.verdict,
                }
            )
        )
        return VerificationError.exit_code if found.differences else 0
    for text in found.differences:
        say(f"differs: {plain(text, 1000)}", fg="yellow")
    totals = "; ".join(f"S = {c.disagreements:g} of n = {c.trials:,}" for c in found.claims)
    if found.differences:
        made_by = found.report.versions["mscompile"]
        by = "" if made_by == __version__ else f" (made by mscompile {made_by}, run again by {__version__})"
        answer(f"not reproduced: {totals}{by}")
        return VerificationError.exit_code
    same = "every number is the same" if found.exact else "the other numbers agree to rounding"
    left_out = f", without {', '.join(found.left_out)}" if found.left_out else ""
    answer(f"reproduced: {totals}; {same}{left_out}; the certificate says {found.report.verdict}")
    return 0


def _write(report: AuditReport, target: Path, html: Path | None, markdown: Path | None, statement: Path | None) -> None:
    import datetime

    from mscompile.audit.statement import statement_text
    from mscompile.files import staged
    from mscompile.pages import audit_html, audit_markdown
    from mscompile.runs.limits import finishing

    now = datetime.datetime.now(datetime.UTC)
    texts = (
        (target, report.to_json()),
        (html, html and audit_html(report)),
        (markdown, markdown and audit_markdown(report)),
    )
    with finishing():
        for path, text in (*texts, (statement, statement and statement_text(report, now))):
            if path and text:
                with staged(path) as draft:
                    draft.write_text(str(text), encoding="utf-8")


@click.command("report")
@click.argument("report", type=PATH)
@click.option("--html", type=PATH, metavar="PATH", help="Page to write. [default: REPORT.html, unless --markdown is given]")
@click.option("--markdown", type=PATH, metavar="PATH", help="Markdown to write.")
@click.option("--force", is_flag=True, help="Overwrite existing outputs.")
@click.option("-v", "--verbose", count=True, help="-vv: tracebacks.")
def report_command(report: Path, html: Path | None, markdown: Path | None, force: bool, verbose: int) -> None:
    """Render the REPORT of a compile, or the certificate of an audit, as one offline page or as Markdown."""
    del verbose
    from mscompile.files import beside, output_conflict, staged
    from mscompile.pages import render
    from mscompile.runs.locks import claimed

    if html is None and markdown is None:
        html = beside(report, ".html")
    with claimed(html, markdown):
        output_conflict([path for path in (html, markdown) if path is not None], force=force, inputs=[report])
        for path, kind in ((html, "html"), (markdown, "markdown")):
            if path is not None:
                text = render(report, kind)
                with staged(path) as draft:
                    draft.write_text(text, encoding="utf-8")
                answer(str(path))


# --- what is printed --------------------------------------------------------------------------------------------------


def _lines(report: AuditReport, width: int, target: Path) -> Iterator[str]:
    for warning in report.warnings:
        yield from sentence(f"warning: {plain(warning, 1000)}", width)
    units = sum(len(site.dense_channels) for site in report.tau)
    origin = {
        "given": "as given",
        "plan": "from the plan",
        "metadata": "from the metadata",
        "weights": "inferred from weights",
    }
    yield from sentence(f"tau: {units:,} units at {len(report.tau)} sites, {origin[report.tau_origin]}", width)
    yield from sentence(f"provenance: {plain(report.checks[0].detail, 300)}", width)
    failed = [check for check in report.checks[1:] if check.passed is False]
    passed = sum(check.passed is True for check in report.checks)
    yield from sentence(f"self-checks: {passed} passed" + "".join(f"; FAILED {c.name}: {c.detail}" for c in failed), width)
    yield ""
    several = len(report.outputs) > 1
    rows = [
        (c.law, f"{c.swap:g}", *([_outputs(c)] if several else []), c.convention, *([] if several else [plain(c.metric)]),
         f"{c.fidelity:g}", f"{c.iia:.4f}", f"{c.iia_lower:.4f}", f"{c.iia_upper:.4f}", f"{c.trials:,}", c.verdict)
        for c in report.claims
    ]  # fmt: skip
    # With several outputs every metric stands behind its output.
    head = ("claim", "swap", "output: metric", "values") if several else ("claim", "swap", "values", "metric")
    yield from table((*head, "goal", "IIA", "least", "most", "trials", "verdict"), rows, width)
    if report.laws:
        yield ""
        laws = [
            (
                r.law,
                f"{r.swap:g}",
                f"{r.iia_matched:.4f}",
                f"{r.iia_own:.4f}",
                f"{r.logit_mse_relative:.3g}",
                f"{r.trials:,}",
            )
            for r in report.laws
        ]
        yield from table(("law", "swap", "IIA matched", "own", "logit MSE", "trials"), laws, width)
    yield ""
    yield from _explanation(report, width)
    yield from sentence(plain(f"certificate: {target}"), width)


def _outputs(claim: Claim) -> str:
    return "all" if len(claim.outputs) > 1 else plain(f"{claim.outputs[0]}: {claim.metric}", 60)


def _explanation(report: AuditReport, width: int) -> Iterator[str]:
    agreement = f"without intervention: agreement {report.plain.agreement:.4f}"
    if report.plain.by_output:
        agreement += f" ({', '.join(f'{plain(name)} {share:.4f}' for name, share in report.plain.by_output.items())})"
    if report.plain.accuracy_dense is not None and report.plain.accuracy_compiled is not None:
        agreement += f"; accuracy {report.plain.accuracy_dense:.4f} dense, {report.plain.accuracy_compiled:.4f} compiled"
    yield from sentence(agreement, width)
    if report.explanation is not None:
        blame, unmapped = report.explanation.blame, report.explanation.unmapped
        if blame.floor is not None:
            yield from sentence(
                f"logit MSE {blame.measured:.3g}; at best {blame.floor:.3g} with these units: {blame.set:.3g} for what was "
                f"cut, {blame.law:.3g} for what interchange leaves at base; {blame.fold:.3g} more by this fold",
                width,
            )
        if unmapped is not None:
            yield from sentence(
                f"units outside tau resampled: the dense answer stays in {unmapped.agreement:.4f} of {unmapped.trials:,}",
                width,
            )
    if report.counterexample is not None:
        units = sum(len(channels) for channels in report.counterexample.swapped.values())
        where = "" if report.counterexample.folder is None else f", in {plain(report.counterexample.folder)}"
        what = (
            f"{units} of {report.counterexample.swapped_before} swapped units suffice{'s' if units == 1 else ''}"
            if units
            else "without intervention"
        )
        yield from sentence(f"counterexample: {what}{where}", width)
    if report.comparison is not None:
        c = report.comparison
        yield from sentence(
            plain(
                f"{c.other.path}: IIA {c.iia_other:.4f} against {c.iia:.4f}; it disagrees more often by "
                f"{c.difference:.4f} ({c.difference_lower:.4f} to {c.difference_upper:.4f}); paired test: {c.verdict}, "
                f"{c.for_other} trials for it, {c.against_other} against",
                1000,
            ),
            width,
        )
