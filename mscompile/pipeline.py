"""The whole story: load, calibrate, score, plan, rewrite, prove, verify, report, save."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mscompile import data as data_module
from mscompile.data import InputSpec, Samples, Source
from mscompile.errors import DataError, GoalError, UnsupportedError, UsageError
from mscompile.files import from_proto, load_model, output_conflict, save_model, staged
from mscompile.inspection import Inspection, inspect_scm, readers_of
from mscompile.metrics import METRICS
from mscompile.passes import CANONICALISE
from mscompile.plan import Keep, Plan, make_plan, resolve_keep, selectable
from mscompile.replacements import REPLACEMENTS
from mscompile.report import (
    CandidateReport,
    DataReport,
    FidelityReport,
    FileReport,
    LawReport,
    Report,
    SiteReport,
    SizeReport,
)
from mscompile.rewrite import Compiled, rewrite
from mscompile.runtime import Progress, Session, no_progress
from mscompile.scm import Scm, Site, read_scm
from mscompile.scores import OBJECTIVES, Scores, score
from mscompile.sizes import Sizes, count_macs, count_parameters, measure_latency
from mscompile.statistics import Statistics, calibrate
from mscompile.verify import Fidelity, Interchange, Law, fold_error, make_pair
from mscompile.version import __version__
from mscompile.weights import exact_plan

SHARES = {"calibrate": 0.5, "choose": 0.1, "certify": 0.4}
"""How data is split. Fitting wants the most; certifying wants pairs, two samples each."""
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Keep ratios that the search for a fidelity tries, from large to small: an order fixed before any data is seen."""
STRESS: tuple[tuple[Law, float], ...] = tuple((law, p) for law in get_args(Law) for p in (0.1, 0.5, 1.0))
"""Laws and swap probabilities reported beside the certified ones."""
FEWEST = 16
"""Samples below which nothing is fitted or certified."""
PROOF_SAMPLES = 256
"""Samples on which the fold error is measured, at most."""

Model = str | Path | onnx.ModelProto | ir.Model


@dataclass(frozen=True)
class Options:
    """How to compile. Defaults are those of the command line.

    Attributes
    ----------
    keep
        Share of every site's channels to keep, or shares (float) and numbers (int) by site. None: search for `fidelity`.
    fidelity
        Interchange-intervention accuracy to certify, where `keep` is not given.
    objective, replacement
        Keys of `OBJECTIVES` and `REPLACEMENTS`.
    law, swap
        Interchange law, see `Fidelity`, and its swap probability.
    delta
        Error probability of the certificate.
    metric
        Key of `METRICS`; chosen by the output's shape if None.
    labels
        Name of the labels in the data; recognised by itself if None.
    samples
        Samples to use at most; all if None.
    batch_size, seed
        Of calibration and verification; of splits and interchanges.
    only, freeze
        Regular expressions on site names: cut only these, never those.
    """

    keep: Keep | Mapping[str, Keep] | None = None
    fidelity: float = 0.95
    objective: Literal["logit-mse", "variance", "magnitude", "random"] = "logit-mse"
    replacement: Literal["affine", "affine-parents", "constant"] = "affine"
    law: Law = "one-site"
    swap: float = 0.1
    delta: float = 0.05
    metric: Literal["argmax", "distance", "cosine"] | None = None
    labels: str | None = None
    samples: int | None = None
    batch_size: int = 64
    seed: int = 0
    only: str | None = None
    freeze: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("fidelity", 0.0 < self.fidelity < 1.0, "lies between 0 and 1"),
            ("swap", 0.0 <= self.swap <= 1.0, "lies in [0, 1]"),
            ("delta", 0.0 < self.delta < 1.0, "lies between 0 and 1"),
            ("batch_size", self.batch_size >= 1, "is at least 1"),
            ("seed", self.seed >= 0, "is not negative"),
            ("objective", self.objective in OBJECTIVES, f"is one of {', '.join(OBJECTIVES)}"),
            ("replacement", self.replacement in REPLACEMENTS, f"is one of {', '.join(REPLACEMENTS)}"),
            ("law", self.law in get_args(Law), f"is one of {', '.join(get_args(Law))}"),
            ("metric", self.metric is None or self.metric in METRICS, f"is one of {', '.join(METRICS)}"),
            ("keep", not isinstance(self.keep, float) or 0.0 < self.keep <= 1.0, "is a share in (0, 1]"),
        )
        for name, holds, rule in checks:
            if not holds:
                raise UsageError(
                    f"option {name} makes no sense",
                    where=f"{name} = {getattr(self, name)!r}",
                    why=f"it {rule}",
                    hint="see `mscompile --help`",
                )

    @property
    def goal(self) -> str:
        """The goal in the words of the command line."""
        if self.keep is None:
            return f"--fidelity {self.fidelity:g}"
        if isinstance(self.keep, Mapping):
            return " ".join(f"--keep {name}={value}" for name, value in self.keep.items())
        return f"--keep {self.keep:g}"


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


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Source:
    """The dense model in canonical form, with what was found out about it."""

    model: ir.Model
    scm: Scm
    groups: Mapping[int, list[Site]]
    sha256: str
    path: Path | None
    specs: tuple[InputSpec, ...]

    @property
    def sites(self) -> list[Site]:
        return [site for sites in self.groups.values() for site in sites]

    @property
    def ranks(self) -> dict[str, int]:
        return {site.tensor: len(self.scm.shapes[site.tensor]) for site in self.scm.sites}


