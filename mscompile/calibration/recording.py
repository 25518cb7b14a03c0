"""Recording: the activations of large sites and their gradients, on disk, for as many passes as summing them takes.

Outer products of many wide sites do not fit into memory together, and the network would be run there and back for a few of
them at a time, again and again. What they are sums of is small beside them, as long as there are few samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.calibration.instrument import Measure, RoundTrip, there_and_back
from mscompile.calibration.survey import Survey
from mscompile.calibration.view import View
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, Site, infer_shapes
from mscompile.operators.backward import PREFIX, Builder
from mscompile.runs.shelf import Shelf, Table
from mscompile.runtime import Progress, Session, no_progress

MOST = 4 << 30
"""Bytes recorded at a time: sites beyond it wait for another run of the network."""
MOST_PER_BATCH = 1 << 27
"""Bytes recorded of a batch, which onnxruntime holds at once."""
KINDS = {None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
"""Element types of activations that are recorded; those not declared are float32."""


class Recording:
    """Sites of a network, and the way back to them; it is run when its samples are first asked for."""

    def __init__(
        self,
        scm: Scm,
        sites: Sequence[Site],
        samples: Samples,
        batch_size: int,
        measure: Measure,
        first: Survey,
        shelf: Shelf,
        progress: Progress = no_progress,
        lean: bool = False,
    ) -> None:
        self._lean = lean
        self._scm, self._samples, self._batch_size, self._shelf, self._progress = scm, samples, batch_size, shelf, progress
        self._sites = tuple(sites)
        found = there_and_back(scm, sites, first, measure)
        self._found = found
        self._views = {s.tensor: View(found.build, s, first.shapes[s.tensor], first.samples) for s in sites}
        self._kinds = {site.tensor: found.values[site.tensor].dtype or ir.DataType.FLOAT for site in sites}

    def trip(self, sites: Sequence[Site]) -> RoundTrip:
        """A graph that begins at the recorded activations and gradients of some of the sites."""
        model, found = self._scm.model.clone(), self._found
        graph = model.graph
        values = {v.name or "": v for node in graph for v in node.outputs}
        given: list[ir.Value] = []
        moving = Builder(graph, graph.opset_imports.get("", 1), prefix=f"{PREFIX}moved.")

        def take(name: str, tensor: str, kind: ir.DataType) -> ir.Value:
            turned = self._views[tensor].turned
            shape = turned.in_front(None) if turned.moves else self._scm.shapes[tensor]
            given.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind)))
            return given[-1]

        for site in sites:
            made = values[site.tensor]
            made.name = f"{PREFIX}made:{site.tensor}"
            values[site.tensor] = take(site.tensor, site.tensor, self._kinds[site.tensor])
            as_made = replace(self._views[site.tensor].turned, build=moving).back(values[site.tensor])
            made.replace_all_uses_with(as_made, replace_graph_outputs=True)
        graph.sort()
        slopes = {
            site.tensor: [take(slope_of(site.tensor, k), site.tensor, ir.DataType.FLOAT) for k in range(len(there))]
            for site in sites
            if (there := found.slopes.get(site.tensor))
        }
        losses = {
            site.tensor: take(loss_of(site.tensor), site.tensor, ir.DataType.FLOAT)
            for site in sites
            if site.tensor in found.losses
        }
        read = (values.get(v.name or "") for s in sites for r in s.readers for v in r.node.inputs if v is not None)
        graph.outputs[:] = list(dict.fromkeys(v for v in read if v is not None and v.producer() is not None))
        common.RemoveUnusedNodesPass()(model)
        left = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
        graph.inputs.clear()
        graph.inputs.extend([*left, *given])
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        build = Builder(graph, graph.opset_imports.get("", 1), fused=True)
        refused = {site.tensor: found.refused[site.tensor] for site in sites if site.tensor in found.refused}
        return RoundTrip(model, build, values, slopes, losses, refused, found.share, in_front=True)

    def samples_of(self, names: Sequence[str]) -> Samples:
        """What goes into a graph that begins at the recording, by name of its inputs."""
        inputs = {**self._samples.inputs, **self._recorded}
        shared = self._samples.shared & set(names)
        return Samples({name: inputs[name] for name in names}, None, self._samples.source, (), shared)

    @cached_property
    def _recorded(self) -> Mapping[str, npt.NDArray[Any]]:
        found, samples = self._found, self._samples
        graph = found.model.graph
        front = {tensor: view.turned.front for tensor, view in self._views.items()}
        asked = {tensor: front[tensor](found.values[tensor]) for tensor in front}
        for tensor, slopes in found.slopes.items():
            asked |= {slope_of(tensor, k): front[tensor](slope) for k, slope in enumerate(slopes)}
        asked |= {loss_of(tensor): front[tensor](slope) for tensor, slope in found.losses.items()}
        graph.outputs.clear()
        for name, value in asked.items():
            output = ir.Value(name=f"{PREFIX}recorded:{name}", type=value.type)
            graph.append(ir.node("Identity", [value], outputs=[output]))
            graph.outputs.append(output)
        common.RemoveUnusedNodesPass()(found.model)
        session = Session(found.model, lean=self._lean)
        tables: dict[str, Table] = {}
        size, done = self._batch_size, 0
        for batch in self._progress(samples.batches(size), "record", math.ceil(len(samples) / size)):
            count = min(size, len(samples) - done)
            labels = None if samples.labels is None else samples.labels[done : done + count]
            seeds = {} if found.feeds is None else found.feeds.feed(done, count, labels, samples.source)
            for name, rows in zip(asked, session.run({**batch, **seeds}).values(), strict=True):
                if name not in tables:
                    tables[name] = self._shelf.table((len(samples), *rows.shape[1:]), rows.dtype)
                tables[name].write(done, rows)
            done += count
        return {name: table.array for name, table in tables.items()}


def slope_of(tensor: str, seed: int) -> str:
    """Name of the gradient of a site for a seed."""
    return f"{PREFIX}slope.{seed}:{tensor}"


def loss_of(tensor: str) -> str:
    """Name of the gradient of the loss."""
    return f"{PREFIX}loss:{tensor}"


def recordable(scm: Scm, sites: Sequence[Site], samples: Samples, first: Survey, measure: Measure) -> dict[str, int]:
    """By site tensor, bytes per sample that are recorded of it.

    Left out are those that do not hold equally much of each sample, whose shape depends on the data, or that numpy has no
    type for.
    """
    batch = {name: x if name in samples.shared else x[: first.samples] for name, x in samples.inputs.items()}
    shapes = infer_shapes(scm.model, {name: array.shape for name, array in batch.items()})
    size = sum(math.prod(extent) for extent in first.extents.values())
    seeds = (min(measure.probes, size) + measure.gradient) if measure.curvature != "none" else 0
    kinds = {v.name: v.dtype for node in scm.model.graph for v in node.outputs}
    found = {}
    for site in sites:
        sizes = shapes.get(site.tensor, ())
        if kinds[site.tensor] not in KINDS or not sizes or not all(isinstance(size, int) for size in sizes):
            continue
        elements = math.prod(int(size or 0) for size in sizes)
        if sizes[site.layout.axis] % first.samples == 0:  # type: ignore[operator]
            found[site.tensor] = 4 * (1 + seeds) * elements // first.samples
    return found


def cut(groups: Sequence[Sequence[Site]], sizes: Mapping[str, int], samples: int, batch_size: int) -> list[list[int]]:
    """Numbers of consecutive groups of sites that are recorded together, given bytes per sample; none alone."""
    room = min(MOST // samples, MOST_PER_BATCH // min(batch_size, samples))
    blocks: list[list[int]] = []
    used = room
    for number, group in enumerate(groups):
        size = sum(sizes.get(site.tensor, room + 1) for site in group)
        fits = size <= room
        if fits and used + size <= room and blocks and blocks[-1][-1] == number - 1:
            blocks[-1].append(number)
            used += size
        elif fits:
            blocks.append([number])
            used = size
    return blocks
