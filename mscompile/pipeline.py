"""The whole story: load, calibrate, score, plan, rewrite, prove, verify, report, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from mscompile.clock import Clock
from mscompile.errors import GoalError
from mscompile.files import beside, file_bytes, is_large, output_conflict, save_model, spare_inputs, staged
from mscompile.intake.loading import NOTES, check_unchanged
from mscompile.intake.samples import Source
from mscompile.intake.wire import check_regular
from mscompile.machine import blas_threads
from mscompile.network.dense import Model, check_outputs, files_read, find_data, nothing_to_cut, open_dense
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
class Files:
    """Files that a compile writes; None for those that it does not."""

    model: Path | None = None
    plan: Path | None = None
    report: Path | None = None
    html: Path | None = None

    @classmethod
    def of(cls, model: str | Path | None, report: str | Path | None, html: str | Path | None) -> Files:
        """Those asked for; plan and report stand beside the model."""
        target, said, page = (None if path is None else Path(path) for path in (model, report, html))
        if target is None:
            return cls(report=said, html=page)
        return cls(target, beside(target, ".plan.json"), said or beside(target, ".report.json"), page)

    @property
    def all(self) -> list[Path]:
        """Those that are written."""
        return [path for path in (self.model, self.plan, self.report, self.html) if path is not None]


@dataclass(frozen=True)
class Compilation:
    """What compiling gave.

    Attributes
    ----------
    model
        The compiled model.
    plan, report
        What was done, and what it costs and is worth.
    files
        The files written.
    """

    model: ir.Model
    plan: Plan
    report: Report
    files: Files

    @property
    def path(self) -> Path | None:
        """The model's file; None if none was written."""
        return self.files.model


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
    report: str | Path | None = None,
    html: str | Path | None = None,
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
        File to write, with ``.plan.json`` and ``.report.json`` beside it. None writes none of them.
    options
        Goal, objective and so on.
    report, html
        Where the report goes instead; one offline page to write.
    force, dry_run
        Overwrite; write nothing.
    run
        What is kept on the way, and who works; by default nothing, and this process alone.

    Raises
    ------
    MscompileError
        One of its kinds; nothing has been written then.
    """
    files = Files() if dry_run else Files.of(output, report, html)
    if isinstance(model, str | Path):
        check_regular(Path(model))
    with claimed(*files.all):
        output_conflict(files.all, force=force, inputs=files_read(model, data))
        done = _compile(model, data, files, options or Options(), command, run, progress)
    for warning in done.report.warnings:
        if on_warning is not None:
            on_warning(warning)
    return done


def _compile(
    model: Model,
    data: Source | None,
    files: Files,
    options: Options,
    command: str,
    run: Run,
    progress: Progress,
) -> Compilation:
    clock = Clock()
    with clock.time("load"):
        source = open_dense(model, options.only, options.freeze)
        external = bool(source.external) or is_large(source.model)
    spare_inputs(files.all, source.external)
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
        target=str((files.model or source.path or Path("model")).absolute()),
    )
    result = (
        compile_from_weights(source, options, clock)
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
            sha256, size = _write_model(compiled, files.model, external=external, inputs=source.external)
        warnings += run.work.notes
        report = build_report(
            source, result, samples, options, clock, warnings, command, compiled, files.model, sha256, size
        )
        report = report.model_copy(update={"reused": run.work.reused})
        _write_beside(files, result.plan, report)
        run.work.finish()
    return Compilation(compiled, result.plan, report, files)


def _write_beside(files: Files, plan: Plan, report: Report) -> None:
    """Write all files but the model."""
    from mscompile.pages import compile_html

    texts = (
        (files.plan, plan.to_json),
        (files.report, lambda: report.model_dump_json(indent=2) + "\n"),
        (files.html, lambda: compile_html(report)),
    )
    for path, text in texts:
        if path is not None:
            with staged(path) as draft:
                draft.write_text(text(), encoding="utf-8")


def _document(compiled: ir.Model, dense: ir.Model) -> None:
    """Carry over what documents the weights."""
    for name, value in compiled.graph.initializers.items():
        origin = dense.graph.initializers.get(name)
        if isinstance(value.const_value, ir.Tensor) and origin is not None and origin.const_value is not None:
            value.const_value.doc_string = origin.const_value.doc_string
            value.const_value.metadata_props.update(origin.const_value.metadata_props)


def _write_model(model: ir.Model, target: Path | None, *, external: bool, inputs: Iterable[Path]) -> tuple[str | None, int]:
    """Digest and size of the compiled file; None and the size it would have where nothing is written."""
    if target is None:
        return None, file_bytes(model)
    return save_model(model, target, external=external, inputs=inputs)
