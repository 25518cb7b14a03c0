"""Setting up an audit: options, tau, sessions, and the self-checks before any verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.audit.inputs import AuditModel, check_interfaces, read_plan
from mscompile.audit.outputs import Measure, Output, choose_outputs, measures_of
from mscompile.audit.report import AuditedSite, Check, Convention
from mscompile.audit.tau import Origin, SiteClaim, Tau, claims_of_file, claims_of_metadata, claims_of_plan, inferred, resolve
from mscompile.errors import MscompileError, UsageError, VerificationError
from mscompile.intake.provenance import METADATA
from mscompile.intake.samples import Samples
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Arrays, Session
from mscompile.verification.checks import FOLD_TOLERANCE, check_rows, depends_on_batch, planted_defects
from mscompile.verification.interchange import Engine, Law, Pair
from mscompile.verification.interventions import Feed
from mscompile.verification.layouts import observed
from mscompile.verification.metrics import Metric
from mscompile.verification.surgery import Do, Reweighted, probe, replaced
from mscompile.verification.trials import Interchanges

ALIKE = 0.5
"""Share of variance below which units matched by weights are reported as behaving differently."""


@dataclass(frozen=True)
class AuditOptions:
    """What is claimed, and how to test it.

    Attributes
    ----------
    fidelity
        IIA to certify.
    laws, swaps, conventions, metrics
        Each combination is a claim; all claims share `delta`. A metric is a key of `METRICS`, ``script.py:function`` or a
        `Metric`; None chooses by the output. ``OUTPUT=METRIC`` is for that output alone.
    outputs
        Weight by name of the outputs compared; None for all that give one result per sample. Of several, each is a claim and
        all together are one more: the largest loss, each times its weight over the largest weight.
    delta
        Probability that any verdict of certification is wrong, and likewise any of refutation.
    trials
        Interchanges per claim at most; every sample is in at most one pair in any case.
    table
        Interchanges per line of the table of laws; 0 for none.
    shared
        What becomes of samples that took part in making the compiled model: ``refuse``, ``drop`` or ``keep``.
    explain
        Whether to look for what explains the number.
    provenance
        Whether a compiled file that says it comes from `mscompile` must be as that wrote it.
    """

    fidelity: float = 0.95
    laws: tuple[Law, ...] = ("one-site",)
    swaps: tuple[float, ...] = (0.1,)
    conventions: tuple[Convention, ...] = ("matched",)
    metrics: tuple[str | Metric | None, ...] = (None,)
    outputs: Mapping[str, float] | None = None
    delta: float = 0.05
    trials: int | None = None
    table: int = 500
    shared: str = "refuse"
    explain: bool = True
    provenance: bool = True
    labels: str | None = None
    samples: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        checks = (
            ("fidelity", 0.0 < self.fidelity < 1.0, "lies between 0 and 1"),
            ("delta", 0.0 < self.delta < 1.0, "lies between 0 and 1"),
            ("swaps", bool(self.swaps) and all(0.0 < p <= 1.0 for p in self.swaps), "lies in (0, 1]"),
            ("laws", bool(self.laws) and set(self.laws) <= {"one-site", "all-sites"}, "is one-site or all-sites"),
            ("conventions", bool(self.conventions) and set(self.conventions) <= {"matched", "own"}, "is matched or own"),
            ("trials", self.trials is None or self.trials >= 1, "is at least 1"),
            ("table", self.table >= 0, "is not negative"),
            ("shared", self.shared in ("refuse", "drop", "keep"), "is refuse, drop or keep"),
            ("batch_size", self.batch_size >= 1, "is at least 1"),
            ("seed", self.seed >= 0, "is not negative"),
            ("metrics", bool(self.metrics), "is not empty"),
            ("outputs", self.outputs is None or bool(self.outputs), "is not empty"),
        )
        for name, holds, rule in checks:
            if not holds:
                raise UsageError(
                    f"option {name} makes no sense",
                    where=f"{name} = {getattr(self, name)!r}",
                    why=f"it {rule}",
                    hint="see `mscompile audit --help`",
                )


@dataclass(frozen=True)
class Setup:
    """Everything opened and checked, ready for interchanges."""

    dense: AuditModel
    compiled: AuditModel
    tau: Tau
    plan: Mapping[str, Any] | None
    samples: Samples
    engine: Engine
    checks: tuple[Check, ...]
    sites: tuple[AuditedSite, ...]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    run: Run = ALONE

    @cached_property
    def task(self) -> Interchanges:
        """What is done with shards of trials."""
        return Interchanges(self.engine.pair, self.engine.answers, self.engine)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is claimed under every law; the first looks at all outputs."""
        return measures_of(self.outputs)


