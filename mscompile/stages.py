"""The stages alone: calibrate, plan, apply. Statistics and plans are files between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mscompile.calibration.anchors import Anchors, with_scales
from mscompile.calibration.batches import fitting_batch
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.prediction import SiteCheck, check_units, imbalance
from mscompile.calibration.statistics import Statistics
from mscompile.calibration.statistics_file import load_statistics, save_statistics
from mscompile.calibration.windows import view_of, window_name, window_weight
from mscompile.errors import DataError, GoalError, UsageError
from mscompile.files import is_large, output_conflict, save_model, spare_inputs, staged
from mscompile.intake.samples import Source
from mscompile.machine import blas_threads
from mscompile.network.dense import DenseModel, Model, files_read, find_data, generated_inputs, nothing_to_cut, open_dense
from mscompile.network.scm import Site
from mscompile.options import Options
from mscompile.planning.plan import Keep, Plan, SitePlan, resolve_keep
from mscompile.planning.planner import Planner
from mscompile.planning.preparation import eliminate, what_to_measure
from mscompile.planning.replacements import CONSTANT
from mscompile.planning.scores import OBJECTIVES, Scores, score
from mscompile.reporting import stamp
from mscompile.rewrite import Compiled, rewrite
from mscompile.runs.locks import claimed
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress
from mscompile.verification.checks import check_independence
from mscompile.verification.verify import fold_error, make_pair


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's sites, and how well they predict where that was asked for."""

    dense: DenseModel
    statistics: Statistics
    scores: Scores
    checks: tuple[SiteCheck, ...]
    notes: tuple[str, ...]


@blas_threads()
def calibrate_model(
    model: Model,
    data: Source | None = None,
    output: Path | None = None,
    options: Options | None = None,
    *,
    check: int = 0,
    force: bool = False,
    run: Run = ALONE,
    progress: Progress = no_progress,
) -> Calibration:
    """Collect the statistics that `options` needs, over all the data given.

    Parameters
    ----------
    output
        Statistics file to write.
    check
        Units per site whose predicted risk is compared with the measured one: each costs a run over the data.
    """
    options = options or Options()
    with claimed(output):
        if output is not None:
            output_conflict([output], force=force, inputs=files_read(model, data))
        return _calibrate(model, data, output, options, check, run, progress)


def _calibrate(
    model: Model, data: Source | None, output: Path | None, options: Options, check: int, run: Run, progress: Progress
) -> Calibration:
    dense = open_dense(model, options.only, options.freeze)
    spare_inputs([] if output is None else [output], dense.external)
    samples = find_data(dense, data, options)
    dense = dense.given(samples)
    if samples is None:
        raise DataError(
            "there is no calibration data",
            where=str(dense.path or "model"),
            why="none was given, and none lies beside the model",
            hint="give it with --calib",
        )
    if not dense.groups:
        raise GoalError(
            "nothing in this model can be cut",
            where=str(dense.path or "model"),
            why=nothing_to_cut(dense),
            hint="`mscompile inspect MODEL` lists every site and weight with its reason",
        )
    if dense.scm.samples_met:
        few = next(samples.batches(dense.batch or options.batch))
        check_independence(dense.model, few, dense.weighted_outputs(options), samples.shared)
    run.work.begin(
        model=dense.sha256,
        data=samples.sha256,
        source=samples.source,
        target=str((output or dense.path or Path("model")).absolute()),
    )
    measure = what_to_measure(dense, options)
    batch = fitting_batch(dense.scm, dense.sites, samples, measure, dense.batch or options.batch_size, run)
    statistics = calibrate(
        dense.scm,
        dense.sites,
        samples,
        batch_size=batch,
        measure=measure,
        run=run,
        progress=progress,
    )
    checks: tuple[SiteCheck, ...] = ()
    outputs, anchors = dense.weighted_outputs(options), Anchors(options.anchors, options.seed)
    statistics = with_scales(
        dense.scm,
        dense.sites,
        statistics,
        options.objective,
        samples,
        anchors,
        measure=measure,
        batch_size=batch,
        run=run,
        progress=progress,
    )
    scores = score(dense.scm, dense.sites, statistics, options.objective, seed=options.seed)
    notes = (*samples.notes, *scores.warnings, *imbalance(dense.model, outputs, next(samples.batches(batch))))
    if check:
        checks = tuple(
            check_units(
                dense.model,
                dense.sites,
                dense.ranks,
                scores,
                statistics,
                outputs,
                samples,
                count=check,
                batch_size=batch,
                seed=options.seed,
                exclude={tensor: anchors.of(site) for site in dense.sites if (tensor := site.tensor) in statistics.scales},
                progress=progress,
            )
        )
    samples.check_unchanged()
    if output is not None:
        save_statistics(statistics, output, model_sha256=dense.sha256)
    run.work.finish()
    return Calibration(dense, statistics, scores, checks, notes)


@blas_threads()
def plan_model(model: Model, statistics: Path, output: Path | None, options: Options, *, force: bool = False) -> Plan:
    """Make a plan for the sizes that `options.keep` asks for, from a statistics file."""
    if options.keep is None:
        raise UsageError(
            "a plan needs sizes",
            where="--keep",
            why="the search for a fidelity verifies candidates on data",
            hint="give --keep 0.5 or --keep SITE=128, or use `mscompile MODEL --fidelity F`",
        )
    with claimed(output):
        if output is not None:
            output_conflict([output], force=force, inputs=[*files_read(model, None), statistics])
        return _plan(model, statistics, output, options, options.keep)


