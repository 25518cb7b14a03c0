"""Small graphs written down as ONNX text, random plans for them, and what runs them.

A graph's header declares its weights by type and shape; they are filled with random numbers. ``$name`` in a shape is a width
to be given, so that the same text is the dense graph and, at a smaller width, what a compiled one must look like::

    (float[N,4] x) => (float[N,3] y) <float[4,$h] w1, float[$h] b1, float[$h,3] w2> {
        a = Gemm(x, w1, b1)
        h = Relu(a)
        y = MatMul(h, w2)
    }
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from mscompile.calibration.statistics import Moments
from mscompile.calibration.windows import window_name, window_of, window_weight
from mscompile.network.scm import Scm, Site, read_scm
from mscompile.operators import IntArray
from mscompile.passes import CANONICALISE
from mscompile.planning.plan import Plan, SitePlan, WindowPlan, selectable
from mscompile.planning.replacements import Fit, interchanged
from mscompile.planning.selection import retained_units
from mscompile.runtime import Session
from mscompile.verification.skeletons import Skeleton, skeleton_of
from mscompile.verification.surgery import Patch, replaced
from mscompile.verification.verify import replacement_of

Arrays = Mapping[str, np.ndarray[Any, Any]]
KINDS = ("constant", "affine", "parents", "windows")
"""Kinds of replacement: constants, maps of all retained channels or of two, and new weights for readers that see windows."""


def proto(text: str, *, opset: int = 17, given: Mapping[str, Any] | None = None, **sizes: int) -> onnx.ModelProto:
    """The graph as a valid model; weights named ``var…`` are positive, those in `given` are these."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.example" : 1]>\n'
    model = onnx.parser.parse_model(f"{header} golden {Template(text).substitute(sizes)}")
    graph = model.graph
    produced = {name for node in graph.node for name in node.output}
    declared = [v for v in graph.value_info if v.name not in produced]
    for value in declared:
        graph.value_info.remove(value)
        array = np.asarray((given or {}).get(value.name, _random(value)))
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        graph.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), value.name))
    onnx.checker.check_model(model)
    return model


def _random(value: onnx.ValueInfoProto) -> np.ndarray[Any, Any]:
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    array = np.random.default_rng(zlib.crc32(value.name.encode())).standard_normal(shape)
    return np.abs(array) + 0.5 if value.name.startswith("var") else array / max(1.0, np.sqrt(np.prod(shape[1:])))


def model(text: str, **how: Any) -> ir.Model:
    """The graph in canonical form."""
    return canonical(proto(text, **how))


def canonical(source: onnx.ModelProto) -> ir.Model:
    found = ir.from_proto(source)
    CANONICALISE(found)
    return found


def inputs(source: ir.Model, samples: int = 3, seed: int = 0) -> Arrays:
    """Standard-normal values for each input, small numbers for integers; axes of unknown size get `samples` channels."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d if isinstance(d, int) else samples for d in v.shape] for v in source.graph.inputs}
    kinds = {v.name: v.dtype.numpy() for v in source.graph.inputs}
    return {
        name: (rng.integers(0, 2, shape) if kinds[name].kind in "bi" else rng.standard_normal(shape)).astype(kinds[name])
        for name, shape in shapes.items()
    }


def run(source: ir.Model | onnx.ModelProto | Skeleton, feed: Arrays) -> Arrays:
    """All outputs, with onnxruntime's own rewrites off."""
    return Session(source, optimise=False, threads=1).run(feed)


