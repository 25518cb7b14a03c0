"""The dense model: opened, brought into canonical form, read as a structural causal model, and its data found."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mscompile.errors import MscompileError, UnsupportedError, UsageError
from mscompile.intake import data as data_module
from mscompile.intake.loading import NOTES, external_files, load_model, read_model, read_proto
from mscompile.intake.samples import InputSpec, Samples, Source
from mscompile.intake.sources import files_of
from mscompile.intake.words import brief
from mscompile.network.inspection import inspect_scm
from mscompile.network.scm import Scm, Site, read_scm, size_of
from mscompile.operators.backward import FLOATS
from mscompile.options import Options
from mscompile.passes import CANONICALISE
from mscompile.planning.plan import selectable
from mscompile.planning.scores import OBJECTIVES

Model = str | Path | onnx.ModelProto | ir.Model


@dataclass(frozen=True)
class DenseModel:
    """The dense model in canonical form, with what was found out about it."""

    model: ir.Model
    scm: Scm
    groups: Mapping[int, list[Site]]
    sha256: str
    path: Path | None
    specs: tuple[InputSpec, ...]
    external: tuple[Path, ...] = ()
    """Files beside the model that its weights lie in."""
    shared: frozenset[str] = frozenset()
    """Inputs without a sample axis in the data at hand."""

    @property
    def batch(self) -> int | None:
        """Samples that the model takes at a time; None where that is free."""
        fixed = (s.shape[0] for s in self.specs if s.shape and s.name not in self.shared and isinstance(s.shape[0], int))
        return next(fixed, None)

    def given(self, samples: Samples | None) -> DenseModel:
        """The same model, with what the data tells of its inputs."""
        return self if samples is None else replace(self, shared=samples.shared)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.graph.opset_imports.get("", 1)

    @property
    def sites(self) -> list[Site]:
        """Sites that may be cut."""
        return [site for sites in self.groups.values() for site in sites]

    def restricted(self, tensors: frozenset[str]) -> DenseModel:
        """The same model, of which only groups with all sites among `tensors` may be cut."""
        return replace(self, groups={g: s for g, s in self.groups.items() if all(site.tensor in tensors for site in s)})

    @property
    def output(self) -> str:
        """Name of the output that is compared: the first of floating point."""
        found = (v for v in self.model.graph.outputs if v.dtype in FLOATS)
        return next(found, self.model.graph.outputs[0]).name or ""

    def weighted_outputs(self, options: Options) -> dict[str, float]:
        """Weight by name of the outputs whose change is scored.

        Those that `Options.output` names; by default every output of floating point that has one result per sample,
        weighted alike, but only the first of them for objectives that take it for class scores.

        Raises
        ------
        UsageError
            An output is named that cannot be scored, or several with labels.
        """
        shapes = {v.name or "": self.scm.shapes.get(v.name or "") for v in self.model.graph.outputs if v.dtype in FLOATS}
        free = self.batch is None
        known = [name for name, shape in shapes.items() if shape and not (free and isinstance(shape[0], int))]
        objective = OBJECTIVES[options.objective]
        if options.output is None:
            return dict.fromkeys(known[:1] if objective.curvature == "fisher" else known, 1.0)
        for name in options.output:
            if name not in known:
                raise UsageError(
                    "this output cannot be scored",
                    where=f"--output {name}",
                    why=f"outputs of floating point with a result per sample: {', '.join(known) or 'none'}",
                    hint="name one of those; the file to write is given by -o",
                )
        if objective.gradient and len(options.output) > 1:
            raise UsageError(
                "labels are of one output",
                where=" ".join(f"--output {name}" for name in options.output),
                why=f"--objective {options.objective} compares class scores with labels",
                hint="name the output of the class scores alone",
            )
        return dict(options.output)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each site's tensor."""
        return {site.tensor: len(self.scm.shapes[site.tensor]) for site in self.scm.sites}


def open_dense(model: Model, only: str | None = None, freeze: str | None = None) -> DenseModel:
    """Open a model from a file or an object, which stays as it is.

    `only` and `freeze` are regular expressions on site names, see `Options`.
    """
    with _collected_later():
        return _open(model, only, freeze)