def _open(model: Model, only: str | None = None, freeze: str | None = None) -> _Source:
    path = Path(model) if isinstance(model, str | Path) else None
    if path is not None:
        loaded, sha256 = load_model(path)
    else:
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        loaded = from_proto(proto)  # type: ignore[arg-type]
        sha256 = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()  # type: ignore[union-attr]
    specs = tuple(_specs(loaded))
    CANONICALISE(loaded)
    scm = read_scm(loaded)
    return _Source(loaded, scm, selectable(scm, only=only, freeze=freeze), sha256, path, specs)


def _specs(model: ir.Model) -> Iterator[InputSpec]:
    for value in model.graph.inputs:
        if value.is_initializer():
            continue  # a default value: the data need not give it
        if value.dtype is None or value.shape is None:
            raise UnsupportedError(
                "an input has no declared tensor type",
                where=f"input {value.name!r}",
                why="sequences, optionals and unshaped inputs cannot be calibrated",
                hint="export the model with tensor inputs",
            )
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
        yield InputSpec(value.name or "", value.dtype.numpy(), shape)


def inspect_model(model: Model) -> Inspection:
    """Read a model and say what can be cut, and why the rest is left alone."""
    return inspect_scm(_open(model).scm)


def compile_model(
    model: Model,
    data: Source | None = None,
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    command: str = "",
    progress: Progress = no_progress,
    on_warning: Callable[[str], None] | None = None,
) -> Compilation:
    """Compile a trained network into a smaller, verified one.

    Parameters
    ----------
    model
        Path, ModelProto or onnx-ir model. It is not changed.
    data
        See `mscompile.data.read`. None: data beside the model's file; where there is none, only what the weights prove.
    output
        File to write, with ``.plan.json`` and ``.report.json`` beside it. None writes nothing.
    options
        Goal, objective and so on.
    force, dry_run
        Overwrite; write nothing.

    Raises
    ------
    MscompileError
        One of its kinds; nothing has been written then.
    """
    options = options or Options()
    clock = _Clock()
    target = None if output is None or dry_run else Path(output)
    if target is not None:
        output_conflict([target, *_beside(target)], force=force)
    with clock.time("load"):
        source = _open(model, options.only, options.freeze)
    samples = _find_data(source, data, options)
    warnings = list(samples.notes) if samples is not None else []
    if not source.groups:
        raise GoalError(
            "nothing in this model can be cut",
            where=str(source.path or "model"),
            why=_reasons(source),
            hint="`mscompile inspect MODEL` lists every site and weight with its reason",
        )
    result = _from_weights(source, clock) if samples is None else _from_data(source, samples, options, clock, progress)
    warnings += result.warnings
    for warning in warnings:
        if on_warning is not None:
            on_warning(warning)
    compiled = _stamp(result.compiled.model, result.plan, source.sha256)
    with clock.time("save"):
        sha256, size = _write_model(compiled, target)
    report = _report(source, result, samples, options, clock, warnings, command, compiled, target, sha256, size)
    if target is not None:
        plan_path, report_path = _beside(target)
        with staged(plan_path) as draft:
            draft.write_text(result.plan.to_json(), encoding="utf-8")
        with staged(report_path) as draft:
            draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Compilation(compiled, result.plan, report, target)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_suffix(".plan.json"), target.with_suffix(".report.json")


def _reasons(source: _Source) -> str:
    inspection = inspect_scm(source.scm)
    reasons = dict.fromkeys(reason for reason in inspection.left_alone.values() if reason)
    listed = "; ".join(list(reasons)[:3]) or "no operator contracts a unit axis with a weight"
    return listed + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def _find_data(source: _Source, data: Source | None, options: Options) -> Samples | None:
    if data is None and source.path is not None:
        data = data_module.find_beside(source.path)
    if data is None:
        return None
    return data_module.read(data, source.specs, labels=options.labels, limit=options.samples)


