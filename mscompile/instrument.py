"""The instrumented graph: a copy of the network whose outputs are sums over a batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common

from mscompile.data import Samples
from mscompile.errors import DataError
from mscompile.operators import Shape
from mscompile.operators.backward import PREFIX, Builder
from mscompile.reverse import Gradients, differentiate, sample_shapes
from mscompile.runtime import Arrays, Session
from mscompile.scm import Reader, Scm, Site
from mscompile.statistics import Array, Window
from mscompile.windows import features, offset_of, thinning, window_name, window_of


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
    output
        Name of the output that is differentiated.
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
    """

    covariance: bool = True
    shared: bool = False
    windows: bool = False
    extremes: bool = True
    output: str = ""
    curvature: Literal["identity", "fisher", "none"] = "none"
    gradient: bool = False
    probes: int = 4
    seed: int = 0
    second: bool = False


NEAR = 64.0
"""Squared mean over variance up to which squares are summed in float32 as they are: that costs a variance log2(64) of its 24
bits, and a subtraction less per element. Elsewhere the mean of a first batch is taken away before."""


@dataclass(frozen=True)
class Survey:
    """What one batch tells before the graph is built that sums over all of them.

    Attributes
    ----------
    samples
        Samples in the batch.
    shapes
        Of every tensor, for that batch.
    extent
        Shape of the differentiated output per sample; empty without one.
    means
        [channels] by site.
    near
        By site: whether every channel's squared mean is at most `NEAR` times its variance.
    """

    samples: int
    shapes: Mapping[str, Shape]
    extent: tuple[int, ...]
    means: Mapping[str, npt.NDArray[np.float32]]
    near: Mapping[str, bool]


def survey(scm: Scm, sites: Sequence[Site], first: Arrays, output: str) -> Survey:
    """Run the network on one batch."""
    model = scm.model.clone()
    graph, build = model.graph, Builder(model.graph, model.graph.opset_imports.get("", 1))
    values = {v.name or "": v for node in graph for v in node.outputs}
    asked = [values[output]] if output else []
    for site in sites:
        others = [a for a in range(len(scm.shapes[site.tensor])) if a != site.axis]
        number = build.op("Cast", values[site.tensor], to=int(ir.DataType.FLOAT))
        mean = build.reduce("ReduceMean", number, others)
        apart = build.op("Sub", number, mean)
        for value in (mean, build.reduce("ReduceMean", build.op("Mul", apart, apart), others)):
            flat = build.op("Reshape", value, build.integers([-1]))
            flat.dtype, flat.shape = ir.DataType.FLOAT, ir.Shape([site.size])
            asked.append(flat)
    graph.outputs.clear()
    graph.outputs.extend(asked)
    common.RemoveUnusedNodesPass()(model)
    found = list(Session(model, optimise=False).run(first).values())
    extent = found.pop(0).shape[1:] if output else ()
    means = {site.tensor: mean for site, mean in zip(sites, found[::2], strict=True)}
    near = {site.tensor: bool(np.all(m**2 <= NEAR * v)) for site, m, v in zip(sites, found[::2], found[1::2], strict=True)}
    return Survey(len(next(iter(first.values()))), sample_shapes(scm.model, first), extent, means, near)


NONDECREASING = frozenset({"Relu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign"})
"""Operators of one operand with which a maximum commutes, to the bit."""


