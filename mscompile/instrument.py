"""The instrumented graph: a copy of the network whose outputs are sums over a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from mscompile.runtime import Arrays
from mscompile.scm import Reader, Scm, Site
from mscompile.statistics import Window
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


class Instrument:
    """Copy of a graph whose outputs are sums over a batch. Gradients are float32 whatever the model's types.

    Its new inputs are the centres of the sites' channels, the seeds, and the sums so far; its outputs are the sums, named by
    quantity and site.
    """

    def __init__(
        self,
        scm: Scm,
        sites: Sequence[Site],
        first: Arrays,
        measure: Measure,
        extent: tuple[int, ...],
        samples: int,
    ) -> None:
        batches = max(1, samples // len(next(iter(first.values()))))
        self.model = scm.model.clone()
        common.ShapeInferencePass(check_type=False, strict_mode=False)(self.model)  # element types, for mixed precision
        self._graph = self.model.graph
        self._build = Builder(self._graph, self._graph.opset_imports.get("", 1))
        self._values = {v.name or "": v for node in self._graph for v in node.outputs}
        self._measure, self._extent = measure, extent
        shapes = sample_shapes(self.model, first)
        self._declared = scm.shapes
        self._sums: dict[str, tuple[tuple[int, ...], npt.NDArray[np.generic]]] = {}
        self.differentiated: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}
        self.windows: dict[str, tuple[Site, Window, int]] = {}
        gradients: list[Gradients] = []
        loss: Gradients | None = None
        if measure.curvature != "none":
            gradients = [self._differentiate(sites, shapes, self._probe(k)) for k in range(self.probes)]
            if measure.gradient:
                loss = self._differentiate(sites, shapes, self._loss_gradient())
            self.refused = {tensor: str(reason) for tensor, reason in gradients[0].refused.items()}
            self.differentiated = frozenset(gradients[0].values)
        self._graph.outputs.clear()
        for site in sites:
            centred = self._sum(site, shapes[site.tensor], gradients, loss)
            for reader in site.readers if measure.windows else ():
                window = window_of(site, reader, self._build.opset)
                if window is not None:
                    self._see(site, reader, window, centred, thinning(window, shapes[site.tensor], samples, batches))

    @property
    def exact(self) -> bool:
        """Whether the seeds are all unit vectors, which cost no more then than random ones."""
        return math.prod(self._extent) <= self._measure.probes

    @property
    def probes(self) -> int:
        """Reverse passes per sample."""
        return math.prod(self._extent) if self.exact else self._measure.probes

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

    # -- nodes --

    def _input(self, name: str, rank: int) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape([None] * rank), type=ir.TensorType(ir.DataType.FLOAT))
        self._graph.inputs.append(value)
        return value

    def _dtype(self, tensor: str) -> ir.DataType:
        return self._values[tensor].dtype or ir.DataType.FLOAT

    def _differentiate(self, sites: Sequence[Site], shapes: Mapping[str, Shape], seed: ir.Value) -> Gradients:
        seeds, tensors = {self._measure.output: seed}, [site.tensor for site in sites]
        return differentiate(self._graph, self._build, seeds, tensors, shapes=shapes, declared=self._declared)

    def _probe(self, k: int) -> ir.Value:
        """Seed k: the input itself, or for the Fisher curvature ``√p ∘ r − p (√p · r)``, whose second moment it is."""
        seed = self._input(f"{PREFIX}seed.{k}", len(self._extent) + 1)
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
        hot = self._input(f"{PREFIX}labels", len(self._extent) + 1)
        return self._build.op("Sub", self._softmax(), hot)

    def _output(
        self, where: str, quantity: str, value: ir.Value, shape: tuple[int, ...], start: np.int64 | np.float32
    ) -> None:
        """Return a quantity combined with what was found before: a sum, or the extreme where it starts at infinity."""
        name, dtype = quantity_of(where, quantity), ir.DataType.from_numpy(start.dtype)
        so_far = ir.Value(name=before(name), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(so_far)
        combine = "Add" if np.isfinite(start) else "Min" if start > 0 else "Max"
        after = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.append(ir.node(combine, [so_far, value], outputs=[after], name=name))
        self._graph.outputs.append(after)
        self._sums[name] = shape, np.full(shape, start)

    def empty(self) -> dict[str, ort.OrtValue]:
        """The sums over no data."""
        return {before(name): ort.OrtValue.ortvalue_from_numpy(start) for name, (_, start) in self._sums.items()}

    def read(self, state: Mapping[str, ort.OrtValue]) -> Arrays:
        """The sums as arrays."""
        return {name: value.numpy() for name, value in state.items()}

    def _sum(self, site: Site, shape: Shape, gradients: Sequence[Gradients], loss: Gradients | None) -> ir.Value:
        """Return the sums of one site; gives the centred activations."""
        build, float32, rank = self._build, int(ir.DataType.FLOAT), len(shape)
        places = math.prod(int(d or 1) for a, d in enumerate(shape) if a not in (0, site.axis))
        tensor = self._values[site.tensor]
        if self._dtype(site.tensor) != ir.DataType.FLOAT:
            tensor = build.op("Cast", tensor, to=float32)
        centre = self._input(f"{PREFIX}centre:{site.tensor}", 1)
        trailing = rank - 1 - site.axis
        shaped = build.op("Reshape", centre, build.integers([site.size] + [1] * trailing)) if trailing else centre
        centred = build.op("Sub", tensor, shaped)
        positions = [a for a in range(rank) if a != site.axis]
        count = build.op("Div", build.op("Size", tensor), build.integers(site.size))
        zero, infinity, one = np.float32(0), np.float32(np.inf), (site.size,)
        self._output(site.tensor, "count", count, (), np.int64(0))
        self._output(site.tensor, "sum", self._total(centred, positions), one, zero)
        if self._measure.covariance:
            rows = self._rows(centred, site, rank)
            self._output(site.tensor, "products", self._products(rows), (site.size, site.size), zero)
            if self._measure.shared and places > 1:
                others = self._rows(self._rolled(centred), site, rank)
                self._output(site.tensor, "shared", self._products(rows, others), (site.size, site.size), zero)
        else:
            self._output(
                site.tensor, "squares", build.reduce("ReduceSumSquare", centred, positions, keepdims=False), one, zero
            )
        if self._measure.extremes:
            self._output(site.tensor, "low", build.reduce("ReduceMin", tensor, positions, keepdims=False), one, infinity)
            self._output(site.tensor, "high", build.reduce("ReduceMax", tensor, positions, keepdims=False), one, -infinity)
        if site.tensor not in self.differentiated:
            return centred
        slopes = [gradient.values[site.tensor] for gradient in gradients]
        s1 = self._stacked([self._over_positions(slope, site, rank) for slope in slopes])
        s2 = self._stacked([self._over_positions(build.op("Mul", slope, centred), site, rank) for slope in slopes])
        # One product of ones with all three side by side: many small nodes would cost more than their work.
        squares = [build.op("Mul", a, b) for a, b in ((s1, s1), (s1, s2), (s2, s2))]
        sums = self._total(build.op("Concat", *squares, axis=1), [0])
        self._output(site.tensor, "curvature", sums, (3 * site.size,), zero)
        if self._measure.second:
            rows = self._stacked([self._rows(slope, site, rank) for slope in slopes])
            self._output(site.tensor, "second", self._products(rows), (site.size, site.size), zero)
        if loss is not None and site.tensor in loss.values:
            slope = loss.values[site.tensor]
            weighted = build.op("Mul", slope, centred)
            self._output(site.tensor, "g1", self._total(slope, positions), one, zero)
            self._output(site.tensor, "g2", self._total(weighted, positions), one, zero)
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
        self._output(name, "windows", count, (), np.int64(0))
        square = (window.features, window.features)
        self._output(name, "window", self._products(rows), square, np.float32(0))
        if self._measure.shared:
            others = build.op("Reshape", self._rolled(seen), flat)
            self._output(name, "between", self._products(rows, others), square, np.float32(0))

    def _channel_major(self, site: Site, reader: Reader) -> ir.Value:
        """[samples, channels · places]: the input of a product less the site's centre."""
        build = self._build
        linear = reader.signature.linear
        assert linear is not None
        source = reader.node.inputs[linear.data]
        assert source is not None
        value = build.op("Cast", self._values[source.name or ""], to=int(ir.DataType.FLOAT))
        centre = next(v for v in self._graph.inputs if v.name == f"{PREFIX}centre:{site.tensor}")
        centred = build.op("Sub", value, build.op("Gather", centre, build.integers(reader.index.tolist()), axis=0))
        order = np.argsort(reader.index, kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return centred
        return build.op("Gather", centred, build.integers(order.tolist()), axis=1)

    def _rows(self, value: ir.Value, site: Site, rank: int) -> ir.Value:
        """[observations, channels]."""
        if site.axis != rank - 1:
            value = self._build.op("Transpose", value, perm=[a for a in range(rank) if a != site.axis] + [site.axis])
        return value if rank == 2 else self._build.op("Reshape", value, self._build.integers([-1, site.size]))

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

    def _total(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """[channels]: sum over `axes`. Down the rows of a matrix, a product with ones is several times faster."""
        build = self._build
        if list(axes) != [0]:
            return build.reduce("ReduceSum", value, axes, keepdims=False)
        rows = build.op("Gather", build.op("Shape", value), build.integers([0]), axis=0)
        ones = build.op(
            "Expand", build.constant(np.ones((1, 1)), np.float32), build.op("Concat", build.integers([1]), rows, axis=0)
        )
        return build.op("Reshape", build.op("MatMul", ones, value), build.integers([-1]))

    def _stacked(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The matrices below each other."""
        return parts[0] if len(parts) == 1 else self._build.op("Concat", *parts, axis=0)

    def _over_positions(self, value: ir.Value, site: Site, rank: int) -> ir.Value:
        """[samples, channels]: sum over the axes that are neither."""
        axes = [a for a in range(1, rank) if a != site.axis]
        return self._build.reduce("ReduceSum", value, axes, keepdims=False) if axes else value


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


def centre_feed(centres: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
    """Inputs that hold the centres, by tensor."""
    return {f"{PREFIX}centre:{tensor}": centre for tensor, centre in centres.items()}
