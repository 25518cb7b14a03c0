"""The instrumented graph: a copy of the network whose outputs are sums over a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.calibration.reverse import Gradients, differentiate, pool_first
from mscompile.calibration.seeds import SeedFeeds, Seeds
from mscompile.calibration.statistics import Window
from mscompile.calibration.summation import Feeds, Summation
from mscompile.calibration.survey import Survey
from mscompile.calibration.tally import Rows, Tally
from mscompile.calibration.view import View, layout_of
from mscompile.calibration.windows import features, thinning, window_name, window_of
from mscompile.network.layout import FIRST
from mscompile.network.scm import Reader, Scm, Site
from mscompile.operators.backward import PREFIX, Builder


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
    build = Builder(graph, graph.opset_imports.get("", 1), fused=True)
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
        batches = max(1, samples // first.samples)
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

    def _centre(self, site: Site) -> npt.NDArray[np.float32]:
        mean = self._first.means[site.tensor]
        return np.zeros_like(mean) if self._first.near[site.tensor] and not self._measure.covariance else mean

    def _sum_early(self, passes: Collection[ir.Node]) -> None:
        """Put sums right behind what they sum, still in the processor's cache; `passes`: nodes of the way there and back."""
        place: dict[ir.Node, int] = {}
        for number, node in enumerate(self._graph):
            sources = [value.producer() for value in node.inputs if value is not None]
            behind = (place[source] for source in sources if source is not None)
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
            self.tally.add_count(site.tensor, "count", build.op("Div", build.op("Size", tensor), build.integers(site.size)))

        def keep(quantity: str, *values: ir.Value) -> None:
            rows = self._stacked([view.over_positions(value) for value in values])
            self.tally.add(Rows(site, quantity, rows, len(values) if view.steady else None, view.image, view.factor))

        keep("sum", centred)
        if measure.covariance:
            rows = view.rows(centred)
            self._square(site, "products", rows, rows)
            if measure.shared and view.places != 1:
                others = view.rows(self._rolled(centred))
                self._square(site, "shared", rows, others)
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
            rows = self._stacked([view.rows(slope) for slope in slopes])
            self._square(site, "second", rows, rows)
        if site.tensor in self._trip.losses:
            slope = front(self._trip.losses[site.tensor])
            keep("g1", slope)
            keep("g2", build.op("Mul", slope, centred))
        return centred

    def _square(self, site: Site, quantity: str, rows: ir.Value, others: ir.Value) -> None:
        """Return the outer products of a site's channels, or the block of rows that is asked for."""
        build, channels = self._build, range(site.size)[self._measure.block or slice(None)]
        if len(channels) < site.size:
            rows = build.op("Gather", rows, build.integers(list(channels)), axis=1)
        self.tally.add_square(site.tensor, quantity, self._products(rows, others), (len(channels), site.size))

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
        seen, flat = features(build, window, centred, thin, offset), build.integers([-1, window.features])
        rows = build.op("Reshape", seen, flat)
        count = build.op("Gather", build.op("Shape", rows), build.integers(0), axis=0)
        self.tally.add_count(name, "windows", count)
        self.tally.add_square(name, "window", self._products(rows), (window.features, window.features))
        if self._measure.shared:
            layout = layout_of(reader.layout or FIRST, self._first.shapes[reader.data], self._first.samples, reader.data)
            others = build.op("Reshape", self._rolled(seen, layout.behind or 1), flat)
            self.tally.add_square(name, "between", self._products(rows, others), (window.features, window.features))

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

    def _products(self, rows: ir.Value, others: ir.Value | None = None) -> ir.Value:
        return self._build.op("MatMul", self._build.op("Transpose", rows, perm=[1, 0]), rows if others is None else others)

    def _rolled(self, value: ir.Value, rows: int = 1) -> ir.Value:
        """The value of the next sample at each sample, of the first at the last; each has so many rows."""
        build, first = self._build, self._build.integers([rows])
        if build.opset < 10:
            tail = build.op("Slice", value, starts=[rows], ends=[np.iinfo(np.int64).max], axes=[0])
            return build.op("Concat", tail, build.op("Slice", value, starts=[0], ends=[rows], axes=[0]), axis=0)
        start, end = build.integers([0]), build.integers([np.iinfo(np.int64).max])
        return build.op(
            "Concat", build.op("Slice", value, first, end, start), build.op("Slice", value, start, first, start), axis=0
        )

    def _stacked(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The matrices below each other."""
        return parts[0] if len(parts) == 1 else self._build.op("Concat", *parts, axis=0)
