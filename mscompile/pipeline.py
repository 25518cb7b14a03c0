"""The whole story: load, calibrate, score, plan, rewrite, prove, verify, report, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from mscompile.clock import Clock
from mscompile.errors import GoalError
from mscompile.files import file_bytes, is_large, output_conflict, save_model, staged
from mscompile.intake.loading import NOTES, check_unchanged
from mscompile.intake.samples import Source
from mscompile.intake.wire import check_regular
from mscompile.machine import blas_threads
from mscompile.network.dense import Model, check_outputs, find_data, nothing_to_cut, open_dense
from mscompile.network.inspection import Inspection, inspect_scm
from mscompile.options import Options
from mscompile.planning.plan import Plan
from mscompile.report import Report
from mscompile.reporting import build_report, stamp
from mscompile.runs.limits import finishing
from mscompile.runs.locks import claimed
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress
from mscompile.search.search import compile_from_data, compile_from_weights
from mscompile.verification.checks import check_independence


@dataclass(frozen=True)
class Compilation:
    """What compiling gave.

    Attributes
    ----------
    model
        The compiled model.
    plan, report
        What was done, and what it costs and is worth.
    path
        The file written; None if none was.
    """

    model: ir.Model
    plan: Plan
    report: Report
    path: Path | None


def inspect(model: Model) -> Inspection:
    """Read a model and say what can be cut, and why the rest is left alone."""
    return inspect_scm(open_dense(model).scm)


@blas_threads()
def compile_model(
    model: Model,
    data: Source | None = None,
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    command: str = "",
    run: Run = ALONE,
    progress: Progress = no_progress,
    on_warning: Callable[[str], None] | None = None,
) -> Compilation:
    """Compile a trained network into a smaller, verified one.

    Parameters
    ----------
    model
        Path, ModelProto or onnx-ir model. It is not changed.
    data
        See `mscompile.intake.data.read`. None: data beside the model's file; where there is none, only what the weights
        prove.
    output
        File to write, with ``.plan.json`` and ``.report.json`` beside it. None writes nothing.
    options
        Goal, objective and so on.
    force, dry_run
        Overwrite; write nothing.
    run
        What is kept on the way, and who works; by default nothing, and this process alone.

    Raises
    ------
    MscompileError
        One of its kinds; nothing has been written then.
    """
    target = None if output is None or dry_run else Path(output)
    if isinstance(model, str | Path):
        check_regular(Path(model))
    with claimed(target):
        if target is not None:
            read = [Path(entry) for entry in (model, data) if isinstance(entry, str | Path)]
            output_conflict([target, *_beside(target)], force=force, inputs=read)
        done = _compile(model, data, target, options or Options(), command, run, progress)
    for warning in done.report.warnings:
        if on_warning is not None:
            on_warning(warning)
    return done


def _compile(
    model: Model,
    data: Source | None,
    target: Path | None,
    options: Options,
    command: str,
    run: Run,
    progress: Progress,
) -> Compilation:
    clock = Clock()
    with clock.time("load"):
        source = open_dense(model, options.only, options.freeze)
        external = bool(source.external) or is_large(source.model)
    check_outputs(source)
    samples = find_data(source, data, options)
    source = source.given(samples)
    if source.batch:
        options = replace(options, batch_size=source.batch)
    warnings = list(samples.notes) if samples is not None else []
    warnings += source.model.meta.get(NOTES, ())
    if "pkg.mscompile.version" in source.model.metadata_props:
        warnings.append("the model has been compiled before: it is compared with what it is now, not with its origin")
    if not source.groups:
        raise GoalError(
            "nothing in this model can be cut",
            where=str(source.path or "model"),
            why=nothing_to_cut(source, options),
            hint="`mscompile inspect MODEL` lists every site and weight with its reason",
        )
    if samples is not None and source.scm.samples_met:
        batch = next(samples.batches(options.batch))
        check_independence(source.model, batch, source.weighted_outputs(options), samples.shared)
    run.work.begin(
        model=source.sha256,
        data=None if samples is None else samples.sha256,
        source="nothing" if samples is None else samples.source,
        target=str((target or source.path or Path("model")).absolute()),
    )
    result = (
        compile_from_weights(source, clock)
        if samples is None
        else compile_from_data(source, samples, options, clock, run, progress)
    )
    options = replace(options, batch_size=result.batch or options.batch)
    warnings += result.warnings
    if samples is not None:
        samples.check_unchanged()
    compiled = stamp(result.compiled, result.plan, source.sha256)
    _document(compiled, source.model)
    check_unchanged(source.model)
    with finishing():
        with clock.time("save"):
            sha256, size = _write_model(compiled, target, external=external)
        warnings += run.work.notes
        report = build_report(source, result, samples, options, clock, warnings, command, compiled, target, sha256, size)
        report = report.model_copy(update={"reused": run.work.reused})
        if target is not None:
            plan_path, report_path = _beside(target)
            with staged(plan_path) as draft:
                draft.write_text(result.plan.to_json(), encoding="utf-8")
            with staged(report_path) as draft:
                draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        run.work.finish()
    return Compilation(compiled, result.plan, report, target)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_suffix(".plan.json"), target.with_suffix(".report.json")


def _document(compiled: ir.Model, dense: ir.Model) -> None:
    """Carry over what documents the weights."""
    for name, value in compiled.graph.initializers.items():
        origin = dense.graph.initializers.get(name)
        if isinstance(value.const_value, ir.Tensor) and origin is not None and origin.const_value is not None:
            value.const_value.doc_string = origin.const_value.doc_string
            value.const_value.metadata_props.update(origin.const_value.metadata_props)


def _write_model(model: ir.Model, target: Path | None, *, external: bool) -> tuple[str | None, int]:
    """Digest and size of the compiled file; None and the size it would have where nothing is written."""
    if target is None:
        return None, file_bytes(model)
    return save_model(model, target, external=external)
