"""Running an audit again from its certificate: all that it says must come out as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mscompile.audit.disjointness import fingerprints
from mscompile.audit.inputs import AuditModel, known_samples, open_model
from mscompile.audit.pipeline import examine
from mscompile.audit.report import AuditedData, AuditReport, Claim
from mscompile.audit.setup import AuditOptions, prepare
from mscompile.audit.tau import SiteClaim
from mscompile.errors import VerificationError
from mscompile.intake.data import read
from mscompile.intake.samples import Samples, Source
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress

LOSS = 1e-6
"""Per trial, of a loss that is no count: sums of float32 outputs differ so much between processors."""
ROUNDING = 1e-4
"""Of what is measured beside the claims, relative to the largest number it stands with: statistics of float32 activations,
and solutions of linear systems in them, differ so much between processors."""
ARITHMETIC = 1e-9
"""Of bounds that follow from the same counts, between versions of scipy."""
SHORT = {"disagreements": "S", "trials": "n"}
COMPARED = ("outputs", "tau", "data", "laws", "plain", "explanation", "counterexample", "comparison", "scope")
"""Parts of the certificate, beside verdict, checks and claims, that are made again."""
PLACES = ("folder", "path")
"""What is where on this machine."""
EXPLAINING = ("laws", "explanation", "counterexample")
"""Those that are left out where only the claims are."""


@dataclass(frozen=True)
class Replay:
    """A certificate and what running it again gave.

    `differences` are those beyond rounding; `exact` says that every number came out the same to the last digit. `left_out`
    names parts of the certificate that were not made again.
    """

    report: AuditReport
    claims: tuple[Claim, ...]
    differences: tuple[str, ...]
    exact: bool
    left_out: tuple[str, ...]


def replay(
    certificate: Path,
    dense: Path | None = None,
    compiled: Path | None = None,
    data: Source | None = None,
    progress: Progress = no_progress,
    *,
    against: Path | None = None,
    explain: bool = True,
    run: Run = ALONE,
) -> Replay:
    """Check every digest of a certificate, make the audit again, and compare all that it says.

    Files are taken from where the certificate names them unless given. It takes as long as the audit did; without `explain`,
    claims and self-checks alone are made again.

    Raises
    ------
    VerificationError
        The certificate, a model or the data is not what it was.
    UsageError
        A file is not there.
    """
    report = AuditReport.parse(certificate.read_bytes() if certificate.is_file() else b"", str(certificate))
    models = [
        _same(open_model(given if given is not None else Path(file.path)), file.sha256)
        for given, file in ((dense, report.dense), (compiled, report.compiled))
    ]
    samples = _samples(report, models[0], data)
    options = asked_again(report, explain=explain)
    setup = prepare(models[0], models[1], samples, options, tau=claimed_sites(report), origin=report.tau_origin, run=run)
    setup.engine.batch_size = report.batch_size
    other = _other(report, against)
    described = _described(report.data, samples, models)
    again = examine(setup, options, described, against=other, recorded=report.checks, progress=progress)
    left_out = [*(() if explain else EXPLAINING), *(() if other is not None else ("comparison",))]
    skipped = tuple(part for part in left_out if getattr(report, part))
    found = list(_differences(report, again, skipped))
    return Replay(
        report,
        tuple(again.claims),
        tuple(text for text, beyond in found if beyond),
        exact=not found,
        left_out=skipped,
    )


def asked_again(report: AuditReport, *, explain: bool = True) -> AuditOptions:
    """The options that a certificate was made with; without `explain`, those for its claims alone.

    Raises
    ------
    UsageError
        No audit takes them.
    """
    asked = report.asked
    return AuditOptions(
        fidelity=asked.fidelity,
        laws=tuple(asked.laws),
        swaps=tuple(asked.swaps),
        conventions=tuple(asked.conventions),
        metrics=tuple(asked.metrics),
        outputs=asked.outputs,
        delta=asked.delta,
        trials=asked.trials,
        table=asked.table if explain else 0,
        explain=asked.explain and explain,
        provenance=asked.provenance,
        batch_size=report.batch_size,
        seed=asked.seed,
    )


def claimed_sites(report: AuditReport) -> list[SiteClaim]:
    """The tau of a certificate."""
    return [
        SiteClaim(
            dense=site.dense,
            compiled=site.compiled,
            dense_axis=site.dense_axis,
            compiled_axis=site.compiled_axis,
            dense_channels=tuple(site.dense_channels),
            compiled_channels=tuple(site.compiled_channels),
        )
        for site in report.tau
    ]


def _other(report: AuditReport, given: Path | None) -> Path | None:
    """The model that was compared, where it is at hand."""
    if report.comparison is None:
        return None
    path = given if given is not None else Path(report.comparison.other.path)
    if given is None and not path.is_file():
        return None
    _same(open_model(path), report.comparison.other.sha256)
    return path


def _described(recorded: AuditedData, samples: Samples, models: Sequence[AuditModel]) -> AuditedData:
    """What the certificate says of its data, counted again; and compared again where digests are at hand."""
    prints = fingerprints(samples)
    known, _ = known_samples(None, models[0], models[1])
    met = 0 if known is None else int(np.isin(prints, known).sum())
    return recorded.model_copy(
        update={
            "samples": len(samples),
            "pairs": len(samples) // 2,
            "repeated": len(prints) - len(np.unique(prints)),
            "disjoint": "no" if met else recorded.disjoint,
        }
    )


def _same(model: AuditModel, sha256: str) -> AuditModel:
    if model.sha256 != sha256:
        raise VerificationError(
            "a model is not the one that was audited",
            where=str(model.path),
            why=f"it has sha256 {model.sha256[:16]}…, the certificate names {sha256[:16]}…",
            hint="get the file that was audited",
        )
    return model


def _samples(report: AuditReport, dense: AuditModel, data: Source | None) -> Samples:
    described = report.data
    samples = read(
        data if data is not None else described.source, dense.specs, labels=described.labels, limit=described.limit
    )
    if described.left_out:
        samples = samples.take(np.setdiff1d(np.arange(len(samples)), described.left_out))
    if samples.sha256 != described.sha256:
        raise VerificationError(
            "the data are not those of the audit",
            where=samples.source,
            why=f"they have sha256 {samples.sha256[:16]}…, the certificate names {described.sha256[:16]}…",
            hint="get the data of the audit",
        )
    return samples


# --- what differs -----------------------------------------------------------------------------------------------------


def _differences(old: AuditReport, new: AuditReport, skipped: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """What is not the same, and whether that is more than rounding."""
    if old.verdict != new.verdict:
        yield f"the verdict was {old.verdict}, is {new.verdict}: {new.because}", True
    if _masked(old.because) != _masked(new.because) and old.verdict == new.verdict:
        yield f"the reason was {old.because!r}, is {new.because!r}", True
    made = {check.name: check.passed for check in new.checks}  # more than before where a plan has come to hand
    recorded = {check.name: check.passed for check in old.checks}
    yield from _nested(recorded, {name: made.get(name) for name in recorded}, "checks")
    if len(old.claims) != len(new.claims):
        yield f"there were {len(old.claims)} claims, and are {len(new.claims)}", True
    for a, b in zip(old.claims, new.claims, strict=False):
        yield from _claim(a, b)
    contents = [report.model_dump(mode="json") for report in (old, new)]
    for part in COMPARED:
        if part not in skipped:
            yield from _nested(contents[0][part], contents[1][part], part)


def _masked(text: str) -> str:
    """A sentence without its numbers, which stand elsewhere in full."""
    return re.sub(r"[0-9][0-9.e+-]*", "#", text)


def _claim(old: Claim, new: Claim) -> Iterator[tuple[str, bool]]:
    """Counts must be the same; sums of other losses, and what follows from them, but for rounding."""
    counted = all(name.rpartition(": ")[2] in ("argmax", "equality") for name in old.metric.split(", "))
    before, after = (claim.model_dump() for claim in (old, new))
    where = f"{old.law}, swap {old.swap:g}, {old.convention} values, {old.metric}"
    for name, a in before.items():
        b = after[name]
        if a != b:
            loose = LOSS * old.trials if name == "disagreements" else 10 * LOSS
            much = loose if not counted else 0.0 if name == "disagreements" else ARITHMETIC
            beyond = not isinstance(a, float) or abs(a - b) > much
            yield f"{where}: {SHORT.get(name, name)} was {a}, is {b}", beyond


def _nested(old: Any, new: Any, where: str, scale: float = 0.0) -> Iterator[tuple[str, bool]]:
    """Differences of two JSON values; numbers are held against the largest beside them."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        largest = max((abs(v) for v in old.values() if isinstance(v, float)), default=0.0)
        for key in old:
            if key not in PLACES:
                yield from _nested(old[key], new[key], f"{where}, {key}", largest)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        largest = max((abs(v) for v in old if isinstance(v, float)), default=0.0)
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _nested(a, b, f"{where} {number + 1}", largest)
    elif old != new:
        numbers = isinstance(old, float) and isinstance(new, float)
        yield f"{where} was {old}, is {new}"[:400], not numbers or abs(old - new) > ROUNDING * max(scale, ROUNDING)
