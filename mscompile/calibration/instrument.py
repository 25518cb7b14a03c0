"""The instrumented graph: a copy of the network whose outputs are sums over a batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile import runtime
from mscompile.calibration.blocks import Blocks, blocks_of
from mscompile.calibration.reverse import Gradients, differentiate, pool_first
from mscompile.calibration.seeds import SeedFeeds, Seeds
from mscompile.calibration.statistics import Array, Window
from mscompile.calibration.summation import Feeds, Summation
from mscompile.calibration.survey import Survey
from mscompile.calibration.tally import Rows, Start, Tally, before, name_of, quantity_of
from mscompile.calibration.view import View, layout_of
from mscompile.calibration.windows import extents, features, padded, patches, thinning, window_name, window_of
from mscompile.files import weight_bytes
from mscompile.network.layout import FIRST
from mscompile.network.scm import Reader, Scm, Site, captured, infer_shapes
from mscompile.operators import Shape
from mscompile.operators.backward import PREFIX, Builder

FLOAT_BYTES = 4
"""Of a number in the sums' type."""


@dataclass(frozen=True)
class Measure:
    """What calibration measures beside mean and variance.

    Attributes
    ----------
    covariance
        Whether the channels' covariance is summed, which affine replacement needs.
    shared
        Whether what different samples have in common at a position is summed, which a fit for interchange needs.
    windows
        Whether readers that see several positions at once are observed by their windows.
    extremes
        Whether the range of each channel is found, which guards optimal constants.
    outputs
        Weight by name of the outputs that are differentiated.
    curvature
        ``identity``: of the squared distance of outputs. ``fisher``: of the KL divergence of the softmax over the last axis,
        diag p − p pᵀ. ``none``: no reverse pass.
    gradient
        Whether the gradient of the cross-entropy with labels is summed as well.
    probes
        Random seeds per sample. An output of no more values than that gets all unit vectors instead, and the curvature is
        exact.
    seed
        Of the random signs.
    second
        Whether E[λ λᵀ] is summed.
    block
        Channels whose rows of outer products are summed; all if None.
    """

    covariance: bool = True
    shared: bool = False
    windows: bool = False
    extremes: bool = True
    outputs: Mapping[str, float] = field(default_factory=dict)
    curvature: Literal["identity", "fisher", "none"] = "none"
    gradient: bool = False
    probes: int = 4
    seed: int = 0
    second: bool = False
    block: slice | None = None


@dataclass(frozen=True)
class RoundTrip:
    """A graph with the activations of sites and the way back to them. Gradients are float32 whatever the model's types.

    Attributes
    ----------
    values
        By name.
    slopes
        By site tensor, for those that the way back reaches: gradients, one per seed.
    losses
        By site tensor: the gradient of the loss, where that is asked for.
    refused
        By site tensor: why there is no way back to it.
    share
        Weight of one seed in the curvature.
    feeds
        What goes into the seeds.
    in_front
        Whether activations and gradients hold the samples in front, see `Turned`, whatever the network does.
    """

    model: ir.Model
    build: Builder
    values: Mapping[str, ir.Value]
    slopes: Mapping[str, Sequence[ir.Value]]
    losses: Mapping[str, ir.Value]
    refused: Mapping[str, str]
    share: float = 1.0
    feeds: SeedFeeds | None = None
    in_front: bool = False