@dataclass(frozen=True)
class _Result:
    plan: Plan
    compiled: Compiled
    fold_error: float | None
    fold_check: str
    fidelity: FidelityReport | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[CandidateReport, ...] = ()
    parts: Mapping[str, Samples] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _from_weights(source: _Source, clock: _Clock) -> _Result:
    """Compile without data: only what the weights prove."""
    with clock.time("plan"):
        plan = exact_plan(source.scm, source.groups, model_sha256=source.sha256)
    if not plan.sites:
        raise GoalError(
            "without data there is nothing to do",
            where=str(source.path or "model"),
            why="its weights alone prove no unit constant, duplicate or unread",
            hint="give calibration data with --calib\n"
            + data_module.recipe(source.specs, source.path or Path("model.onnx")),
        )
    with clock.time("rewrite"):
        compiled = rewrite(source.model, plan)
    probes = _generated(source.specs)
    error = None
    if probes is not None:
        with clock.time("prove"):
            pair = make_pair(source.model, compiled.model, plan, source.ranks, compiled.alignment)
            error = fold_error(pair, plan, probes, len(probes))
    check = "on generated standard-normal inputs" if probes is not None else "not run: no data, and no inputs to generate"
    warning = "no data: only what the weights prove was done, and fidelity was not measured"
    return _Result(plan, compiled, error, check, warnings=(warning,))


def _generated(specs: tuple[InputSpec, ...]) -> Samples | None:
    """Standard-normal inputs for checking an exact rewrite, where every input is a float of static shape."""
    shapes = {spec.name: (16, *spec.shape[1:]) for spec in specs}
    if any(s.dtype.kind != "f" or isinstance(s.shape[0], int) for s in specs):
        return None
    if not all(isinstance(d, int) for shape in shapes.values() for d in shape):
        return None
    rng = np.random.default_rng(0)
    inputs = {s.name: rng.standard_normal(shapes[s.name]).astype(s.dtype) for s in specs}  # type: ignore[arg-type]
    return Samples(inputs, None, "generated")


def _from_data(source: _Source, samples: Samples, options: Options, clock: _Clock, progress: Progress) -> _Result:
    """Compile with data: calibrate, search or take the plan asked for, prove, certify."""
    if len(samples) < FEWEST:
        raise DataError(
            "there are too few samples",
            where=samples.source,
            why=f"{len(samples)} samples; fitting and verifying take at least {FEWEST}",
            hint="give more data; some hundred samples are a good start",
        )
    parts = dict(zip(SHARES, samples.split(tuple(SHARES.values()), options.seed), strict=True))
    with clock.time("calibrate"):
        statistics = calibrate(
            source.scm, source.sites, parts["calibrate"], batch_size=options.batch_size, progress=progress
        )
        scores = score(source.scm, source.sites, statistics, options.objective, seed=options.seed)
    _enough(source, statistics, options)
    search = _Search(source, statistics, scores, parts, options, clock, progress)
    if options.keep is not None:
        return search.fixed(options.keep)
    return search.smallest()


def _enough(source: _Source, statistics: Statistics, options: Options) -> None:
    for site in source.sites:
        count = statistics.moments[site.tensor].count
        if options.replacement != "constant" and count <= site.size:
            raise DataError(
                "there are too few samples for affine replacement",
                where=f"site {site.tensor!r}",
                why=f"{count} observations (samples × positions) for {site.size} channels leave the fit undetermined",
                hint="give more data, leave the site out with --freeze, or use --replacement constant",
            )


@dataclass(frozen=True)
class _Candidate:
    keep: float
    plan: Plan
    compiled: Compiled
    interchange: Interchange | None
    params: int


