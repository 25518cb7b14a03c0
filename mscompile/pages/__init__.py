"""Reports as pages: one offline HTML file, or Markdown, for a person who does not know the method.

Pages run no script and load nothing: their content policy forbids it. All text is escaped, whatever a model's names hold.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal

import jinja2
from markupsafe import Markup
from pydantic import ValidationError

from mscompile.audit.report import AuditReport, LawFound
from mscompile.errors import UsageError
from mscompile.intake.documents import faults, parse
from mscompile.pages.drawing import Series, bars, lines, scatter
from mscompile.report import Report
from mscompile.verification.certificate import risk_bound, risk_floor

HERE = Path(__file__).parent
BAND = 0.05
"""Error probability of each end of the bands drawn around measured rates."""
SITES = 40
"""Sites drawn at most; the table lists all."""
ORIGINS = {
    "given": "as given",
    "plan": "from the plan",
    "metadata": "from the compiled file's metadata",
    "weights": "inferred from the weights",
}


def render(path: Path, kind: Literal["html", "markdown"] | str) -> str:
    """Render a report's file, of a compile or an audit.

    Raises
    ------
    UsageError
        It is neither.
    """
    try:
        content = path.read_bytes()
        audit = parse(content).get("kind") == "audit"
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            "the report cannot be read", where=str(path), why=str(error)[:400], hint="give a .report.json or .audit.json"
        ) from error
    try:
        return _rendered(content, kind, str(path), audit=audit)
    except (LookupError, ArithmeticError, TypeError, ValueError, jinja2.UndefinedError) as error:
        # Each number is as it may be; whether they go together is not known before they are shown.
        raise UsageError(
            "the report contradicts itself",
            where=str(path),
            why=f"{type(error).__name__}: {error}"[:400],
            hint="it was changed since it was written: give the original",
        ) from error


def _rendered(content: bytes, kind: str, where: str, *, audit: bool) -> str:
    if audit:
        certificate = AuditReport.parse(content, where)
        return audit_html(certificate) if kind == "html" else audit_markdown(certificate)
    try:
        report = Report.model_validate_json(content)
    except ValidationError as error:
        raise UsageError(
            "this is no report of this version",
            where=where,
            why=faults(error),
            hint="compile again, or use the version it names",
        ) from error
    return compile_html(report) if kind == "html" else compile_markdown(report)


# --- audits -----------------------------------------------------------------------------------------------------------


def audit_html(report: AuditReport) -> str:
    """The page of a certificate."""
    return _page("audit.html", **_audit(report), plots=defaultdict(str, _audit_plots(report)))


def audit_markdown(report: AuditReport) -> str:
    """A certificate as Markdown."""
    return _page("audit.md", **_audit(report))


def _audit(report: AuditReport) -> dict[str, Any]:
    from mscompile.audit.counterexample import replay_lines

    first = report.claims[0]
    rate = f"{first.fidelity:.0%}" if round(first.fidelity, 2) == first.fidelity else f"{first.fidelity:.2%}"
    meaning = {
        "certified": f"{_swapping(first.law, first.swap)}: both networks give the same answer in at least {rate} of cases.",
        "refuted": "The small network is not the abstraction of the large one that was claimed.",
        "undecided": f"The trials do not show whether the two networks agree in at least {rate} of cases.",
    }[report.verdict]
    return {
        "r": report,
        "main": first,
        "measured": max(_measured(report), key=lambda found: found[1]),
        "tone": {"certified": "good", "refuted": "bad", "undecided": ""}[report.verdict],
        "meaning": meaning,
        "origin": ORIGINS[report.tau_origin],
        "culprit": _culprit(report),
        "several": len(report.outputs) > 1,
        "weighted": len({output.weight for output in report.outputs}) > 1,
        "paired": _paired(report),
        "swapped": 0 if report.counterexample is None else sum(map(len, report.counterexample.swapped.values())),
        "lines": "" if report.counterexample is None else replay_lines(report.counterexample),
    }


def _measured(report: AuditReport) -> Iterable[tuple[float, int]]:
    """IIA under the first claim's law, and the trials behind it."""
    first = report.claims[0]
    yield first.iia, first.trials
    for row in report.laws:
        if (row.law, row.swap) == (first.law, first.swap):
            yield (row.iia_matched if first.convention == "matched" else row.iia_own), row.trials


def _paired(report: AuditReport) -> str:
    """The paired test in a sentence."""
    c = report.comparison
    if c is None:
        return ""
    verdict = {"better": "The other is better", "worse": "The other is worse", "undecided": "Neither is shown to be better"}
    return (
        f"{verdict[c.verdict]}, by a paired test of the trials in which they differ: {c.for_other} for it, "
        f"{c.against_other} against it."
    )