def there_and_back(scm: Scm, sites: Sequence[Site], first: Survey, measure: Measure) -> RoundTrip:
    """Copy of a network with the reverse pass appended."""
    model = scm.model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)  # element types, for mixed precision
    graph, tensors = model.graph, [site.tensor for site in sites]
    folds = weight_bytes(scm.model) <= runtime.LARGE
    build = Builder(graph, graph.opset_imports.get("", 1), fused=True, folds=folds)
    moved = pool_first(graph, {*measure.outputs, *tensors})
    values = {v.name or "": v for node in graph for v in node.outputs}
    shapes, declared = (
        {**known, **{new: known[old] for new, old in moved.items() if old in known}} for known in (first.shapes, scm.shapes)
    )
    if measure.curvature == "none":
        return RoundTrip(model, build, values, {}, {}, {})
    seeds = Seeds(
        graph,
        build,
        outputs=measure.outputs,
        extents=first.extents,
        declared=declared,
        fisher=measure.curvature == "fisher",
        probes=measure.probes,
        seed=measure.seed,
    )

    def back(start: Mapping[str, ir.Value]) -> Gradients:
        return differentiate(graph, build, start, tensors, shapes=shapes, declared=declared)

    found = [back(seeds.probe(k)) for k in range(seeds.probes)]
    losses = back(seeds.loss_gradient()).values if measure.gradient else {}
    slopes = {tensor: [gradients.values[tensor] for gradients in found] for tensor in found[0].values}
    refused = {tensor: str(reason) for tensor, reason in found[0].refused.items()}
    share = 1.0 if seeds.exact else 1.0 / seeds.probes
    return RoundTrip(model, build, values, slopes, losses, refused, share, seeds.feeds)