@contextlib.contextmanager
def _collected_later() -> Iterator[None]:
    """Have Python not look for garbage while a model is read: there is next to none among more and more objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open(model: Model, only: str | None, freeze: str | None) -> DenseModel:
    path = Path(model) if isinstance(model, str | Path) else None
    if path is not None:
        loaded, sha256 = load_model(path)
    else:
        loaded, sha256 = read_model(model) if isinstance(model, ir.Model) else read_proto(model)  # type: ignore[arg-type]
    specs = tuple(_specs(loaded))
    external = tuple(external_files(loaded))
    try:
        CANONICALISE(loaded)
    except ir.passes.PassError as error:
        if isinstance(error.__cause__, MscompileError):
            raise error.__cause__ from error
        raise
    scm = read_scm(loaded)
    _check_patterns(scm, freeze)
    _correct_outputs(loaded, scm)
    return DenseModel(loaded, scm, selectable(scm, only=only, freeze=freeze), sha256, path, specs, external)


def _check_patterns(scm: Scm, freeze: str | None) -> None:
    """Refuse a pattern that was to keep sites whole and is of none: they would be cut without a word."""
    names = [site.tensor for site in scm.sites]
    if freeze is not None and names and not any(re.search(freeze, name) for name in names):
        raise UsageError(
            "no site has a name that matches",
            where=f"--freeze {freeze}",
            why=f"the sites are {brief(names)}",
            hint="`mscompile inspect MODEL` lists them",
        )


def _correct_outputs(model: ir.Model, scm: Scm) -> None:
    """Have the outputs state the shapes that they have, and note what the file says instead."""
    for value in model.graph.outputs:
        found, said = scm.shapes.get(value.name or ""), value.shape
        if found is None or said is None:
            continue
        dims = tuple(size_of(d) for d in said)
        pairs = zip(found, dims, strict=False)
        if len(found) != len(dims) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
            texts = (f"[{', '.join('?' if d is None else str(d) for d in shape)}]" for shape in (dims, found))
            model.meta[NOTES].append(
                "output {!r} is declared as {} and has the shape {}: corrected".format(value.name, *texts)
            )
            value.shape = ir.Shape(found)


def check_outputs(source: DenseModel) -> None:
    """Refuse outputs that are not one result per sample, or no numbers.

    Raises
    ------
    UnsupportedError
        There is one.
    """
    for value in source.model.graph.outputs:
        typed = isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING
        if not typed or source.scm.shapes.get(value.name or "") == ():
            raise UnsupportedError(
                "an output cannot be compared",
                where=f"output {value.name!r}",
                why="it is no tensor of numbers" if not typed else "it is a scalar, not one result per sample",
                hint="export the model without this output",
            )


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
        shape = tuple(size_of(d) for d in value.shape)
        yield InputSpec(value.name or "", value.dtype.numpy(), shape)


def nothing_to_cut(source: DenseModel, options: Options | None = None) -> str:
    """Why no site can be cut, in one sentence."""
    if options is not None and selectable(source.scm):
        patterns = [f"--{name} {text}" for name in ("only", "freeze") if (text := getattr(options, name)) is not None]
        return f"{' and '.join(patterns)} leave{'' if len(patterns) > 1 else 's'} no site that could be"
    inspection = inspect_scm(source.scm)
    reasons = dict.fromkeys(reason for reason in inspection.left_alone.values() if reason)
    listed = "; ".join(list(reasons)[:3]) or "no operator contracts a unit axis with a weight"
    return listed + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def files_read(model: Model, data: Source | None) -> list[Path]:
    """The files that a model and its data are read from, as far as names tell: given, or found beside the model."""
    if not isinstance(model, str | Path):
        return [] if data is None else files_of(data)
    found = data if data is not None else data_module.find_beside(Path(model))
    return [Path(model), *([] if found is None else files_of(found))]


def find_data(source: DenseModel, data: Source | None, options: Options) -> Samples | None:
    """Read the data given, or that beside the model's file; None where there is none."""
    if data is None and source.path is not None:
        data = data_module.find_beside(source.path)
    if data is None:
        return None
    return data_module.read(data, source.specs, labels=options.labels, limit=options.samples)


def generated_inputs(specs: tuple[InputSpec, ...]) -> Samples | None:
    """Standard-normal inputs for checking an exact rewrite, where every input is a float of static shape."""
    if not specs or any(s.dtype.kind != "f" or not s.shape for s in specs):
        return None
    fixed = {s.shape[0] for s in specs if isinstance(s.shape[0], int)} or {16}
    if len(fixed) > 1:
        return None
    shapes = {spec.name: (*fixed, *spec.shape[1:]) for spec in specs}
    if not all(isinstance(d, int) for shape in shapes.values() for d in shape):
        return None
    rng = np.random.default_rng(0)
    inputs = {s.name: rng.standard_normal(shapes[s.name]).astype(s.dtype) for s in specs}  # type: ignore[arg-type]
    return Samples(inputs, None, "generated")