def _culprit(report: AuditReport) -> str:
    """The largest part of the difference, in a sentence."""
    if report.explanation is None or report.explanation.blame.floor is None:
        return ""
    blame = report.explanation.blame
    parts = {
        "Most of the rest comes from which units were kept: keep others, or more.": blame.set or 0.0,
        "Most of it is the interchange itself: the large network's other units keep base values.": blame.law or 0.0,
        "Most of it is the compensation: a better fit of the retained units exists.": blame.fold or 0.0,
    }
    largest = max(parts, key=lambda text: parts[text])
    return largest if parts[largest] > 0.0 else ""


def _audit_plots(report: AuditReport) -> dict[str, Markup]:
    plots = {}
    goal = report.claims[0].fidelity
    if report.laws:
        for name, field, values in (
            ("laws", "iia_matched", "the same values in both"),
            ("own", "iia_own", "each its own values"),
        ):
            series = [
                _law_series(law, [r for r in report.laws if r.law == law], field)
                for law in dict.fromkeys(r.law for r in report.laws)
            ]
            plots[name] = _drawn(
                lines(
                    series,
                    title=f"Interchange-intervention accuracy by swap probability, {values}",
                    description=f"Each line is a law of interchange; the dashed line is the goal of {goal:g}.",
                    x="swap probability",
                    y=f"IIA, {values}",
                    rules=[goal],
                )
            )
    blame = report.explanation.blame if report.explanation is not None else None
    if blame is not None and blame.floor is not None:
        parts = (
            ("measured", blame.measured),
            ("units that were cut", blame.set),
            ("units left at base values", blame.law),
            ("this compensation, over the best one", blame.fold),
        )
        plots["blame"] = _drawn(
            bars(
                [name for name, _ in parts],
                [value or 0.0 for _, value in parts],
                title="What the difference consists of",
                description="Squared difference of the outputs over their variance, and its parts.",
            )
        )
    return plots


def _law_series(law: str, rows: Sequence[LawFound], field: str) -> Series:
    found = [getattr(row, field) for row in rows]
    totals = [(1.0 - iia) * row.trials for iia, row in zip(found, rows, strict=True)]
    return Series(
        {"one-site": "one site a trial", "all-sites": "all sites at once"}[law],
        [row.swap for row in rows],
        found,
        low=[1.0 - risk_bound(total, row.trials, BAND) for total, row in zip(totals, rows, strict=True)],
        high=[1.0 - risk_floor(total, row.trials, BAND) for total, row in zip(totals, rows, strict=True)],
        labels=[f"{law}, swap {row.swap:g}: {iia:.4f}" for row, iia in zip(rows, found, strict=True)],
    )


# --- compiles ---------------------------------------------------------------------------------------------------------


def compile_html(report: Report) -> str:
    """The page of a compile's report."""
    return _page("compile.html", **_compile(report), plots=defaultdict(str, _compile_plots(report)))


def compile_markdown(report: Report) -> str:
    """A compile's report as Markdown."""
    return _page("compile.md", **_compile(report))


def _compile(report: Report) -> dict[str, Any]:
    dense, compiled, fidelity = report.sizes.dense, report.sizes.compiled, report.fidelity
    sizes = [
        (name, format(a, form), format(b, form), f"{b / a:.1%}")
        for name, a, b, form in (
            ("parameters", dense.params, compiled.params, ","),
            ("multiply-accumulates", dense.macs, compiled.macs, ","),
            ("bytes", dense.bytes, compiled.bytes, ","),
            (f"ms per batch of {report.sizes.latency_batch}", dense.latency_ms, compiled.latency_ms, ".3g"),
        )
        if a and b is not None
    ]
    share = f"{compiled.params / dense.params:.1%}" if dense.params else "100%"
    headline = f"{share} of the parameters"
    meaning = "Only what the weights alone prove was done; fidelity was not measured."
    if fidelity is not None:
        headline += f", and at least {fidelity.iia_lower:.2%} agreement under intervention"
        meaning = (
            f"{_swapping(fidelity.law, fidelity.swap)}: both networks give the same answer in at least "
            f"{fidelity.iia_lower:.2%} of cases, with confidence {1 - fidelity.delta:g}."
        )
    left = sum(weight.status == "left alone" for weight in report.coverage)
    return {
        "r": report,
        "tone": "good" if fidelity is not None else "",
        "headline": headline + ".",
        "meaning": meaning,
        "sizes": sizes,
        "goal": _goal(report),
        "covered": f"{len(report.coverage) - left} of {len(report.coverage)} weights can be cut, {left} are left alone",
    }