def pool_first(graph: ir.Graph, kept: Collection[str | None]) -> dict[str, str]:
    """Turn max(f(x)) into f(max(x)) where f never decreases and f(x) is not among `kept`: the way back is shorter.

    The values keep their names but for f(x), whose name goes to max(x). Gives, by that name, the tensor of the same shape.
    """
    moved: dict[str, str] = {}
    for pool in [node for node in graph if node.op_type == "MaxPool" and node.domain == "" and len(node.outputs) == 1]:
        value, pooled = pool.inputs[0], pool.outputs[0]
        act = None if value is None else value.producer()
        if value is None or act is None or act.op_type not in NONDECREASING or act.domain != "" or act.graph is not graph:
            continue
        if value.name in kept or value.is_graph_output() or len(value.uses()) > 1:
            continue
        pool.replace_input_with(0, act.inputs[0])
        ir.convenience.replace_all_uses_with(pooled, value, replace_graph_outputs=True)
        act.replace_input_with(0, pooled)
        graph.remove(act)
        graph.insert_after(pool, act)
        value.name, pooled.name = pooled.name, value.name
        value.shape = pooled.shape
        moved[pooled.name or ""] = value.name or ""
    return moved


SUMS, EXTREMES = f"{PREFIX}sums", f"{PREFIX}extremes"
"""Names of the outputs that hold the sums and the largest entries of all rows."""
EXTREME: Mapping[str, float] = {"high": 1.0, "low": -1.0}
"""Rows of which the largest entries are returned, and what gives the quantity from them."""
PRODUCTS: Mapping[str, Mapping[str, str]] = {"s1": {"s11": "s1", "s12": "s2"}, "s2": {"s22": "s2"}}
"""Rows of which not the sums are returned but those of products: by name, with which other rows."""


@dataclass(frozen=True)
class View:
    """How the elements of a site's tensor are taken as samples, positions and channels."""

    build: Builder
    site: Site
    shape: Shape
    samples: int

    @property
    def rank(self) -> int:
        """Rank of the tensor."""
        return len(self.shape)

    @property
    def positions(self) -> list[int]:
        """Axes of positions: neither samples, which axis 0 counts, nor channels."""
        return [a for a in range(1, self.rank) if a != self.site.axis]

    @property
    def places(self) -> int | None:
        """Positions per sample; None if not known before the graph runs."""
        sizes = [self.shape[a] for a in self.positions]
        return None if any(not isinstance(d, int) for d in sizes) else math.prod(int(d or 0) for d in sizes)

    @property
    def steady(self) -> bool:
        """Whether axis 0 counts the samples, and each has the same number of positions."""
        return self.shape[0] == self.samples and self.places is not None

    @property
    def image(self) -> bool:
        """Whether pooling averages over the positions: onnxruntime keeps such tensors in a blocked layout of its own, which
        pooling, products of equal shapes and normalisation take as it is; every other operator costs a conversion."""
        return self.rank == 4 and self.site.axis == 1 and self.steady

    @property
    def factor(self) -> float:
        """Sum over positions, in units of what `over_positions` gives."""
        return float(self.places or 1) if self.image else 1.0

    def over_positions(self, value: ir.Value) -> ir.Value:
        """[samples, channels], of an image [samples, channels, 1, 1]: the sum over positions, divided by `factor`."""
        if self.image:
            return self.build.op("GlobalAveragePool", value)
        return self.build.reduce("ReduceSum", value, self.positions, keepdims=False) if self.positions else value

    def less(self, value: ir.Value, centre: npt.NDArray[np.float32]) -> ir.Value:
        """The value less a number per channel."""
        build, channels = self.build, len(centre)
        if not centre.any():
            return value
        if self.image:
            zeros, ones = (build.constant(np.full(channels, number), np.float32) for number in (0.0, 1.0))
            shift = build.constant(-centre, np.float32)
            return build.op("BatchNormalization", value, ones, shift, zeros, ones, epsilon=0.0)
        return build.op("Sub", value, build.constant(centre.reshape([-1] + [1] * (self.rank - 1 - self.site.axis)), np.float32))

    def largest(self, value: ir.Value) -> ir.Value:
        """[samples, channels], of an image [samples, channels, 1, 1]: the largest over positions."""
        if self.image:
            return self.build.op("GlobalMaxPool", value)
        return self.build.reduce("ReduceMax", value, self.positions, keepdims=False) if self.positions else value

    def largest_negated(self, value: ir.Value) -> ir.Value:
        """The same of the negated value."""
        build = self.build
        if self.image:
            zeros, ones = (build.constant(np.full(self.site.size, number), np.float32) for number in (0.0, 1.0))
            less = build.constant(np.full(self.site.size, -1.0), np.float32)
            return build.op("GlobalMaxPool", build.op("BatchNormalization", value, less, zeros, zeros, ones, epsilon=0.0))
        smallest = build.reduce("ReduceMin", value, self.positions, keepdims=False) if self.positions else value
        return build.op("Neg", smallest)

    def rows(self, value: ir.Value) -> ir.Value:
        """[observations, channels]."""
        axis = self.site.axis
        if axis != self.rank - 1:
            value = self.build.op("Transpose", value, perm=[a for a in range(self.rank) if a != axis] + [axis])
        return value if self.rank == 2 else self.build.op("Reshape", value, self.build.integers([-1, self.site.size]))