@dataclass(frozen=True)
class _Search:
    """Candidates from one calibration."""

    source: _Source
    statistics: Statistics
    scores: Scores
    parts: Mapping[str, Samples]
    options: Options
    clock: _Clock
    progress: Progress

    def fixed(self, keep: Keep | Mapping[str, Keep]) -> _Result:
        """The plan that was asked for."""
        return self._finish(self._candidate(keep), (), attempts=1)

    def smallest(self) -> _Result:
        """The smallest candidate of the grid whose fidelity is certified.

        Candidates are measured on the `choose` part from large to small until two in a row fall short. Those that did not
        are then tested on the `certify` part in the same order, each at the full δ, up to the first that fails. A wrong
        certificate needs the first untrue claim in that fixed order to pass, so that its probability stays below δ however
        many are tested (fixed-sequence testing; Maurer, Hothorn and Lehmacher 1995).
        """
        tried: list[tuple[_Candidate, Fidelity]] = []
        misses = 0
        for keep in self.progress(GRID, "search", len(GRID)):
            candidate = self._candidate(keep)
            if candidate.interchange is None:
                continue
            fidelity = self._measure(candidate, "choose", self.options.delta)
            tried.append((candidate, fidelity))
            misses = misses + 1 if fidelity.iia < self.options.fidelity else 0
            if misses == 2:
                break
        entries = tuple(CandidateReport(keep=c.keep, params=c.params, iia=f.iia, iia_lower=f.iia_lower) for c, f in tried)
        certified: _Candidate | None = None
        attempts, bound = 0, 0.0
        for candidate, chosen in tried:
            if chosen.iia < self.options.fidelity:
                continue
            attempts += 1
            bound = self._measure(candidate, "certify", self.options.delta).iia_lower
            if bound < self.options.fidelity:
                break
            certified = candidate
        if certified is not None:
            return self._finish(certified, entries, attempts=attempts)
        best = max((f.iia for _, f in tried), default=0.0)
        raise GoalError(
            f"no candidate is certified to reach an IIA of {self.options.fidelity:g}",
            where=f"{len(tried)} candidates, {len(self.parts['certify']) // 2} pairs held out to certify",
            why=f"the best IIA measured was {best:.4f}"
            + (f", certified to be at least {bound:.4f}; fewer pairs need a larger margin" if attempts else ""),
            hint="give more data, ask for less with --fidelity, or fix a size with --keep",
        )

    def _candidate(self, keep: Keep | Mapping[str, Keep]) -> _Candidate:
        source, options = self.source, self.options
        with self.clock.time("plan"):
            plan = make_plan(
                source.scm,
                self.statistics,
                self.scores,
                source.groups,
                resolve_keep(source.scm, source.groups, keep),
                model_sha256=source.sha256,
                replacement=options.replacement,
                swap=options.swap,
            )
        with self.clock.time("rewrite"):
            compiled = rewrite(source.model, plan)
        interchange = None
        if plan.sites:
            with self.clock.time("verify"):
                pair = make_pair(source.model, compiled.model, plan, source.ranks, compiled.alignment)
                metric = None if options.metric is None else METRICS[options.metric]
                interchange = Interchange(pair, self.parts["choose"], batch_size=options.batch_size, metric=metric)
        ratio = float(keep) if isinstance(keep, float) else float("nan")
        return _Candidate(ratio, plan, compiled, interchange, count_parameters(compiled.model))

    def _measure(
        self, candidate: _Candidate, part: str, delta: float, law: Law | None = None, swap: float | None = None
    ) -> Fidelity:
        """Interchange on one part, under the law asked for unless another is given."""
        assert candidate.interchange is not None
        law = self.options.law if law is None else law
        swap = self.options.swap if swap is None else swap
        with self.clock.time("verify"):
            return candidate.interchange.run(
                self.parts[part], law=law, swap=swap, seed=self.options.seed, delta=delta, progress=self.progress
            )

    def _finish(self, candidate: _Candidate, entries: tuple[CandidateReport, ...], *, attempts: int) -> _Result:
        """Prove the fold, measure everything on the `certify` part."""
        options = self.options
        if candidate.interchange is None:
            return _Result(
                candidate.plan,
                candidate.compiled,
                0.0,
                "nothing was replaced",
                candidates=entries,
                parts=self.parts,
                warnings=("nothing was cut: the goal keeps every unit",),
            )
        interchange = candidate.interchange
        proof = self.parts["choose"].take(slice(PROOF_SAMPLES))
        with self.clock.time("prove"):
            error = fold_error(interchange.pair, candidate.plan, proof, options.batch_size)
        main = self._measure(candidate, "certify", options.delta)
        stress = [
            self._measure(candidate, "certify", options.delta, law, swap)
            for law, swap in STRESS
            if (law, swap) != (options.law, options.swap) and (law == options.law or len(candidate.plan.sites) > 1)
        ]
        with self.clock.time("verify"):
            plain = interchange.plain(self.parts["certify"])
        fidelity = FidelityReport(
            metric=interchange.metric.name,
            iia=main.iia,
            iia_lower=main.iia_lower,
            law=main.law,
            swap=main.swap,
            delta=main.delta,
            attempts=attempts,
            trials=main.trials,
            disagreements=main.disagreements,
            agreement=plain["agreement"] or 0.0,
            logit_mse_relative=main.logit_mse_relative,
            kl=main.kl,
            accuracy_dense=plain["accuracy_dense"],
            accuracy_compiled=plain["accuracy_compiled"],
            full_source_checked=interchange.full_source_checked,
            stress=[
                LawReport(
                    law=s.law, swap=s.swap, trials=s.trials, iia=s.iia, logit_mse_relative=s.logit_mse_relative, kl=s.kl
                )
                for s in stress
            ],
        )
        check = f"on {len(proof)} samples that took no part in calibration"
        return _Result(candidate.plan, candidate.compiled, error, check, fidelity, {}, entries, self.parts)