class Instrument:
    """Copy of a graph whose outputs are sums over a batch.

    Its new inputs are the seeds, rows of ones, and the sums so far; its outputs are the sums.

    Parameters
    ----------
    trip
        What takes the place of the network and its way back; it becomes part of this.
    """

    def __init__(
        self,
        scm: Scm,
        sites: Sequence[Site],
        first: Survey,
        measure: Measure,
        samples: int,
        trip: RoundTrip | None = None,
    ) -> None:
        batches = max(1, samples // first.batch)
        trip = there_and_back(scm, sites, first, measure) if trip is None else trip
        self.model, self._graph, self._build, self._values = trip.model, trip.model.graph, trip.build, trip.values
        self._measure, self._first, self._trip = measure, first, trip
        self.centres = {site.tensor: self._centre(site) for site in sites}
        """[channels] by site: what is taken away from the activations before they are summed up."""
        self.tally = Tally(self._graph, self._build)
        """The sums."""
        self.differentiated = frozenset(trip.slopes)
        self.refused = trip.refused
        self.share = trip.share
        """Weight of one seed in the curvature."""
        self.windows: dict[str, tuple[Site, Window, int]] = {}
        self._graph.outputs.clear()
        passes = frozenset(self._graph)
        for site in sites:
            view = View(self._build, site, first.shapes[site.tensor], first.samples)
            centred = self._sum(view)
            for reader in site.readers if measure.windows else ():
                window = window_of(site, reader, self._build.opset)
                if window is not None:
                    self._see(view, reader, window, centred, thinning(window, view.whole, samples, batches))
        self.tally.pack()
        common.RemoveUnusedNodesPass()(self.model)
        self._sum_early(passes)

    @property
    def summation(self) -> Summation:
        """The graph with all that it takes to run it on any part of the data."""
        offsets = {f"{PREFIX}offset:{name}": (window, thin) for name, (_, window, thin) in self.windows.items() if thin > 1}
        feeds = Feeds(self.tally.ones, self._trip.feeds, offsets, self._measure.seed)
        return Summation(self.model, self.tally.starts, feeds)

    def shapes(self, batch: runtime.Arrays, labels: Array | None) -> dict[str, Shape]:
        """Shapes of all tensors on the batch of the survey, as far as inference can tell."""
        summation = self.summation
        feed = {**batch, **summation.feeds.of(1, 0, self._first.samples, labels, "")}
        given = {name: array.shape for name, array in feed.items()}
        given |= {before(name): start.shape for name, start in summation.starts.items()}
        known = {value.name or "": shape for value, shape in self._build.shapes.items() if value.producer() is not None}
        return infer_shapes(self.model, given, known)

    def _centre(self, site: Site) -> npt.NDArray[np.float32]:
        mean = self._first.means[site.tensor]
        return np.zeros_like(mean) if self._first.near[site.tensor] and not self._measure.covariance else mean

    def _sum_early(self, passes: Collection[ir.Node]) -> None:
        """Put sums right behind what they sum, still in the processor's cache; `passes`: nodes of the way there and back."""
        place: dict[ir.Node, int] = {}
        for number, node in enumerate(self._graph):
            sources = [value.producer() for value in (*node.inputs, *captured(node)) if value is not None]
            behind = (place[source] for source in sources if source in place)
            place[node] = number if node in passes else max(behind, default=0)
        order = sorted(place, key=place.__getitem__)
        self._graph.remove(order)
        self._graph.extend(order)

    # -- nodes --

    def _dtype(self, tensor: str) -> ir.DataType:
        return self._values[tensor].dtype or ir.DataType.FLOAT

    def _sum(self, view: View) -> ir.Value:
        """Return the sums of one site; gives the centred activations, samples in front."""
        build, measure, site = self._build, self._measure, view.site
        front = view.turned.front if not self._trip.in_front else lambda value: value
        tensor = self._values[site.tensor]
        if self._dtype(site.tensor) != ir.DataType.FLOAT:
            tensor = build.op("Cast", tensor, to=int(ir.DataType.FLOAT))
        tensor = front(tensor)
        centred = view.less(tensor, self.centres[site.tensor])
        if view.places is not None and view.steady:
            self.tally.add_steady(site.tensor, view.places)
        else:
            count = build.op("Div", build.op("Size", tensor), build.integers(site.size))
            self.tally.add_sum(name_of(site, "count"), count, Start((), whole=True))

        def keep(quantity: str, *values: ir.Value) -> None:
            rows = _stacked(build, [view.over_positions(value) for value in values])
            self.tally.add(Rows(site, quantity, rows, len(values) if view.steady else None, view.image, view.factor))

        keep("sum", centred)
        if measure.covariance:
            self._square(site, "products", view, [centred])
            if measure.shared and view.places != 1:
                self._square(site, "shared", view, [centred], apart=True)
        else:
            keep("squares", build.op("Mul", centred, centred))
        if measure.extremes:
            for quantity, rows in {"high": view.largest(tensor), "low": view.largest_negated(tensor)}.items():
                self.tally.add(Rows(site, quantity, rows, 1 if view.steady else None, view.image))
        if site.tensor not in self.differentiated:
            return centred
        slopes = [front(slope) for slope in self._trip.slopes[site.tensor]]
        keep("s1", *slopes)
        keep("s2", *(build.op("Mul", slope, centred) for slope in slopes))
        if measure.second:
            self._square(site, "second", view, slopes)
        if site.tensor in self._trip.losses:
            slope = front(self._trip.losses[site.tensor])
            keep("g1", slope)
            keep("g2", build.op("Mul", slope, centred))
        return centred

    def _square(self, site: Site, quantity: str, view: View, values: Sequence[ir.Value], *, apart: bool = False) -> None:
        """Return the outer products of a site's channels, or the block of rows that is asked for.

        `apart`: of those of one sample with those of the next.
        """
        channels = range(site.size)[self._measure.block or slice(None)]

        def products(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
            seen = replace(view, build=build)
            rows = _stacked(build, [seen.rows(part) for part in parts])
            others = _stacked(build, [seen.rows(_rolled(build, part)) for part in parts]) if apart else rows
            if len(channels) < site.size:
                rows = build.op("Gather", rows, build.integers(list(channels)), axis=1)
            return _products(build, rows, others)

        shape, name = (len(channels), site.size), name_of(site, quantity)
        blocks = self._blocks_of_map(view, len(values))
        if blocks is None:
            self.tally.add_sum(name, products(self._build, values), Start(shape))
            return

        def piece(build: Builder, number: ir.Value) -> list[ir.Value]:
            return [products(build, [blocks.cut(build, value, number) for value in values])]

        self.tally.add_over_blocks({name: Start(shape)}, blocks.count(self._build, values[0]), piece)

    def _blocks_of_map(self, view: View, seeds: int) -> Blocks | None:
        """Blocks of a site's tensor, for as many of its shape as there are seeds; None where it is taken whole."""
        shape, axes = view.shape, view.positions
        if not axes or not all(isinstance(d, int) for d in shape):
            return None
        size = FLOAT_BYTES * seeds * math.prod(int(d or 0) for d in shape) * self._first.batch // self._first.samples
        return blocks_of(size, int(shape[axes[0]] or 0), self._build.opset, axes[0])

    def _see(self, view: View, reader: Reader, window: Window, centred: ir.Value, thin: int) -> None:
        """Return the second moments of a reader's window."""
        build, site, name = self._build, view.site, window_name(reader)
        self.windows[name] = site, window, thin
        offset = None
        centred = view.turned.back(centred) if window.kernel else self._channel_major(site, reader)
        if window.kernel and thin > 1:
            offset = ir.Value(
                name=f"{PREFIX}offset:{name}", shape=ir.Shape([len(window.kernel)]), type=ir.TensorType(ir.DataType.INT64)
            )
            self._graph.inputs.append(offset)
        layout = layout_of(reader.layout or FIRST, self._first.shapes[reader.data], self._first.samples, reader.data)
        step = layout.behind or 1
        square = window.features, window.features

        def found(build: Builder, seen: ir.Value) -> list[ir.Value]:
            flat = build.integers([-1, window.features])
            rows = build.op("Reshape", seen, flat)
            count = build.op("Gather", build.op("Shape", rows), build.integers(0), axis=0)
            if not self._measure.shared:
                return [count, _products(build, rows)]
            others = build.op("Reshape", _rolled(build, seen, step), flat)
            return [count, _products(build, rows), _products(build, rows, others)]

        starts = {"windows": Start((), whole=True), "window": Start(square), "between": Start(square)}
        blocks = self._blocks_of_windows(site, window, thin)
        if blocks is None:
            parts = found(build, features(build, window, centred, thin, offset))
            for (quantity, start), part in zip(starts.items(), parts, strict=False):
                self.tally.add_sum(quantity_of(name, quantity), part, start)
            return
        source = padded(build, window, centred, offset)

        def piece(build: Builder, number: ir.Value) -> list[ir.Value]:
            return found(build, patches(build, window, blocks.cut(build, source, number), thin))

        asked = list(starts.items())[: 2 + self._measure.shared]
        self.tally.add_over_blocks(
            {quantity_of(name, quantity): start for quantity, start in asked}, blocks.count(build, source), piece
        )

    def _blocks_of_windows(self, site: Site, window: Window, thin: int) -> Blocks | None:
        """Blocks of a padded map for what a reader sees of it; None where it is taken whole."""
        shape = self._first.shapes[site.tensor]
        places = extents(window, shape)
        if places is None:
            return None
        places = tuple(-(-count // thin) for count in places)
        rows = int(shape[0] or 0) * self._first.batch // self._first.samples
        size = FLOAT_BYTES * rows * math.prod(places) * window.features
        reach = window.dilations[0] * (window.kernel[0] - 1)
        return blocks_of(size, places[0], self._build.opset, 2, thin * window.strides[0], reach)

    def _channel_major(self, site: Site, reader: Reader) -> ir.Value:
        """[samples, channels · places]: the input of a product less the site's centre."""
        build = self._build
        value = build.op("Cast", self._values[reader.data], to=int(ir.DataType.FLOAT))
        centre = self.centres[site.tensor][reader.index]
        centred = build.op("Sub", value, build.constant(centre, np.float32))
        order = np.argsort(reader.index, kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return centred
        return build.op("Gather", centred, build.integers(order.tolist()), axis=1)


def _products(build: Builder, rows: ir.Value, others: ir.Value | None = None) -> ir.Value:
    return build.op("MatMul", build.op("Transpose", rows, perm=[1, 0]), rows if others is None else others)


def _rolled(build: Builder, value: ir.Value, rows: int = 1) -> ir.Value:
    """The value of the next sample at each sample, of the first at the last; each has so many rows."""
    first = build.integers([rows])
    if build.opset < 10:
        tail = build.op("Slice", value, starts=[rows], ends=[np.iinfo(np.int64).max], axes=[0])
        return build.op("Concat", tail, build.op("Slice", value, starts=[0], ends=[rows], axes=[0]), axis=0)
    start, end = build.integers([0]), build.integers([np.iinfo(np.int64).max])
    return build.op(
        "Concat", build.op("Slice", value, first, end, start), build.op("Slice", value, start, first, start), axis=0
    )


def _stacked(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    """The matrices below each other."""
    return parts[0] if len(parts) == 1 else build.op("Concat", *parts, axis=0)