@dataclass(frozen=True)
class Rows:
    """Numbers per sample, and what their sum over samples is called.

    Attributes
    ----------
    value
        [samples · seeds, size], or [samples · seeds, size, 1, 1] from pooling.
    seeds
        Rows per sample; None if that is not known.
    factor
        What the numbers are multiplied by when their sum is read.
    """

    site: Site
    quantity: str
    value: ir.Value
    seeds: int | None
    pooled: bool
    factor: float = 1.0

    @property
    def kind(self) -> Hashable:
        """Rows of the same kind have the same number of rows and can stand side by side."""
        return (self.seeds, self.pooled) if self.seeds is not None else self.site.tensor


class Instrument:
    """Copy of a graph whose outputs are sums over a batch. Gradients are float32 whatever the model's types.

    Its new inputs are the seeds and the sums so far; its outputs are the sums, those of vectors packed into one.
    """

    def __init__(self, scm: Scm, sites: Sequence[Site], first: Survey, measure: Measure, samples: int) -> None:
        batches = max(1, samples // first.samples)
        self.model = scm.model.clone()
        common.ShapeInferencePass(check_type=False, strict_mode=False)(self.model)  # element types, for mixed precision
        self._graph = self.model.graph
        self._build = Builder(self._graph, self._graph.opset_imports.get("", 1))
        self._measure, self._first, self._extent = measure, first, first.extent
        moved = pool_first(self._graph, {measure.output, *(site.tensor for site in sites)})
        self._values = {v.name or "": v for node in self._graph for v in node.outputs}
        self._shapes, self._declared = (
            {**known, **{new: known[old] for new, old in moved.items() if old in known}} for known in (first.shapes, scm.shapes)
        )
        self._sums: dict[str, npt.NDArray[np.generic]] = {}
        self.centres = {site.tensor: self._centre(site) for site in sites}
        """[channels] by site: what is taken away from the activations before they are summed up."""
        self._rows: list[Rows] = []
        self._packed: dict[str, list[tuple[str, int, float]]] = {}
        self._ones: dict[int, ir.Value] = {}
        self.places: dict[str, int] = {}
        """Observations per sample, of sites where that is the same for every batch."""
        self.differentiated: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}
        self.windows: dict[str, tuple[Site, Window, int]] = {}
        gradients: list[Gradients] = []
        loss: Gradients | None = None
        if measure.curvature != "none":
            gradients = [self._differentiate(sites, self._probe(k)) for k in range(self.probes)]
            if measure.gradient:
                loss = self._differentiate(sites, self._loss_gradient())
            self.refused = {tensor: str(reason) for tensor, reason in gradients[0].refused.items()}
            self.differentiated = frozenset(gradients[0].values)
        self._graph.outputs.clear()
        for site in sites:
            shape = first.shapes[site.tensor]
            centred = self._sum(site, shape, gradients, loss)
            for reader in site.readers if measure.windows else ():
                window = window_of(site, reader, self._build.opset)
                if window is not None:
                    self._see(site, reader, window, centred, thinning(window, shape, samples, batches))
        self._pack()
        common.RemoveUnusedNodesPass()(self.model)

    @property
    def exact(self) -> bool:
        """Whether the seeds are all unit vectors, which cost no more then than random ones."""
        return math.prod(self._extent) <= self._measure.probes

    @property
    def probes(self) -> int:
        """Reverse passes per sample."""
        return math.prod(self._extent) if self.exact else self._measure.probes

    def feed(self, number: int, start: int, count: int, samples: Samples) -> Arrays:
        """Inputs beside the model's own, for batch `number`: the samples `start` to `start + count`."""
        ones = {f"{PREFIX}ones.{seeds}": np.ones((1, seeds * count), dtype=np.float32) for seeds in self._ones}
        return {**self.seeds(start, count, samples), **self.offsets(number), **ones}

    def seeds(self, start: int, count: int, samples: Samples) -> Arrays:
        """Seeds of the samples `start` to `start + count`; those of a sample do not depend on the batches."""
        if self._measure.curvature == "none":
            return {}
        feed: Arrays = {}
        size = math.prod(self._extent)
        if self.exact:
            for k, vector in enumerate(np.eye(size, dtype=np.float32)):
                feed[f"{PREFIX}seed.{k}"] = np.broadcast_to(vector, (count, size)).reshape(count, *self._extent).copy()
        else:
            signs = random_signs(self._measure.seed, start, count, self.probes * size)
            probes = np.moveaxis(signs.reshape(count, self.probes, *self._extent), 1, 0)
            feed = {f"{PREFIX}seed.{k}": np.ascontiguousarray(probes[k]) for k in range(self.probes)}
        if self._measure.gradient:
            feed[f"{PREFIX}labels"] = self._one_hot(samples, start, count)
        return feed

    def _one_hot(self, samples: Samples, start: int, count: int) -> npt.NDArray[np.float32]:
        labels = samples.labels
        classes = self._extent[-1]
        if labels is None or labels.shape[1:] != self._extent[:-1] or labels.dtype.kind not in "iu":
            raise DataError(
                "the cross-entropy objective needs class labels",
                where=samples.source,
                why="there are no labels" if labels is None else f"labels are {labels.dtype} {labels.shape[1:]} per sample",
                hint="add integer labels under `label`, or use --objective kl, which needs none",
            )
        chosen = labels[start : start + count]
        if chosen.min() < 0 or chosen.max() >= classes:
            raise DataError(
                "a label is no class of the output",
                where=samples.source,
                why=f"labels run from {chosen.min()} to {chosen.max()}, the output has {classes} classes",
                hint="number the classes from 0",
            )
        hot: npt.NDArray[np.float32] = np.eye(classes, dtype=np.float32)[chosen]
        return hot

    def _centre(self, site: Site) -> npt.NDArray[np.float32]:
        mean = self._first.means[site.tensor]
        return np.zeros_like(mean) if self._first.near[site.tensor] and not self._measure.covariance else mean

    # -- nodes --

    def _input(self, name: str, shape: Shape) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self._graph.inputs.append(value)
        return value

    def _dtype(self, tensor: str) -> ir.DataType:
        return self._values[tensor].dtype or ir.DataType.FLOAT

    def _differentiate(self, sites: Sequence[Site], seed: ir.Value) -> Gradients:
        seeds, tensors = {self._measure.output: seed}, [site.tensor for site in sites]
        return differentiate(
            self._graph, self._build, seeds, tensors, shapes=self._shapes, declared=self._declared
        )

    def _probe(self, k: int) -> ir.Value:
        """Seed k: the input itself, or for the Fisher curvature ``√p ∘ r − p (√p · r)``, whose second moment it is."""
        # Of the output's own dimensions: onnxruntime fuses what it sees to be of equal shape.
        seed = self._input(f"{PREFIX}seed.{k}", self._declared[self._measure.output])
        if self._measure.curvature == "identity":
            return seed
        p = self._softmax()
        weighted = self._build.op("Mul", self._build.op("Sqrt", p), seed)
        along = self._build.reduce("ReduceSum", weighted, [len(self._extent)])
        return self._build.op("Sub", weighted, self._build.op("Mul", p, along))

    def _softmax(self) -> ir.Value:
        logits = self._build.op("Cast", self._values[self._measure.output], to=int(ir.DataType.FLOAT))
        return self._build.op("Softmax", logits, axis=len(self._extent))

    def _loss_gradient(self) -> ir.Value:
        """Gradient of the cross-entropy: softmax minus one-hot labels."""
        hot = self._input(f"{PREFIX}labels", self._declared[self._measure.output])
        return self._build.op("Sub", self._softmax(), hot)

    def _output(self, name: str, value: ir.Value, start: npt.NDArray[np.generic]) -> None:
        """Return a quantity combined with what was found before: a sum, or the extreme where it starts at infinity."""
        dtype, shape = ir.DataType.from_numpy(start.dtype), ir.Shape(start.shape)
        so_far = ir.Value(name=before(name), shape=shape, type=ir.TensorType(dtype))
        self._graph.inputs.append(so_far)
        combine = "Add" if np.all(np.isfinite(start)) else "Min" if np.all(start > 0) else "Max"
        after = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        self._graph.append(ir.node(combine, [so_far, value], outputs=[after], name=name))
        self._graph.outputs.append(after)
        self._sums[name] = start

    def _square(self, where: str, quantity: str, value: ir.Value, size: int) -> None:
        """Return a sum of outer products."""
        self._output(quantity_of(where, quantity), value, np.zeros((size, size), dtype=np.float32))

    def _count(self, where: str, quantity: str, value: ir.Value) -> None:
        """Return a number of observations."""
        self._output(quantity_of(where, quantity), value, np.array(0, dtype=np.int64))

    def _pack(self) -> None:
        """Return all sums of rows as one: nodes of their own for each site and quantity would cost more than their work."""
        build, found = self._build, {SUMS: [], EXTREMES: []}  # type: dict[str, list[ir.Value]]
        groups: dict[tuple[str, Hashable], list[Rows]] = {}
        for rows in self._rows:
            groups.setdefault((rows.quantity, rows.kind), []).append(rows)
        joined = {key: self._side_by_side(group) for key, group in groups.items()}
        for (quantity, kind), value in joined.items():
            first, *_ = group = groups[quantity, kind]
            if quantity in EXTREME:
                found[EXTREMES].append(build.reduce("ReduceMax", value, [0]))
                self._note(EXTREMES, group, quantity, EXTREME[quantity])
            elif quantity in PRODUCTS:
                for product, other in PRODUCTS[quantity].items():
                    both = build.op("Mul", value, joined[other, kind])
                    found[SUMS].append(build.op("MatMul", self._row_of_ones(both, first.seeds), both))
                    self._note(SUMS, group, product, power=2)
            else:
                found[SUMS].append(build.op("MatMul", self._row_of_ones(value, first.seeds), value))
                self._note(SUMS, group, quantity)
        for name, start in ((SUMS, 0.0), (EXTREMES, -np.inf)):
            if parts := self._packed.get(name):
                everything = build.op("Concat", *found[name], axis=1)
                self._output(name, everything, np.full((1, sum(size for _, size, _ in parts)), start, dtype=np.float32))

    def _note(self, name: str, group: Sequence[Rows], quantity: str, factor: float = 1.0, power: int = 1) -> None:
        """Keep in mind what lies next in a packed output."""
        found = ((name_of(rows.site, quantity), rows.site.size, factor * rows.factor**power) for rows in group)
        self._packed.setdefault(name, []).extend(found)

    def _side_by_side(self, group: Sequence[Rows]) -> ir.Value:
        """[samples · seeds, all channels of a group of sites]."""
        build, values = self._build, [rows.value for rows in group]
        joined = build.op("Concat", *values, axis=1) if len(values) > 1 else values[0]
        if not group[0].pooled:
            return joined
        return build.op("Reshape", joined, build.integers([-1, sum(rows.site.size for rows in group)]))

    def _row_of_ones(self, rows: ir.Value, seeds: int | None) -> ir.Value:
        """[1, rows]: summing down the rows of a matrix is fastest as a product."""
        build = self._build
        if seeds is None:
            length = build.extents(rows, [0])
            shape = build.op("Concat", build.integers([1]), length, axis=0)
            return build.op("Expand", build.constant(np.ones((1, 1)), np.float32), shape)
        if seeds not in self._ones:
            self._ones[seeds] = self._input(f"{PREFIX}ones.{seeds}", (1, None))
        return self._ones[seeds]

    def empty(self) -> dict[str, ort.OrtValue]:
        """The sums over no data."""
        return {before(name): ort.OrtValue.ortvalue_from_numpy(start) for name, start in self._sums.items()}

    def read(self, state: Mapping[str, ort.OrtValue], samples: int) -> dict[str, Array]:
        """The sums over a number of samples, in float64."""
        found: dict[str, Array] = {name: value.numpy().astype(np.float64) for name, value in state.items()}
        for packed, entries in self._packed.items():
            parts = np.split(found.pop(packed)[0], np.cumsum([size for _, size, _ in entries])[:-1])
            found |= {name: factor * part for (name, _, factor), part in zip(entries, parts, strict=True)}
        counts = {quantity_of(tensor, "count"): np.array(places * samples) for tensor, places in self.places.items()}
        return {**found, **counts}

    def _sum(self, site: Site, shape: Shape, gradients: Sequence[Gradients], loss: Gradients | None) -> ir.Value:
        """Return the sums of one site; gives the centred activations."""
        build, measure, rank = self._build, self._measure, len(shape)
        view = View(build, site, shape, self._first.samples)
        tensor = self._values[site.tensor]
        if self._dtype(site.tensor) != ir.DataType.FLOAT:
            tensor = build.op("Cast", tensor, to=int(ir.DataType.FLOAT))
        centred = view.less(tensor, self.centres[site.tensor])
        if view.steady:
            self.places[site.tensor] = view.places
        else:
            self._count(site.tensor, "count", build.op("Div", build.op("Size", tensor), build.integers(site.size)))

        def keep(quantity: str, *values: ir.Value) -> None:
            rows = self._stacked([view.over_positions(value) for value in values])
            self._rows.append(Rows(site, quantity, rows, len(values) if view.steady else None, view.image, view.factor))

        keep("sum", centred)
        if measure.covariance:
            rows = view.rows(centred)
            self._square(site.tensor, "products", self._products(rows), site.size)
            if measure.shared and view.places != 1:
                others = view.rows(self._rolled(centred))
                self._square(site.tensor, "shared", self._products(rows, others), site.size)
        else:
            keep("squares", build.op("Mul", centred, centred))
        if measure.extremes:
            for quantity, rows in {"high": view.largest(tensor), "low": view.largest_negated(tensor)}.items():
                self._rows.append(Rows(site, quantity, rows, 1 if view.steady else None, view.image))
        if site.tensor not in self.differentiated:
            return centred
        slopes = [gradient.values[site.tensor] for gradient in gradients]
        keep("s1", *slopes)
        keep("s2", *(build.op("Mul", slope, centred) for slope in slopes))
        if measure.second:
            rows = self._stacked([view.rows(slope) for slope in slopes])
            self._square(site.tensor, "second", self._products(rows), site.size)
        if loss is not None and site.tensor in loss.values:
            slope = loss.values[site.tensor]
            keep("g1", slope)
            keep("g2", build.op("Mul", slope, centred))
        return centred

    def offsets(self, number: int) -> Arrays:
        """Offsets of the windows observed in batch `number`."""
        return {
            f"{PREFIX}offset:{name}": offset_of(window, thin, number, self._measure.seed)
            for name, (_, window, thin) in self.windows.items()
            if thin > 1
        }

    def _see(self, site: Site, reader: Reader, window: Window, centred: ir.Value, thin: int) -> None:
        """Return the second moments of a reader's window."""
        build, name = self._build, window_name(reader)
        self.windows[name] = site, window, thin
        offset = None
        if not window.kernel:
            centred = self._channel_major(site, reader)
        elif thin > 1:
            offset = ir.Value(
                name=f"{PREFIX}offset:{name}", shape=ir.Shape([len(window.kernel)]), type=ir.TensorType(ir.DataType.INT64)
            )
            self._graph.inputs.append(offset)
        seen, flat = features(build, window, centred, thin, offset), build.integers([-1, window.features])
        rows = build.op("Reshape", seen, flat)
        count = build.op("Gather", build.op("Shape", rows), build.integers(0), axis=0)
        self._count(name, "windows", count)
        self._square(name, "window", self._products(rows), window.features)
        if self._measure.shared:
            others = build.op("Reshape", self._rolled(seen), flat)
            self._square(name, "between", self._products(rows, others), window.features)

    def _channel_major(self, site: Site, reader: Reader) -> ir.Value:
        """[samples, channels · places]: the input of a product less the site's centre."""
        build = self._build
        linear = reader.signature.linear
        assert linear is not None
        source = reader.node.inputs[linear.data]
        assert source is not None
        value = build.op("Cast", self._values[source.name or ""], to=int(ir.DataType.FLOAT))
        centre = self.centres[site.tensor][reader.index]
        centred = build.op("Sub", value, build.constant(centre, np.float32))
        order = np.argsort(reader.index, kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return centred
        return build.op("Gather", centred, build.integers(order.tolist()), axis=1)

    def _products(self, rows: ir.Value, others: ir.Value | None = None) -> ir.Value:
        return self._build.op("MatMul", self._build.op("Transpose", rows, perm=[1, 0]), rows if others is None else others)

    def _rolled(self, value: ir.Value) -> ir.Value:
        """The value of the next sample at each sample, of the first at the last."""
        build, first = self._build, self._build.integers([1])
        if build.opset < 10:
            tail = build.op("Slice", value, starts=[1], ends=[np.iinfo(np.int64).max], axes=[0])
            return build.op("Concat", tail, build.op("Slice", value, starts=[0], ends=[1], axes=[0]), axis=0)
        start, end = build.integers([0]), build.integers([np.iinfo(np.int64).max])
        return build.op(
            "Concat", build.op("Slice", value, first, end, start), build.op("Slice", value, start, first, start), axis=0
        )

    def _stacked(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The matrices below each other."""
        return parts[0] if len(parts) == 1 else self._build.op("Concat", *parts, axis=0)


def random_signs(seed: int, start: int, count: int, size: int) -> npt.NDArray[np.float32]:
    """[count, size] of ±1: rows `start` to `start + count` of an endless table that only `seed` and `size` determine."""
    blocks = -(-size // 256)  # a step of the Philox counter gives 256 bits
    bits = np.random.Philox(key=seed)
    bits.advance(start * blocks)
    words = bits.random_raw(4 * blocks * count).astype("<u8").view(np.uint8).reshape(count, -1)
    return 2.0 * np.unpackbits(words, axis=1)[:, :size].astype(np.float32) - 1.0


def name_of(site: Site, quantity: str) -> str:
    """Name of the output that holds a quantity of a site."""
    return quantity_of(site.tensor, quantity)


def quantity_of(name: str, quantity: str) -> str:
    """Name of the output that holds a quantity of a tensor."""
    return f"{PREFIX}{quantity}:{name}"


def before(name: str) -> str:
    """Name of the input that holds what an output has summed up so far."""
    return f"{name}:before"