def _stamp(model: ir.Model, plan: Plan, sha256: str) -> ir.Model:
    """Write version, digests and tau into the model's metadata, where something was compiled."""
    if plan.sites:
        tau = {site.tensor: site.kept.tolist() for site in plan.sites}
        model.metadata_props["pkg.mscompile.version"] = __version__
        model.metadata_props["pkg.mscompile.model_sha256"] = sha256
        model.metadata_props["pkg.mscompile.plan_sha256"] = _plan_digest(plan)
        model.metadata_props["pkg.mscompile.tau"] = json.dumps(tau, separators=(",", ":"))
    return model


def _plan_digest(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def _write_model(model: ir.Model, target: Path | None) -> tuple[str | None, int]:
    """Digest and size of the compiled file; None and the size it would have where nothing is written."""
    if target is None:
        return None, ir.to_proto(model).ByteSize()
    sha256 = save_model(model, target)
    beside = target.with_name(f"{target.name}.data")
    return sha256, target.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _report(
    source: _Source,
    result: _Result,
    samples: Samples | None,
    options: Options,
    clock: _Clock,
    warnings: list[str],
    command: str,
    compiled: ir.Model,
    target: Path | None,
    sha256: str | None,
    size: int,
) -> Report:
    probe = samples if samples is not None else _generated(source.specs)
    latency: tuple[float | None, float | None] = (None, None)
    macs: tuple[int | None, int | None] = (None, None)
    difference = None
    batch_size = None
    if probe is not None:
        with clock.time("measure"):
            batch_size = min(options.batch_size, len(probe))
            first = next(probe.batches(batch_size))
            shapes = {name: array.shape for name, array in first.items()}
            macs = count_macs(source.model, shapes), count_macs(compiled, shapes)
            latency = measure_latency(source.model, compiled, probe, batch_size)
            difference = _deployment_difference(compiled, first)
    dense_bytes = source.path.stat().st_size if source.path is not None else ir.to_proto(source.model).ByteSize()
    dense_params, compiled_params = count_parameters(source.model), count_parameters(compiled)
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
        objective=result.plan.objective,
        replacement=result.plan.replacement,
        seed=options.seed,
        dense=FileReport(path=None if source.path is None else str(source.path), sha256=source.sha256),
        compiled=None if target is None or sha256 is None else FileReport(path=str(target), sha256=sha256),
        plan_sha256=_plan_digest(result.plan),
        data=None
        if samples is None
        else DataReport(
            source=samples.source,
            sha256=samples.sha256,
            samples=len(samples),
            split={name: len(part) for name, part in result.parts.items()},
            seed=options.seed,
            notes=list(samples.notes),
        ),
        sites=_site_reports(source, result, inspection),
        coverage=list(inspection.coverage),
        sizes=SizeReport(
            dense=Sizes(params=dense_params, macs=macs[0], bytes=dense_bytes, latency_ms=latency[0]),
            compiled=Sizes(params=compiled_params, macs=macs[1], bytes=size, latency_ms=latency[1]),
            latency_batch=batch_size,
        ),
        fold_error=result.fold_error,
        fold_check=result.fold_check,
        deployment_difference=difference,
        fidelity=result.fidelity,
        candidates=list(result.candidates),
        timings={stage: round(seconds, 4) for stage, seconds in clock.seconds.items()},
        warnings=warnings,
    )


def _site_reports(source: _Source, result: _Result, inspection: Inspection) -> list[SiteReport]:
    planned = {site.tensor: site for site in result.plan.sites}
    reports = []
    for site in source.scm.sites:
        entry = planned.get(site.tensor)
        left = result.compiled.alignment.get(site.tensor)
        reports.append(
            SiteReport(
                name=site.tensor,
                axis=site.axis,
                size=site.size,
                kept=site.size if entry is None else len(entry.kept),
                width=site.size if left is None else len(left),
                readers=readers_of(site),
                basis=None if entry is None else entry.basis,
                predicted_risk=None if entry is None else entry.predicted_risk,
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
