"""Running an audit again from its certificate: S and n of every claim must come out as they stand there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mscompile.audit.claims import decide_claims
from mscompile.audit.inputs import AuditModel, open_model
from mscompile.audit.pipeline import judge
from mscompile.audit.report import AuditReport, Claim
from mscompile.audit.setup import AuditOptions, prepare
from mscompile.audit.tau import SiteClaim
from mscompile.data import Samples, Source, read
from mscompile.errors import VerificationError
from mscompile.metrics import METRICS, choose_metric
from mscompile.runtime import Progress, no_progress

ROUNDING = 1e-6
"""Per trial, of a loss that is no count: sums of float32 outputs differ so much between processors."""


@dataclass(frozen=True)
class Replay:
    """A certificate and what running it again gave."""

    report: AuditReport
    claims: tuple[Claim, ...]
    differences: tuple[str, ...]


def replay(
    certificate: Path,
    dense: Path | None = None,
    compiled: Path | None = None,
    data: Source | None = None,
    progress: Progress = no_progress,
) -> Replay:
    """Check every digest of a certificate and test its claims again.

    Files are taken from where the certificate names them unless given.

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
    options = AuditOptions(batch_size=report.batch_size, seed=report.seed, trials=report.trials_most)
    claims = [
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
    setup = prepare(models[0], models[1], samples, options, tau=claims)
    setup.engine.batch_size = report.batch_size
    found = []
    for claim in report.claims:
        one = AuditOptions(
            fidelity=claim.fidelity,
            delta=claim.delta,
            laws=(claim.law,),
            swaps=(claim.swap,),
            conventions=(claim.convention,),
            metrics=(claim.metric,),
            trials=report.trials_most,
            batch_size=report.batch_size,
            seed=report.seed,
        )
        found += [tested.claim for tested in decide_claims(setup, one, progress)]
    differences = [text for old, new in zip(report.claims, found, strict=True) for text in _differences(old, new)]
    # The plan may not be at hand here: then its check stands as it was recorded.
    made = {check.name for check in setup.checks}
    checks = [*setup.checks, *(check for check in report.checks if check.name not in made)]
    verdict, because = judge(found, checks, report.data)
    if verdict != report.verdict:
        differences.append(f"the verdict was {report.verdict}, is {verdict}: {because}")
    return Replay(report, tuple(found), tuple(differences))


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


def _differences(old: Claim, new: Claim) -> Sequence[str]:
    """What differs: counts exactly, sums of other losses but for rounding."""
    where = f"{old.law}, swap {old.swap:g}, {old.convention} values, {old.metric}"
    loose = ROUNDING * max(old.trials, 1) if not _counts(old.metric) else 0.0
    differing = [
        f"{where}: {name} was {a}, is {b}"
        for name, a, b in (("n", old.trials, new.trials), ("verdict", old.verdict, new.verdict))
        if a != b
    ]
    if abs(old.disagreements - new.disagreements) > loose:
        differing.append(f"{where}: S was {old.disagreements:g}, is {new.disagreements:g}")
    expected = 1.0 - old.disagreements / max(old.trials, 1)
    if abs(old.iia - expected) > ROUNDING or abs(old.iia_lower - new.iia_lower) > max(loose, ROUNDING):
        differing.append(f"{where}: IIA or its bound does not follow from S and n")
    return differing


def _counts(metric: str) -> bool:
    return choose_metric(metric, METRICS["argmax"]).name in ("argmax", "equality")