def _plan(model: Model, statistics: Path, output: Path | None, options: Options, keep: Keep | Mapping[str, Keep]) -> Plan:
    dense = open_dense(model, options.only, options.freeze)
    spare_inputs([] if output is None else [output], dense.external)
    found = load_statistics(statistics, model_sha256=dense.sha256)
    dense = dense.restricted(frozenset(found.moments))
    _check_measured(statistics, found, options)
    scores = score(dense.scm, dense.sites, found, options.objective, seed=options.seed)
    eliminations = eliminate(dense, found, scores, options)
    planner = Planner(
        dense.scm,
        found,
        scores,
        dense.groups,
        {group: elimination.order for group, elimination in eliminations.items()},
        options.replacement,
        options.swap,
        {group: elimination.lossless for group, elimination in eliminations.items()},
    )
    plan = planner.plan(resolve_keep(dense.scm, dense.groups, keep), dense.sha256)
    if output is not None:
        with staged(output) as draft:
            draft.write_text(plan.to_json(), encoding="utf-8")
    return plan


METRICS = {"identity": "squared change", "fisher": "divergence"}
"""What curvature is of, in words."""


def _check_measured(path: Path, found: Statistics, options: Options) -> None:
    """Refuse statistics that lack what the options need."""
    missing = []
    if options.replacement != CONSTANT and any(moments.scatter is None for moments in found.moments.values()):
        missing.append(f"covariances, which --replacement {options.replacement} needs")
    if (needed := OBJECTIVES[options.objective].curvature) not in ("none", found.metric):
        missing.append(f"curvature of the {METRICS[needed]}, which --objective {options.objective} needs")
    if options.output is not None and found.metric != "none" and dict(options.output) != dict(found.outputs):
        missing.append(f"these outputs: theirs are {', '.join(found.outputs)}")
    if missing:
        raise UsageError(
            "the statistics do not hold what this plan needs",
            where=str(path),
            why=f"they lack {' and '.join(missing)}",
            hint="calibrate again with the same --objective and --replacement",
        )


def _check_windows(site: Site, entry: SitePlan) -> None:
    """Refuse weights for readers that the site does not have, or of shapes that they do not take."""
    readers = {window_name(reader): reader for reader in site.readers}
    for planned in entry.windows:
        reader = readers.get(planned.reader)
        window = None if reader is None else view_of(site, reader)
        if reader is None or window is None:
            why = "the site has no such reader, or it is neither a product with a matrix nor a plain convolution"
        else:
            outputs = window_weight(site, reader, window).shape[2]
            places = None if window.kernel else np.argsort(reader.index, kind="stable").reshape(site.size, -1)[entry.kept]
            fits = (
                planned.columns.shape == (len(entry.kept), window.taps, outputs)
                and planned.response.shape == (window.marks, outputs)
                and (planned.places is None) == (places is None)
                and (planned.places is None or np.array_equal(planned.places, places))  # type: ignore[arg-type]
            )
            if fits:
                continue
            why = f"it takes {len(entry.kept)} channels × {window.taps} taps × {outputs} outputs and {window.marks} marks"
        raise UsageError(
            "the plan's new weights do not fit their reader",
            where=f"reader {planned.reader!r} of site {entry.name!r}",
            why=why,
            hint="plan again from statistics of this model",
        )


@dataclass(frozen=True)
class Application:
    """A plan carried out; `fold_error` is None where there was nothing to run the models on."""

    compiled: Compiled
    fold_error: float | None
    path: Path | None


@blas_threads()
def apply_plan(
    model: Model,
    plan: Plan,
    data: Source | None = None,
    output: Path | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
) -> Application:
    """Carry out a plan, and prove it on data or, without any, on generated inputs.

    Raises
    ------
    UsageError
        The plan is of another model, or names sites that it does not have.
    VerificationError
        The compiled graph is not the dense graph under the plan; nothing is written.
    """
    options = options or Options()
    with claimed(output):
        if output is not None:
            output_conflict([output], force=force, inputs=files_read(model, data))
        return _apply(model, plan, data, output, options)


def _apply(model: Model, plan: Plan, data: Source | None, output: Path | None, options: Options) -> Application:
    dense = open_dense(model)
    external = bool(dense.external) or is_large(dense.model)
    spare_inputs([] if output is None else [output], dense.external)
    if plan.model_sha256 != dense.sha256:
        raise UsageError(
            "the plan is of another model",
            where="plan",
            why=f"it is bound to sha256 {plan.model_sha256[:12]}…, the model has {dense.sha256[:12]}…",
            hint="plan again for this model",
        )
    cuttable = {site.tensor: site for site in dense.sites}
    for entry in plan.sites:
        site = cuttable.pop(entry.tensor, None)
        if site is None or (site.size, site.axis) != (entry.size, entry.axis):
            raise UsageError(
                "the plan names a site that cannot be cut so",
                where=entry.name,
                why="the model has no such site, or the plan has it twice"
                if site is None
                else f"it has {site.size} channels on axis {site.axis}",
                hint="`mscompile inspect MODEL` lists the sites",
            )
        _check_windows(site, entry)
    compiled = rewrite(dense.model, plan)
    samples = find_data(dense, data, options) or generated_inputs(dense.specs)
    dense = dense.given(samples)
    error = None
    if samples is not None and plan.sites:
        pair = make_pair(dense.scm, compiled.model, plan, compiled.alignment)
        error = fold_error(pair, plan, samples, dense.batch or options.batch)
    stamped: ir.Model = stamp(compiled, plan, dense.sha256)
    if output is not None:
        save_model(stamped, output, external=external, inputs=dense.external)
    return Application(compiled, error, output)