def _compile_plots(report: Report) -> dict[str, Markup]:
    plots = {}
    cut = [site for site in report.sites if site.left_alone is None]
    drawn = report.sites[:SITES]
    if drawn:
        plots["kept"] = _drawn(
            bars(
                [site.name for site in drawn],
                [float(site.width) if site.left_alone is None else 0.0 for site in drawn],
                full=[float(site.size) for site in drawn],
                texts=[
                    f"{site.width} of {site.size}" if site.left_alone is None else f"{site.size}, left alone"
                    for site in drawn
                ],
                groups=[site.group for site in drawn],
                title="The network's sites in order, and the channels left at each",
                description="One bar a site; the pale part was cut. Sites joined by a line hold the same units.",
            )
        )
    known = [site for site in cut if site.predicted_risk and site.measured_risk]
    if known:
        series = [
            Series(
                basis,
                [site.predicted_risk or 0.0 for site in known if site.basis == basis],
                [site.measured_risk or 0.0 for site in known if site.basis == basis],
                labels=[site.name for site in known if site.basis == basis],
            )
            for basis in dict.fromkeys(site.basis or "" for site in known)
        ]
        plots["risk"] = _drawn(
            scatter(
                series,
                title="Predicted against measured risk",
                description="One point a site; on the dashed line they are equal.",
                x="predicted risk",
                y="measured risk",
                log_x=True,
                log_y=True,
                identity=True,
            )
        )
    if report.fidelity is not None:
        laws = [report.fidelity, *report.fidelity.stress]
        series = [
            Series(
                {"one-site": "one site a trial", "all-sites": "all sites at once"}.get(law, law),
                [row.swap for row in laws if row.law == law],
                [row.iia for row in laws if row.law == law],
            )
            for law in dict.fromkeys(row.law for row in laws)
        ]
        plots["laws"] = _drawn(
            lines(
                series,
                title="Interchange-intervention accuracy by swap probability",
                description=f"The dashed line is what is certified, {report.fidelity.iia_lower:.4f}.",
                x="swap probability",
                y="IIA",
                rules=[report.fidelity.iia_lower],
            )
        )
    if len(report.candidates) > 1:
        points = sorted(report.candidates, key=lambda candidate: candidate.params)
        share = report.sizes.compiled.params / max(report.sizes.dense.params, 1)
        made = [] if report.fidelity is None else [Series("this model, certify part", [share], [report.fidelity.iia])]
        plots["frontier"] = _drawn(
            lines(
                [
                    Series(
                        "candidates, choose part",
                        [point.params for point in points],
                        [point.iia for point in points],
                        low=[point.iia_lower for point in points],
                        high=[point.iia for point in points],
                        labels=[f"{point.params:.1%} of the parameters: IIA {point.iia:.4f}" for point in points],
                    ),
                    *made,
                ],
                title="Fidelity against size",
                description="Candidates, the band reaching down to their lower bounds; and the model that was made.",
                x="share of the parameters",
                y="IIA",
            )
        )
    steps = [(step.predicted, step.measured) for step in report.recalibration if step.predicted is not None]
    if len(steps) > 1:
        plots["steps"] = _drawn(
            lines(
                [
                    Series("predicted", list(range(1, len(steps) + 1)), [predicted or 0.0 for predicted, _ in steps]),
                    Series("measured", list(range(1, len(steps) + 1)), [measured for _, measured in steps]),
                ],
                title="Risk as site after site is replaced",
                description="In the order of the graph, on samples held out.",
                x="sites replaced",
                y="risk",
            )
        )
    return plots


def _goal(report: Report) -> str:
    """What was asked for and what was reached."""
    reached = report.goal_reached
    if reached is None or reached.asked is None or reached.reached is None:
        return report.goal
    return f"{report.goal}: asked {reached.kind} {reached.asked:.3g}, reached {reached.reached:.3g}"


def _swapping(law: str, swap: float) -> str:
    """A law in words."""
    where = "at one site drawn at random" if law == "one-site" else "at every site"
    which = "every unit they share" if swap == 1.0 else f"each unit they share, with probability {swap:g},"
    return f"Set {which} {where} to what it is on another input"


# --- plots with their numbers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A plot of `drawing`, what it shows, and the table of its numbers."""

    title: str
    plot: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def svg(self) -> Markup:
        """The plot as it goes into a page."""
        return _drawn(self.plot)


def figures_html(heading: str, text: str, figures: Sequence[Figure]) -> str:
    """A page of plots with their numbers."""
    return _page("figures.html", heading=heading, text=text, figures=figures)


# --- templates --------------------------------------------------------------------------------------------------------


def _drawn(svg: str) -> Markup:
    """A plot, whose text `drawing` has escaped."""
    return Markup(svg)  # noqa: S704


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: name is None or not name.endswith(".md"),  # noqa: S701  # Markdown escapes by filters
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "short": lambda value: f"{value:.3g}",
        "four": lambda value: f"{value:.4f}",
        "percent": lambda value: f"{value:.2%}",
        "numbers": lambda values: ", ".join(f"{value:.4g}" for value in values),
        "file": lambda path: PurePath(path).name if path else "model in memory",
        "md": lambda text: re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split())),
        "code": lambda text: " ".join(str(text).replace("`", "ˋ").replace("|", "¦").split()),
    }
    css = (HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    environment.globals |= {"css": Markup(css), "css_digest": digest}  # noqa: S704  # our own style sheet
    return environment


def _page(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(**content)
