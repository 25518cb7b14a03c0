"""The audit: is the compiled model an abstraction of the dense one? For any two ONNX files, whoever made them.

    open both ─▶ read data, compare digests ─▶ tau ─▶ self-checks ─▶ claims, trial by trial ─▶ laws, explanation

Nothing that rewrites a model for compiling is used here: interventions are graph surgery on throw-away copies. Explanations
may borrow the compiler's statistics; no verdict depends on them.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from mscompile.audit import counterexample
from mscompile.audit.claims import compare, decide_claims, measure_laws, measure_plain
from mscompile.audit.inputs import open_model, read_data
from mscompile.audit.report import Asked, AuditedData, AuditReport, Check, Claim
from mscompile.audit.setup import AuditOptions, Setup, prepare
from mscompile.intake.samples import Source
from mscompile.machine import blas_threads
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress
from mscompile.verification.certificate import Verdict
from mscompile.verification.metrics import Metric
from mscompile.version import __version__


@blas_threads()
def audit(
    dense: str | Path,
    compiled: str | Path,
    data: Source,
    options: AuditOptions | None = None,
    *,
    tau: Path | None = None,
    plan: Path | None = None,
    calib: Source | None = None,
    against: Path | None = None,
    output: Path | None = None,
    command: str = "",
    run: Run = ALONE,
    progress: Progress = no_progress,
) -> AuditReport:
    """Test whether `compiled` is an abstraction of `dense` on the population that `data` comes from.

    Parameters
    ----------
    tau, plan
        Files that say how units correspond; by default the compiled file's metadata or, without, its weights say so.
    calib
        The data that `compiled` was made with, to be told apart; by default digests in the report beside it.
    against
        Another compiled model, compared on the same trials.
    output
        The certificate's file. It is not written here; a counterexample goes into a folder beside it.
    run
        Where trials are kept, and who runs them; nothing of that shows in the certificate.

    Returns
    -------
    AuditReport
        The certificate, sealed by its digest.

    Raises
    ------
    MscompileError
        The audit could not be made, or a self-check failed.
    """
    options = options or AuditOptions()
    folder = None if output is None else counterexample.folder_of(output)
    if folder is not None and options.explain:
        counterexample.check_folder(folder)
    ours, theirs = open_model(Path(dense)), open_model(Path(compiled))
    audited = read_data(data, ours, theirs, calib=calib, labels=options.labels, limit=options.samples, shared=options.shared)
    run.work.begin(
        model=ours.sha256,
        data=audited.samples.sha256,
        source=audited.samples.source,
        target=str((output or theirs.path).absolute()),
    )
    setup = prepare(ours, theirs, audited.samples, options, tau=tau, plan=plan, run=run)
    report = examine(setup, options, audited.report, against=against, folder=folder, command=command, progress=progress)
    run.work.finish()
    return report


def examine(
    setup: Setup,
    options: AuditOptions,
    data: AuditedData,
    *,
    against: Path | None = None,
    folder: Path | None = None,
    recorded: Sequence[Check] = (),
    command: str = "",
    progress: Progress = no_progress,
) -> AuditReport:
    """Test the claims on what has been opened, measure what is measured beside, and judge.

    Parameters
    ----------
    folder
        Where a counterexample is written.
    recorded
        Self-checks of an earlier audit, which stand where they could not be made again.
    """
    claims = [tested.claim for tested in decide_claims(setup, options, progress)]
    comparison = None
    if against is not None:
        named = {output.dense: output.weight for output in setup.outputs}
        same = replace(options, batch_size=setup.engine.batch_size, outputs=named)
        other = prepare(setup.dense, open_model(against), setup.samples, same, run=setup.run)
        setup.engine.batch_size = other.engine.batch_size = min(setup.engine.batch_size, other.engine.batch_size)
        comparison = compare(setup, other, options, progress)
    explanation = case = None
    if options.explain:
        from mscompile.audit.explanation import explain

        explanation = explain(setup, options, progress)
        case = counterexample.find(setup, options)
    laws, plain = measure_laws(setup, options, progress), measure_plain(setup)
    made = {check.name for check in setup.checks}
    checks = [*setup.checks, *(check for check in recorded if check.name not in made)]
    verdict, because = judge(claims, checks, data)
    found = None
    if case is not None:
        found = case.report if folder is None else counterexample.write(case, setup, folder)
    return AuditReport(
        versions={
            "mscompile": __version__,
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
            "python": platform.python_version(),
        },
        command=command,
        verdict=verdict,
        because=because,
        dense=setup.dense.file,
        compiled=setup.compiled.file,
        tau_origin=setup.tau.origin,
        tau=list(setup.sites),
        data=data,
        outputs=[output.report for output in setup.outputs],
        asked=asked(options),
        batch_size=setup.engine.batch_size,
        checks=checks,
        claims=claims,
        laws=laws,
        plain=plain,
        explanation=explanation,
        counterexample=found,
        comparison=comparison,
        scope=_scope(claims, data, setup),
        warnings=[*data.notes, *setup.notes, *_misfit(setup)],
    ).sealed()


def _misfit(setup: Setup) -> list[str]:
    """What keeps the labels from giving an accuracy."""
    output = setup.engine.output
    found = setup.engine.dense.read(setup.engine.batch, [output])[output]
    misfit = setup.measures[0].first.misfit(found.shape, setup.samples.labels)
    return [] if misfit is None else [misfit]


def asked(options: AuditOptions) -> Asked:
    """The options as the certificate keeps them."""
    return Asked(
        fidelity=options.fidelity,
        delta=options.delta,
        laws=list(options.laws),
        swaps=list(options.swaps),
        conventions=list(options.conventions),
        metrics=[metric.name if isinstance(metric, Metric) else metric for metric in options.metrics],
        outputs=None if options.outputs is None else dict(options.outputs),
        trials=options.trials,
        table=options.table,
        explain=options.explain,
        provenance=options.provenance,
        seed=options.seed,
    )


def judge(claims: Sequence[Claim], checks: Sequence[Check], data: AuditedData) -> tuple[Verdict, str]:
    """The verdict over all claims, and what it rests on."""
    broken = [check.detail for check in checks if check.name in ("provenance", "fold") and check.passed is False]
    if broken:
        return "refuted", "; ".join(broken)
    refuted = [c for c in claims if c.verdict == "refuted"]
    if refuted:
        c = refuted[0]
        return "refuted", f"IIA is at most {c.iia_upper:.4f} ({_words(c, claims)})"
    failed = [check for check in checks if check.passed is False]
    if failed:
        return "undecided", f"a self-check failed ({failed[0].name}): the audit would not have seen the defect"
    if data.disjoint == "no":
        return "undecided", f"{data.shared} audit samples took part in making the compiled model: they cannot certify it"
    open_ = [c for c in claims if c.verdict == "undecided"]
    if open_:
        c = open_[0]
        return "undecided", (
            f"{c.trials} trials leave IIA between {c.iia_lower:.4f} and {c.iia_upper:.4f} ({_words(c, claims)}): more data "
            "would decide"
        )
    least = min(claims, key=lambda c: c.iia_lower)
    return (
        "certified",
        f"IIA is at least {least.fidelity:g} in every claim, with confidence {1 - sum(c.delta for c in claims):g}",
    )


def _words(claim: Claim, claims: Sequence[Claim]) -> str:
    """A claim in words; its output where there are several."""
    several = len({tuple(c.outputs) for c in claims}) > 1
    which = "" if not several else "all outputs, " if len(claim.outputs) > 1 else f"output {claim.outputs[0]!r}, "
    return f"{which}{claim.law}, swap {claim.swap:g}, {claim.convention} values, {claim.metric}"


def _scope(claims: Sequence[Claim], data: AuditedData, setup: Setup) -> list[str]:
    """What the certificate speaks of, and what not."""
    laws = dict.fromkeys(f"{c.law} with swap probability {c.swap:g}" for c in claims)
    sentences = [
        f"It speaks of interchange by {', '.join(laws)}; other laws in the table are measured, not certified.",
        "It speaks of the population that the audit examples were drawn from, independently, and of no other inputs; each "
        "example was in one pair at most.",
        f"Units were set at {len(setup.tau.sites)} sites; what is not in tau was not intervened on.",
        "It says how alike two models answer under intervention, not that either answers well.",
    ]
    if data.disjoint == "unknown":
        sentences.append(
            "Whether audit examples took part in making the compiled model is not known: no digests of them were at hand."
        )
    elif data.disjoint == "no":
        sentences.append(f"{data.shared} audit examples took part in making the compiled model.")
    else:
        sentences.append(f"No audit example is among those of {data.compared_with}.")
    came = next(check for check in setup.checks if check.name == "provenance")
    sentences.append(
        "What the file of the small model says of its origin is checked by digests, which show change and not forgery."
        if came.passed is not None
        else "The small model was judged by trials alone, not by where it comes from: a change that few answers show passes."
    )
    if setup.tau.origin == "weights":
        sentences.append("Which unit is which was inferred from the weights.")
    return sentences
