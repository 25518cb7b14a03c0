"""Building the report from what was done."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mscompile.audit.disjointness import encode, fingerprints
from mscompile.clock import Clock
from mscompile.files import file_bytes
from mscompile.intake.provenance import METADATA, seal
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, generated_inputs
from mscompile.network.inspection import Inspection, inspect_scm, readers_of
from mscompile.network.sizes import Sizes, count_macs, count_parameters, measure_latency
from mscompile.options import Options
from mscompile.planning.plan import Plan
from mscompile.report import (
    CandidateReport,
    DataReport,
    FileReport,
    GoalReport,
    Report,
    SiteReport,
    SizeReport,
    StepReport,
)
from mscompile.rewrite import Compiled
from mscompile.runtime import Session
from mscompile.search.frontier import Tried
from mscompile.search.search import Result
from mscompile.verification.certificate import risk_bound
from mscompile.version import __version__

SLOWER = "the compiled model is smaller but not faster on this machine"
WIDTHS = (
    ": onnxruntime's convolutions are at their best where widths are multiples of 16, which --latency keeps to and --keep "
    "SITE=N can ask for"
)


def build_report(
    source: DenseModel,
    result: Result,
    samples: Samples | None,
    options: Options,
    clock: Clock,
    warnings: list[str],
    command: str,
    compiled: ir.Model,
    target: Path | None,
    sha256: str | None,
    size: int,
) -> Report:
    """Measure sizes and put everything together; `size` is that of the compiled file in bytes."""
    probe = samples if samples is not None else generated_inputs(source.specs)
    latency: tuple[float | None, float | None] = (None, None)
    macs: tuple[int | None, int | None] = (None, None)
    difference = None
    batch_size = None
    if probe is not None:
        with clock.time("measure"):
            batch_size = min(options.batch, len(probe))
            first = next(probe.batches(batch_size))
            shapes = {name: array.shape for name, array in first.items()}
            macs = count_macs(source.model, shapes), count_macs(compiled, shapes)
            latency = measure_latency(source.model, compiled, probe, batch_size)
            if result.plan.sites and latency[1] > latency[0]:
                maps = any(site.axis == 1 and source.ranks[site.tensor] > 2 for site in result.plan.sites)
                warnings = [*warnings, SLOWER + (WIDTHS if maps else "")]
            difference = _deployment_difference(compiled, first)
    files = (source.path, *source.external) if source.path is not None else ()
    dense_bytes = sum(file.stat().st_size for file in files) if files else file_bytes(source.model)
    dense_params, compiled_params = count_parameters(source.model), count_parameters(compiled)
    sizes = SizeReport(
        dense=Sizes(params=dense_params, macs=macs[0], bytes=dense_bytes, latency_ms=latency[0]),
        compiled=Sizes(params=compiled_params, macs=macs[1], bytes=size, latency_ms=latency[1]),
        latency_batch=batch_size,
    )
    inspection = inspect_scm(source.scm, frozenset(site.tensor for site in result.plan.sites))
    return Report(
        versions={
            "mscompile": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
            "python": platform.python_version(),
        },
        command=command,
        goal=options.goal if samples is not None else "weights only",
        goal_reached=None if samples is None else _goal_report(options, result, sizes),
        options={**asdict(options), "keep": dict(keep) if isinstance(keep := options.keep, Mapping) else keep},
        objective=result.plan.objective,
        replacement=result.plan.replacement,
        seed=options.seed,
        dense=FileReport(path=None if source.path is None else str(source.path), sha256=source.sha256),
        compiled=None if target is None or sha256 is None else FileReport(path=str(target), sha256=sha256),
        plan_sha256=plan_digest(result.plan),
        data=None
        if samples is None
        else DataReport(
            source=samples.source,
            sha256=samples.sha256,
            samples=len(samples),
            split={name: len(part) for name, part in result.parts.items()},
            seed=options.seed,
            fingerprints=encode(fingerprints(samples)),
            notes=list(samples.notes),
        ),
        sites=_site_reports(source, result, inspection),
        coverage=list(inspection.coverage),
        sizes=sizes,
        fold_error=result.fold_error,
        fold_check=result.fold_check,
        deployment_difference=difference,
        fidelity=result.fidelity,
        recalibration=[
            StepReport(
                site=step.tensor,
                predicted=step.predicted,
                measured=step.measured,
                refitted=list(step.refitted),
                rolled_back=step.rolled_back,
            )
            for step in result.steps
        ],
        candidates=[_candidate_report(entry, options.delta) for entry in result.tried],
        timings={stage: round(seconds, 4) for stage, seconds in clock.seconds.items()},
        warnings=warnings,
    )


def _goal_report(options: Options, result: Result, sizes: SizeReport) -> GoalReport:
    dense, compiled = sizes.dense, sizes.compiled
    for kind, asked, a, b in (
        ("params", options.params, dense.params, compiled.params),
        ("macs", options.macs, dense.macs, compiled.macs),
        ("latency", options.latency, dense.latency_ms, compiled.latency_ms),
    ):
        if asked is not None:
            return GoalReport(kind=kind, asked=asked, reached=None if a is None or b is None else b / max(a, 1e-9))
    if options.keep is None:
        return GoalReport(
            kind="fidelity", asked=options.fidelity, reached=None if result.fidelity is None else result.fidelity.iia_lower
        )
    if not isinstance(options.keep, float):
        return GoalReport(kind="keep", asked=None, reached=None)
    cut = [(len(site.kept), site.size) for site in result.plan.sites]
    reached = sum(kept for kept, _ in cut) / sum(size for _, size in cut) if cut else 1.0
    return GoalReport(kind="keep", asked=options.keep, reached=reached)


def _candidate_report(entry: Tried, delta: float) -> CandidateReport:
    point = entry.point
    return CandidateReport(
        size=entry.size,
        params=entry.params,
        macs=entry.macs,
        latency=entry.latency,
        trials=point.trials,
        iia=point.iia,
        iia_lower=1.0 - risk_bound(point.disagreements, point.trials, delta),
        agreement=point.agreement,
    )


def _site_reports(source: DenseModel, result: Result, inspection: Inspection) -> list[SiteReport]:
    planned = {site.tensor: site for site in result.plan.sites}
    reports = []
    for site in source.scm.sites:
        entry = planned.get(site.tensor)
        left = result.compiled.alignment.get(site.tensor)
        reports.append(
            SiteReport(
                name=site.tensor,
                axis=site.axis,
                group=site.group,
                size=site.size,
                kept=site.size if entry is None else len(entry.kept),
                width=site.size if left is None else len(left),
                lossless=0 if entry is None else len(entry.lossless),
                readers=readers_of(site),
                basis=None if entry is None else entry.basis,
                predicted_risk=None if entry is None else entry.predicted_risk,
                measured_risk=result.measured.get(site.tensor),
                left_alone=inspection.left_alone[site.tensor],
            )
        )
    return reports


def _deployment_difference(model: ir.Model, batch: Mapping[str, Any]) -> float:
    """Largest difference that onnxruntime's own rewrites make to the compiled model, in standard deviations."""
    plain, deployed = Session(model, optimise=False).run(batch), Session(model).run(batch)
    worst = 0.0
    for name, wanted in plain.items():
        if wanted.dtype.kind in "iub?":
            continue
        gap = np.abs(wanted.astype(np.float64) - deployed[name].astype(np.float64))
        finite = gap[np.isfinite(gap)]
        spread = float(wanted[np.isfinite(wanted)].std()) or 1.0
        worst = max(worst, float(finite.max()) / spread if finite.size else 0.0)
    return worst