def prepare(
    dense: AuditModel,
    compiled: AuditModel,
    samples: Samples,
    options: AuditOptions,
    *,
    tau: Path | Sequence[SiteClaim] | None = None,
    plan: Path | None = None,
    origin: Origin | None = None,
    run: Run = ALONE,
) -> Setup:
    """Find tau, open the sessions and run the self-checks.

    `origin` says where a given tau is known from, where it was not given at first; `run` who runs the trials.

    Raises
    ------
    VerificationError
        A self-check fails, or the files do not belong together.
    UsageError
        tau is not known, or does not fit.
    """
    notes = check_interfaces(dense, compiled)
    read, more = read_plan(plan, dense, compiled, provenance=options.provenance)
    specs = [spec for model in (dense, compiled) for spec in model.specs if spec.name not in samples.shared]
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    batch_size = int(min(fixed)) if fixed else options.batch_size
    count = min(batch_size, len(samples))
    first = next(samples.batches(count))
    came = _provenance(compiled, held=options.provenance)
    try:
        found, values = _find_tau(tau, read if plan is not None else None, dense, compiled, first, samples.shared)
    except UsageError as error:
        if came.passed is False and tau is None:
            raise VerificationError(
                error.what, where=error.where, why=f"{came.detail}; {error.why}", hint="get the file that was compiled"
            ) from error
        raise
    found = found if origin is None else replace(found, origin=origin)
    asked = options.outputs, options.metrics
    outputs, left_out = choose_outputs(*asked, dense.proto, compiled.proto, values, count, free=not fixed)
    pair = Pair(dense.skeleton, compiled.skeleton, found.sites)
    engine = Engine(pair, samples, batch_size=batch_size, outputs={o.dense: o.compiled for o in outputs})
    checks = [came, Check(name="null and self patch", passed=True, detail="no output bit changes, in either model")]
    check_rows("dense", engine.dense, engine.batch, samples.shared)
    check_rows("compiled", engine.compiled, engine.batch, samples.shared)
    checks.append(
        Check(
            name="full-source patch",
            passed=True if engine.full_source_checked else None,
            detail="the source's outputs come back" if engine.full_source_checked else "a path leads past the sites of tau",
        )
    )
    kept = {site.dense.tensor: site.kept for site in found.sites}
    defects = planted_defects(engine.dense, engine.batch, kept, list(engine.answers), samples.shared)
    checks.append(
        Check(name="identity", passed=True, detail="the dense model agrees with itself under interchange, bit for bit")
    )
    for defect, seen in defects.items():
        blind = len(found.sites) - len(seen)
        detail = f"seen at {len(seen)} of {len(found.sites)} sites" if blind else "seen at every site"
        checks.append(Check(name=f"planted: {defect}", passed=bool(seen), detail=detail))
    if read is not None:
        checks.append(_check_fold(read, engine))
    if not fixed and any(
        depends_on_batch(model, engine.batch, name, samples.shared)
        for output, answer in engine.answers.items()
        for model, name in ((engine.dense, output), (engine.compiled, answer))
    ):
        engine.batch_size = 1
        notes.append("an answer depends on the other samples of its batch, as with dynamic quantisation: run one by one")
    sites = _describe(found, engine)
    weak = [s.dense for s in sites if s.alike is not None and s.alike < ALIKE]
    if weak and found.origin == "weights":
        notes.append(f"units matched by weights behave differently in the two models at {', '.join(weak[:5])}")
    if came.passed is False:
        notes.append(
            "the compiled file was changed since it was made; --no-provenance judges it as it is now, by trials alone"
        )
    notes += [*left_out, *more, *found.notes]
    return Setup(dense, compiled, found, read, samples, engine, tuple(checks), sites, outputs, tuple(notes), run)


def _provenance(compiled: AuditModel, *, held: bool) -> Check:
    """Whether a file that says it comes from `mscompile` is as that wrote it."""
    name, changed = "provenance", compiled.changed
    if changed is None:
        return Check(name=name, passed=None, detail="the file does not say that mscompile made it: judged by trials alone")
    if not held:
        return Check(name=name, passed=None, detail="what the file says of its origin is left aside: judged by trials alone")
    version = compiled.metadata.get(METADATA + "version", "of an unknown version")[:40]
    if changed:
        detail = f"the file says that mscompile {version} made it, but its {' and '.join(changed)} are not what that wrote"
        return Check(name=name, passed=False, detail=detail)
    return Check(name=name, passed=True, detail=f"weights, graph and metadata are those that mscompile {version} wrote")


def _check_fold(plan: Mapping[str, Any], engine: Engine) -> Check:
    """Whether the compiled model is the dense one with the plan's replacements written in by surgery, nothing folded."""
    patches = {patch.tensor: patch for patch in engine.dense.patches}
    try:
        interventions = [
            Do(
                patches[site["tensor"]],
                np.array(site["kept"], dtype=np.int64),
                _floats(site["constants"]),
                None if site.get("affine") is None else _floats(site["affine"]),
                tuple(
                    Reweighted(
                        window["reader"],
                        None if window.get("places") is None else np.array(window["places"], dtype=np.int64),
                        _floats(window["columns"]),
                        _floats(window["response"]),
                    )
                    for window in site.get("windows", ())
                ),
            )
            for site in plan["sites"]
        ]
        reference = Session(replaced(engine.pair.dense, interventions), optimise=False)
    except (KeyError, ValueError, TypeError, MscompileError) as error:
        return Check(
            name="fold", passed=None, detail=f"the plan cannot be written into the dense file as it is: {error}"[:200]
        )
    expected, found = reference.run(engine.batch, list(engine.answers)), engine.compiled.read(engine.batch)
    # Whole numbers, such as the class of the highest score, may turn on a last bit.
    compared = [o for o, values in expected.items() if values.dtype.kind == "f"] or list(expected)
    gap = max(_gap(expected[output], found[engine.answers[output]]) for output in compared)
    detail = f"the compiled model is {gap:.1e} standard deviations from the dense one under the plan, by surgery"
    return Check(name="fold", passed=bool(gap <= FOLD_TOLERANCE), detail=detail)