def shapes(source: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored weights."""
    return {name: tuple(v.const_value.shape.numpy()) for name, v in source.graph.initializers.items()}


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_for(source: ir.Model, kind: str, rng: np.random.Generator, keep: Callable[[int], int]) -> Plan:
    """Random retained units, `keep(size)` for each group of that size that can be cut, and random replacements.

    A few more are retained where some must stay, or where rows must stay equally large.
    """
    scm, sites = read_scm(source), []
    for members in selectable(scm).values():
        units = np.unique(np.concatenate([site.units for site in members]))
        stay = np.unique(np.concatenate([site.units[~site.free] for site in members]))
        order = np.concatenate([rng.permutation(np.setdiff1d(units, stay)), stay])
        chosen = retained_units(order, max(len(stay), keep(len(units))), scm.blocks, scm.frozen, members)
        sites += [site_plan(scm, site, np.isin(site.units, chosen), kind, rng) for site in members]
    place = {site.tensor: i for i, site in enumerate(scm.sites)}
    sites.sort(key=lambda entry: place[entry.tensor])
    return Plan(model_sha256="", objective="", replacement=kind, swap=0.0, sites=tuple(sites))


def plan_at(source: ir.Model, *tensors: str, kept: Sequence[int], kind: str = "affine") -> Plan:
    """Keep these channels of the sites at `tensors`, whether or not they make up a group."""
    rng, scm = np.random.default_rng(0), read_scm(source)
    sites = [scm.site(tensor) for tensor in tensors]
    planned = [site_plan(scm, site, np.isin(np.arange(site.size), kept), kind, rng) for site in sites]
    return Plan(model_sha256="", objective="", replacement=kind, swap=0.0, sites=tuple(planned))


def site_plan(scm: Scm, site: Site, stays: np.ndarray, kind: str, rng: np.random.Generator) -> SitePlan:
    indices, away = np.flatnonzero(stays), int((~stays).sum())
    matrix = None if kind == "constant" else rng.normal(size=(away, len(indices))) / np.sqrt(len(indices))
    if kind == "parents":
        matrix[:, rng.permutation(len(indices))[2:]] = 0.0
    if matrix is not None and site.rows is not None:  # as in heads, which cannot stand in for each other
        matrix *= site.rows[~stays][:, None] == site.rows[indices]
    windows = tuple(random_windows(scm, site, indices, rng)) if kind == "windows" else ()
    return SitePlan(
        name=site.tensor,
        tensor=site.tensor,
        axis=site.axis,
        size=site.size,
        kept=indices,
        constants=rng.normal(size=away),
        affine=matrix,
        windows=windows,
    )


def random_windows(scm: Scm, site: Site, kept: np.ndarray, rng: np.random.Generator) -> Iterator[WindowPlan]:
    """New weights for each reader that sees more than one position."""
    for reader in site.readers:
        window = window_of(site, reader, scm.model.graph.opset_imports[""])
        if window is None:
            continue
        outputs = window_weight(site, reader, window).shape[2]
        yield WindowPlan(
            reader=window_name(reader),
            places=None if window.kernel else np.argsort(reader.index, kind="stable").reshape(site.size, -1)[kept],
            columns=rng.normal(size=(len(kept), window.taps, outputs)) / np.sqrt(len(kept) * window.taps),
            response=rng.normal(size=(window.marks, outputs)),
        )


def under_do(source: ir.Model, plan: Plan) -> Skeleton:
    """The dense model with the plan written in by graph surgery."""
    known = read_scm(source).shapes
    patches = [Patch(site.tensor, len(known[site.tensor]), site.axis) for site in plan.sites]
    return replaced(skeleton_of(source), map(replacement_of, plan.sites, patches))


def array(source: ir.Model, name: str) -> np.ndarray[Any, Any]:
    """A stored weight."""
    tensor = source.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def interchange_error(
    fit: Fit, moments: Moments, kept: IntArray, replaced: IntArray, swap: float
) -> npt.NDArray[np.float64]:
    """[replaced, replaced]: second moment of replacement minus activation where retained channels are interchanged."""
    assert fit.matrix is not None
    sigma, common = moments.covariance, moments.common
    bracket = interchanged(sigma, common, swap)[np.ix_(kept, kept)]
    cross = fit.matrix @ ((1 - swap) * sigma + swap * common)[np.ix_(kept, replaced)]
    bias = fit.constants + fit.matrix @ moments.mean[kept] - moments.mean[replaced]
    spread = sigma[np.ix_(replaced, replaced)] - cross - cross.T
    return spread + fit.matrix @ bracket @ fit.matrix.T + np.outer(bias, bias)