def plan_digest(plan: Plan) -> str:
    """Sha256 of the plan file's text."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def stamp(compiled: Compiled, plan: Plan, sha256: str) -> ir.Model:
    """Write version, digests and tau into the model's metadata, where something was compiled; see `provenance`.

    ``channels`` says, for each site, the axis and the dense channel that each channel was; tau, which of them are retained.
    What an earlier compile wrote stays where nothing was cut since.
    """
    model = compiled.model
    if plan.sites:
        for key in [key for key in model.metadata_props if key.startswith(METADATA)]:
            del model.metadata_props[key]
        tau = {site.tensor: site.kept.tolist() for site in plan.sites}
        model.metadata_props[f"{METADATA}version"] = __version__
        model.metadata_props[f"{METADATA}model_sha256"] = sha256
        model.metadata_props[f"{METADATA}plan_sha256"] = plan_digest(plan)
        channels = {
            site.tensor: (site.axis, left.tolist())
            for site in plan.sites
            if (left := compiled.alignment.get(site.tensor)) is not None
        }
        model.metadata_props[f"{METADATA}channels"] = json.dumps(channels, separators=(",", ":"))
        model.metadata_props[f"{METADATA}tau"] = json.dumps(tau, separators=(",", ":"))
        seal(model)
    return model