def _gap(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Largest difference in standard deviations."""
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    return float(np.abs(a - b).max() / max(float(a.std()), float(np.finfo(np.float32).tiny)))


def _floats(values: Any) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def _find_tau(
    given: Path | Sequence[SiteClaim] | None,
    plan: Mapping[str, Any] | None,
    dense: AuditModel,
    compiled: AuditModel,
    batch: Mapping[str, Any],
    shared: frozenset[str],
) -> tuple[Tau, tuple[Arrays, Arrays]]:
    """Tau from where it is known best; and the outputs of both models."""
    notes: tuple[str, ...] = ()
    origin: Origin
    if given is not None:
        origin, claims = "given", claims_of_file(given) if isinstance(given, Path) else list(given)
    elif plan is not None:
        origin, claims = "plan", claims_of_plan(plan, compiled.metadata)
    elif (recorded := claims_of_metadata(compiled.metadata)) is not None:
        origin, claims = "metadata", recorded
    else:
        origin = "weights"
        claims, notes = inferred(dense.skeleton, compiled.skeleton)
    if origin in ("plan", "metadata"):
        claims, notes = _in_file(claims, dense, compiled)
    read = _reading(dense, [claim.dense for claim in claims])
    read_compiled = _reading(compiled, [claim.compiled or claim.dense for claim in claims])
    values, found = read(batch), read_compiled(batch)
    tau = resolve(claims, origin, values, found)
    layouts = observed(read, batch, values, [site.dense for site in tau.sites], shared)
    others = observed(read_compiled, batch, found, [site.compiled for site in tau.sites], shared)
    sites = tuple(
        replace(
            site,
            dense=replace(site.dense, layout=layouts[site.dense.tensor]),
            compiled=replace(site.compiled, layout=others[site.compiled.tensor]),
        )
        for site in tau.sites
    )
    return replace(tau, sites=sites, notes=notes), (values, found)


def _in_file(
    claims: Sequence[SiteClaim], dense: AuditModel, compiled: AuditModel
) -> tuple[list[SiteClaim], tuple[str, ...]]:
    """The sites that the dense file has; compiling parts packed projections, of which that may hold no single part."""
    there, here = ({name for node in model.proto.graph.node for name in node.output} for model in (dense, compiled))
    strange = [claim for claim in claims if claim.dense not in there and claim.dense in here]
    if not strange or len(strange) == len(claims):
        return list(claims), ()
    names = ", ".join(claim.dense for claim in strange)
    note = f"left out are sites at tensors that the dense file does not compute as they are: {names}"
    return [claim for claim in claims if claim not in strange], (note,)


def _reading(model: AuditModel, names: Sequence[str]) -> Callable[[Feed], Arrays]:
    """What runs a model and gives the tensors of those names, and all outputs."""
    known = {name for node in model.proto.graph.node for name in node.output}
    for name in names:
        if name not in known:
            raise UsageError(
                "tau does not fit the models",
                where=name,
                why=f"{model.path} computes no tensor of that name",
                hint="give the tau of this pair with --tau or --plan",
            )
    dtypes = {spec.name: spec.dtype for spec in model.specs}
    session = Session(probe(model.skeleton, names), optimise=False)
    return lambda batch: session.run({name: array.astype(dtypes[name], copy=False) for name, array in batch.items()})


def _describe(tau: Tau, engine: Engine) -> tuple[AuditedSite, ...]:
    values, found = engine.dense.read(engine.batch), engine.compiled.read(engine.batch)
    return tuple(
        AuditedSite(
            dense=s.dense.tensor,
            compiled=s.compiled.tensor,
            dense_axis=s.dense.axis,
            compiled_axis=s.compiled.axis,
            size=s.size,
            width=s.width,
            dense_channels=s.kept.tolist(),
            compiled_channels=s.places.tolist(),
            alike=_alike(
                np.moveaxis(values[s.dense.tensor], s.dense.axis, 0)[s.kept],
                np.moveaxis(found[s.compiled.tensor], s.compiled.axis, 0)[s.places],
            ),
        )
        for s in tau.sites
    )


def _alike(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float | None:
    """1 − Σ(a − b)² / Σ(a − mean of a)² over channels; None where positions differ."""
    if wanted.shape != found.shape:
        return None
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (wanted, found))
    spread = float(np.square(a - a.mean(axis=1, keepdims=True)).sum())
    return 1.0 - float(np.square(a - b).sum()) / spread if spread > 0 else None
