"""What an audit is given: two files, data, and what is known of how one was made from the other.

Nothing here rewrites a model: files are read, functions in them are written out by onnx's own inliner, and that is all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from mscompile.audit.disjointness import Fingerprints, decode, fingerprints
from mscompile.audit.report import AuditedData, AuditedFile
from mscompile.errors import DataError, UnsupportedError, UsageError, VerificationError
from mscompile.intake.data import read
from mscompile.intake.documents import parse
from mscompile.intake.loading import load_model
from mscompile.intake.provenance import METADATA, changed_parts
from mscompile.intake.samples import InputSpec, Samples, Source
from mscompile.verification.skeletons import Skeleton, skeleton_of


@dataclass(frozen=True)
class AuditModel:
    """One of the two models, as its file has it.

    `changed` lists what is no longer as `mscompile` wrote it; None where the file does not say that `mscompile` did.
    """

    skeleton: Skeleton
    sha256: str
    path: Path
    changed: tuple[str, ...] | None = None

    @property
    def proto(self) -> onnx.ModelProto:
        """The graph, without heavy weights."""
        return self.skeleton.proto

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """The inputs that data must give."""
        stored = {tensor.name for tensor in self.proto.graph.initializer}
        return tuple(_spec(value) for value in self.proto.graph.input if value.name not in stored)

    @property
    def file(self) -> AuditedFile:
        """For the certificate."""
        return AuditedFile(path=str(self.path), sha256=self.sha256)


def open_model(path: Path) -> AuditModel:
    """Read a model file, after the checks that every model file goes through."""
    model, sha256 = load_model(path)
    skeleton = skeleton_of(model)
    if skeleton.proto.functions:
        skeleton = skeleton.with_graph(onnx.inliner.inline_local_functions(skeleton.proto))
    return AuditModel(skeleton, sha256, path, changed_parts(model))


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise UnsupportedError(
            "an input has no declared tensor type",
            where=f"input {value.name!r}",
            why="sequences, optionals and unshaped inputs cannot be read from data",
            hint="export the model with tensor inputs",
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return InputSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def check_interfaces(dense: AuditModel, compiled: AuditModel) -> list[str]:
    """Refuse models that do not take the same inputs; say where one of them takes them in another type.

    Raises
    ------
    DataError
        Names differ, or types other than in floating-point precision.
    """
    ours, theirs = ({spec.name: spec.dtype for spec in model.specs} for model in (dense, compiled))
    if ours.keys() != theirs.keys():
        raise DataError(
            "the models take different inputs",
            where=str(compiled.path),
            why=f"the dense one takes {', '.join(sorted(ours))}, the other {', '.join(sorted(theirs))}",
            hint="rename the inputs, so that both models can be given the same data",
        )
    notes = []
    for name in ours:
        if ours[name] != theirs[name]:
            if {ours[name].kind, theirs[name].kind} != {"f"}:
                raise DataError(
                    "the models take different inputs",
                    where=f"input {name!r}",
                    why=f"the dense one takes {ours[name]}, the other {theirs[name]}",
                    hint="give two models of the same inputs",
                )
            notes.append(
                f"input {name!r} is {ours[name]} in the dense model and {theirs[name]} in the other: rounded for it"
            )
    return notes


def read_plan(
    path: Path | None, dense: AuditModel, compiled: AuditModel, *, provenance: bool = True
) -> tuple[dict[str, Any] | None, list[str]]:
    """The plan file given, or that beside the compiled model where it is the one in its metadata.

    Without `provenance`, metadata is held against neither, and only a plan that is given is used.

    Raises
    ------
    VerificationError
        The plan given is of another model, or not the one that was carried out; or the compiled file says that it was made
        from another dense model.
    """
    metadata = compiled.metadata if provenance else {}
    made_from = metadata.get(METADATA + "model_sha256")
    if made_from not in (None, dense.sha256):
        raise VerificationError(
            "the compiled model was made from another dense model",
            where=str(compiled.path),
            why=f"its metadata names sha256 {str(made_from)[:12]}…, {dense.path} has {dense.sha256[:12]}…",
            hint="compile again, give the model that it was made from, or judge by trials alone with --no-provenance",
        )
    notes: list[str] = []
    given = path is not None
    path = path if path is not None else compiled.path.with_suffix(".plan.json")
    if not given and not (provenance and path.is_file()):
        return None, notes
    try:
        content = path.read_bytes()
        plan = parse(content)
        _ = [(site["tensor"], site["kept"], site["axis"]) for site in plan["sites"]], plan["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "the plan cannot be read", where=str(path), why=str(error)[:400], hint="give the .plan.json of this pair"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    why = None
    if plan["model_sha256"] != dense.sha256:
        why = f"it is a plan for sha256 {str(plan['model_sha256'])[:12]}…, the dense model has {dense.sha256[:12]}…"
    elif metadata.get(METADATA + "plan_sha256", digest) != digest:
        why = "the compiled model's metadata names another plan"
    if why is None:
        return plan, notes
    if given:
        raise VerificationError(
            "the plan is not of this pair", where=str(path), why=why, hint="give the plan that was carried out"
        )
    return None, [f"{path.name} beside the compiled model is not used: {why}"]


@dataclass(frozen=True)
class Audited:
    """The samples to audit on, and what the certificate says of them."""

    samples: Samples
    report: AuditedData


def read_data(
    source: Source,
    dense: AuditModel,
    compiled: AuditModel,
    *,
    calib: Source | None,
    labels: str | None,
    limit: int | None,
    shared: str,
) -> Audited:
    """Read the data and compare it with what the compiled model was made with.

    Parameters
    ----------
    calib
        The data used in making the compiled model; by default the digests in the report beside it.
    shared
        What becomes of samples that are in both: ``refuse``, ``drop`` or ``keep``.

    Raises
    ------
    DataError
        Samples are in both and `shared` is ``refuse``; or too few are left.
    """
    samples = read(source, dense.specs, labels=labels, limit=limit)
    notes = list(samples.notes)
    prints = fingerprints(samples)
    known, compared_with = known_samples(calib, dense, compiled)
    disjoint, count = "unknown", 0
    left_out: list[int] = []
    if known is not None:
        met = np.isin(prints, known)
        count = int(met.sum())
        disjoint = "no" if count else "yes"
        if count and shared == "refuse":
            raise DataError(
                "audit data took part in making the compiled model",
                where=samples.source,
                why=f"{count} of {len(samples)} samples are in {compared_with}; what chose a model cannot certify it",
                hint="give other data, or leave shared samples out with --shared drop",
            )
        if count and shared == "drop":
            samples, prints, left_out = samples.take(np.flatnonzero(~met)), prints[~met], np.flatnonzero(met).tolist()
            notes.append(f"{count} samples that took part in making the compiled model are left out")
            disjoint = "yes"
    repeated = len(prints) - len(np.unique(prints))
    if repeated:
        notes.append(f"{repeated} samples are there more than once: pairs are not all of different examples")
    if len(samples) < 2:
        raise DataError(
            "there are too few samples to audit",
            where=samples.source,
            why=f"{len(samples)} are left, and an interchange takes two",
            hint="give more data",
        )
    report = AuditedData(
        source=samples.source,
        sha256=samples.sha256,
        samples=len(samples),
        pairs=len(samples) // 2,
        disjoint=disjoint,  # type: ignore[arg-type]
        shared=count,
        compared_with=compared_with,
        labels=labels,
        limit=limit,
        left_out=left_out,
        repeated=repeated,
        notes=notes,
    )
    return Audited(samples, report)


def known_samples(calib: Source | None, dense: AuditModel, compiled: AuditModel) -> tuple[Fingerprints | None, str | None]:
    """Digests of the samples that the compiled model was made with, and where they are known from."""
    if calib is not None:
        known = read(calib, dense.specs)
        return fingerprints(known), known.source
    path = compiled.path.with_suffix(".report.json")
    try:
        report: Mapping[str, Any] = parse(path.read_bytes())
        if report["compiled"]["sha256"] == compiled.sha256 and report["data"]["fingerprints"]:
            return decode(report["data"]["fingerprints"]), path.name
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    return None, None
