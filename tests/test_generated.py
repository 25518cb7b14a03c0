"""Generated networks under random plans: the compiled graph is the dense one under the plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from golden import KINDS, canonical, inputs, plan_for, run
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mscompile.errors import MscompileError
from mscompile.intake.samples import Samples
from mscompile.network.scm import read_scm
from mscompile.operators import Signature
from mscompile.options import Options
from mscompile.pipeline import Compilation, compile_model
from mscompile.planning.plan import selectable
from mscompile.planning.weights import exact_plan
from mscompile.rewrite import rewrite
from mscompile.verification.verify import FOLD_TOLERANCE, fold_error, make_pair

EXAMPLES = 150
WHOLE = 10
"""Examples that go through the whole pipeline, which takes longer."""
PROVED = 60
"""Examples with units that the weights alone prove to be constant, copies or unread."""
ROWS = 80
"""Samples for these: calibration, choice and verification share them."""
REFUSALS = (4, 5, 6)
"""Exit codes of networks that nothing can be cut from, or that are so flat that rounding fills their spread."""
SAMPLES = 5
ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Softplus", "Abs")


@dataclass(frozen=True)
class Tensor:
    """A float tensor; its shape without the sample axis, channels first for maps and last for tokens."""

    name: str
    shape: tuple[int, ...]
    tokens: bool = False

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.tokens else self.shape[0]

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 3 and not self.tokens


@dataclass
class Network:
    """A graph that grows node by node, by choices that hypothesis draws and numbers that a seed gives."""

    draw: Callable[[st.SearchStrategy], object]
    rng: np.random.Generator
    mixed: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    count: itertools.count = field(default_factory=itertools.count)

    def choose(self, *options: object) -> object:
        return self.draw(st.sampled_from(options))

    def weight(self, *shape: int, positive: bool = False, share: bool = False) -> str:
        """A new parameter, or sometimes one of the same shape that is there already."""
        fits = [name for name, array in self.stored.items() if array.shape == shape and array.dtype == np.float32]
        if share and fits and self.choose(False, False, True):
            return str(self.choose(*fits))
        array = self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        return self.store(np.abs(array) + 0.5 if positive else array, np.float32)

    def store(self, array: object, dtype: type = np.int64) -> str:
        name = f"p{next(self.count)}"
        self.stored[name] = np.asarray(array, dtype=dtype)
        return name

    def bias(self, size: int) -> list[str]:
        return [self.weight(size, share=True)] if self.choose(True, False) else []

    def add(
        self, op: str, operands: list[str], shape: tuple[int, ...], *, tokens: bool = False, **attributes: object
    ) -> Tensor:
        tensor = Tensor(f"t{next(self.count)}", shape, tokens)
        self.nodes.append(helper.make_node(op, operands, [tensor.name], name=f"n{tensor.name}", **attributes))
        self.tensors.append(tensor)
        return tensor

    # -- steps: each takes a tensor and gives another --

    def activation(self, x: Tensor) -> Tensor:
        op = self.choose(*ACTIVATIONS, "Clip", "PRelu")
        if op == "Clip":
            return self.add(
                "Clip", [x.name, self.store(0.0, np.float32), self.store(2.0, np.float32)], x.shape, tokens=x.tokens
            )
        if op == "PRelu":
            slopes = (x.channels,) if x.tokens or len(x.shape) == 1 else (x.channels, 1, 1)
            return self.add("PRelu", [x.name, self.weight(*slopes)], x.shape, tokens=x.tokens)
        return self.add(str(op), [x.name], x.shape, tokens=x.tokens)

    def convolution(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        out, kernel = self.draw(st.integers(2, 6)), [self.draw(st.integers(1, 3)) for _ in range(2)]
        pads = [self.draw(st.integers(0, k - 1)) for k in kernel * 2]
        strides = [self.choose(1, 1, 2) for _ in kernel]
        dilations = [self.choose(1, 1, 2) for _ in kernel]
        sizes = [
            (size + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i, size in enumerate((height, width))
        ]
        if min(sizes) < 1:
            return x
        weights = [self.weight(out, channels, *kernel, share=True), *self.bias(out)]
        attributes = {"pads": pads, "strides": strides, "dilations": dilations}
        return self.add("Conv", [x.name, *weights], (out, *sizes), **attributes)

    def same_convolution(self, x: Tensor) -> Tensor:
        weights = [self.weight(x.channels, x.channels, 3, 3, share=True), *self.bias(x.channels)]
        return self.add("Conv", [x.name, *weights], x.shape, auto_pad=self.choose("SAME_UPPER", "SAME_LOWER"))

    def depthwise(self, x: Tensor) -> Tensor:
        pad = self.choose(0, 1)
        channels, height, width = x.shape
        if not pad and min(height, width) < 3:
            return x
        weights = [self.weight(channels, 1, 3, 3), *self.bias(channels)]
        shape = (channels, height - 2 + 2 * pad, width - 2 + 2 * pad)
        return self.add("Conv", [x.name, *weights], shape, group=channels, pads=[pad] * 4)

    def transposed(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        out = self.draw(st.integers(2, 5))
        weights = [self.weight(channels, out, 2, 2), *self.bias(out)]
        return self.add("ConvTranspose", [x.name, *weights], (out, 2 * height, 2 * width), strides=[2, 2])

    def normalisation(self, x: Tensor) -> Tensor:
        vectors = [self.weight(x.channels, positive=i == 3) for i in range(4)]
        op = self.choose("BatchNormalization", "InstanceNormalization")
        return self.add(str(op), [x.name, *vectors[: 4 if op == "BatchNormalization" else 2]], x.shape)

    def pool(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        op, pad = self.choose("MaxPool", "AveragePool"), self.choose(0, 1)
        if min(height, width) < 3:
            return x
        sizes = [(size + 2 * pad - 3) // 2 + 1 for size in (height, width)]
        counted = {"count_include_pad": self.choose(0, 1)} if op == "AveragePool" else {}
        attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [pad] * 4, **counted}
        return self.add(str(op), [x.name], (channels, *sizes), **attributes)

    def flat(self, x: Tensor) -> Tensor:
        size = int(np.prod(x.shape))
        if self.choose(True, False):
            return self.add("Flatten", [x.name], (size,))
        return self.add("Reshape", [x.name, self.store([0, self.choose(-1, size)])], (size,))

    def averaged(self, x: Tensor) -> Tensor:
        pooled = self.add("GlobalAveragePool", [x.name], (x.channels, 1, 1))
        return self.flat(pooled) if self.choose(True, False) else pooled

    def channels_last(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        if self.choose(True, False):
            return self.add("Transpose", [x.name], (height, width, channels), tokens=True, perm=[0, 2, 3, 1])
        target = [0, channels, self.choose(-1, height * width)]
        rows = self.add("Reshape", [x.name, self.store(target)], (channels, height * width), tokens=False)
        return self.add("Transpose", [rows.name], (height * width, channels), tokens=True, perm=[0, 2, 1])

    def channels_first(self, x: Tensor) -> Tensor:
        if len(x.shape) != 3:
            return x
        return self.add("Transpose", [x.name], (x.shape[2], *x.shape[:2]), perm=[0, 3, 1, 2])

    def product(self, x: Tensor) -> Tensor:
        out = self.draw(st.integers(2, 8))
        shape, weight = (*x.shape[:-1], out), self.weight(x.shape[-1], out, share=True)
        found = self.add("MatMul", [x.name, weight], shape, tokens=x.tokens)
        if self.choose(True, False):
            operands = [found.name, self.weight(out)]
            found = self.add("Add", operands[:: self.choose(1, -1)], shape, tokens=x.tokens)
        return found

    def gemm(self, x: Tensor) -> Tensor:
        out, turned = self.draw(st.integers(2, 8)), self.choose(0, 1)
        weight = self.weight(*((out, x.channels) if turned else (x.channels, out)), share=True)
        bias = self.choose([], [(out,)], [(1, out)], [()], [(1,)])
        scales = {"alpha": self.choose(1.0, 0.5), "beta": self.choose(1.0, -2.0, 0.0)} if self.choose(True, False) else {}
        operands = [x.name, weight, *(self.weight(*shape) for shape in bias)]
        return self.add("Gemm", operands, (out,), transB=turned, **scales)

    def normalised(self, x: Tensor) -> Tensor:
        op = self.choose("Softmax", "LayerNormalization")
        scale = [self.weight(x.channels)] if op == "LayerNormalization" else []
        return self.add(str(op), [x.name, *scale], x.shape, tokens=x.tokens, axis=-1)

    def joined(self, x: Tensor) -> Tensor:
        others = [x] + [t for t in self.tensors if t.shape == x.shape and t.tokens == x.tokens]
        other = self.choose(*others)
        return self.add(str(self.choose("Add", "Add", "Mul", "Sub", "Max")), [x.name, other.name], x.shape, tokens=x.tokens)

    def gated(self, x: Tensor) -> Tensor:
        pooled = self.add("GlobalAveragePool", [x.name], (x.channels, 1, 1))
        gate = self.add("Conv", [pooled.name, self.weight(x.channels, x.channels, 1, 1)], (x.channels, 1, 1))
        return self.add("Mul", [x.name, self.add("Sigmoid", [gate.name], gate.shape).name], x.shape)

    def residual(self, x: Tensor) -> Tensor:
        inner = self.step(self.step(x))
        if inner.is_map and x.is_map and inner.shape[1:] == x.shape[1:]:
            inner = self.add("Conv", [inner.name, self.weight(x.channels, inner.channels, 1, 1)], x.shape)
        elif inner.shape[:-1] == x.shape[:-1] and inner.tokens == x.tokens and not x.is_map:
            inner = self.add("MatMul", [inner.name, self.weight(inner.channels, x.channels)], x.shape, tokens=x.tokens)
        if inner.shape != x.shape or inner.tokens != x.tokens:
            return inner
        return self.add("Add", [inner.name, x.name], x.shape, tokens=x.tokens)

    # -- channels put side by side, parted, moved and regrouped --

    def along(self, x: Tensor) -> int:
        """The channel axis."""
        return len(x.shape) if x.tokens else 1

    def wide(self, x: Tensor, channels: int) -> tuple[int, ...]:
        """The shape with another number of channels."""
        return (*x.shape[:-1], channels) if x.tokens else (channels, *x.shape[1:])

    def beside(self, x: Tensor) -> Tensor:
        fits = [t for t in self.tensors if t.tokens == x.tokens and self.wide(t, 0) == self.wide(x, 0)]
        parts = [x, *(self.choose(x, *fits) for _ in range(self.choose(1, 1, 2)))]
        shape = self.wide(x, sum(t.channels for t in parts))
        return self.add("Concat", [t.name for t in parts], shape, tokens=x.tokens, axis=self.along(x))

    def parted(self, x: Tensor) -> Tensor:
        first = self.draw(st.integers(1, max(1, x.channels - 1)))
        if x.channels < 2:
            return x
        sizes = [first, x.channels - first]
        parts = [Tensor(f"t{next(self.count)}", self.wide(x, n), x.tokens) for n in sizes]
        operands, names = [x.name, self.store(sizes)], [part.name for part in parts]
        self.nodes.append(helper.make_node("Split", operands, names, name=f"n{names[0]}", axis=self.along(x)))
        self.tensors += parts
        if sizes[0] == sizes[1] and self.choose(True, False):
            return self.add(str(self.choose("Mul", "Add")), names, parts[0].shape, tokens=x.tokens)
        return self.choose(*parts)  # type: ignore[return-value]

    def sliced(self, x: Tensor) -> Tensor:
        start = self.draw(st.integers(0, x.channels - 1))
        end = self.draw(st.integers(start + 1, x.channels))
        ends = [self.store([n]) for n in (start, self.choose(end, end - x.channels or 2**62), self.along(x))]
        return self.add("Slice", [x.name, *ends], self.wide(x, end - start), tokens=x.tokens)

    def taken(self, x: Tensor) -> Tensor:
        places = self.draw(st.lists(st.integers(-x.channels, x.channels - 1), min_size=1, max_size=8))
        shape = self.wide(x, len(places))
        return self.add("Gather", [x.name, self.store(places)], shape, tokens=x.tokens, axis=self.along(x))

    def padded(self, x: Tensor) -> Tensor:
        low, high = (self.draw(st.integers(0, 2)) for _ in range(2))
        rank, axis = len(x.shape) + 1, self.along(x)
        pads = np.zeros(2 * rank, dtype=np.int64)
        pads[axis], pads[rank + axis] = low, high
        return self.add("Pad", [x.name, self.store(pads)], self.wide(x, x.channels + low + high), tokens=x.tokens)

    def grouped(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        groups = self.choose(*(g for g in range(1, channels + 1) if channels % g == 0))
        each, pad = self.draw(st.integers(1, 3)), self.choose(0, 0, 1)
        weights = [self.weight(groups * each, channels // groups, 1 + 2 * pad, 1 + 2 * pad), *self.bias(groups * each)]
        return self.add("Conv", [x.name, *weights], (groups * each, height, width), group=groups, pads=[pad] * 4)

    def shuffled(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        groups = self.choose(*(g for g in range(1, channels + 1) if channels % g == 0))
        rows = (groups, channels // groups, height, width)
        apart = self.add("Reshape", [x.name, self.store([0, *rows])], rows)
        turned = self.add("Transpose", [apart.name], (rows[1], rows[0], *rows[2:]), perm=[0, 2, 1, 3, 4])
        self.tensors = [t for t in self.tensors if t not in (apart, turned)]
        return self.add("Reshape", [turned.name, self.store([0, self.choose(-1, channels), height, width])], x.shape)

    def pixels(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        if channels % 4 == 0 and self.choose(True, False):
            shape = (channels // 4, 2 * height, 2 * width)
            return self.add("DepthToSpace", [x.name], shape, blocksize=2, mode=self.choose("DCR", "CRD"))
        if height % 2 == width % 2 == 0:
            return self.add("SpaceToDepth", [x.name], (4 * channels, height // 2, width // 2), blocksize=2)
        return x

    def normalised_by_group(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        groups = self.choose(*(g for g in range(1, channels + 1) if channels % g == 0))
        apart = self.add("Reshape", [x.name, self.store([0, groups, -1])], (groups, channels // groups * height * width))
        ones = [self.store(np.full(groups, v), np.float32) for v in (1.0, 0.0)]
        normal = self.add("InstanceNormalization", [apart.name, *ones], apart.shape)
        self.tensors = [t for t in self.tensors if t not in (apart, normal)]
        back = self.add("Reshape", [normal.name, self.store([0, channels, height, width])], x.shape)
        return self.add("Mul", [back.name, self.weight(channels, 1, 1)], x.shape)

    def enlarged(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape
        scales = self.store([1.0, 1.0, 2.0, 2.0], np.float32)
        return self.add(
            "Resize", [x.name, "", scales], (channels, 2 * height, 2 * width), mode=self.choose("nearest", "linear")
        )

    # -- transformers --

    def attention(self, x: Tensor) -> Tensor:
        if len(x.shape) != 2:
            return x
        length, width = x.shape
        heads, size, value = (self.draw(st.integers(1, 3)) for _ in range(3))
        shared = self.choose(1, heads)  # heads of keys and values

        def split(width_of_one: int, count: int, order: list[int], source: str | None = None) -> tuple[str, str]:
            if source is None:
                made = self.add(
                    "MatMul", [x.name, self.weight(width, count * width_of_one)], (length, count * width_of_one), tokens=True
                )
                source = made.name
                if self.choose(True, False):
                    source = self.add("Add", [source, self.weight(count * width_of_one)], made.shape, tokens=True).name
            rows = self.node("Reshape", [source, self.store([0, length, count, width_of_one])])
            return source, self.node("Transpose", [rows], perm=order)

        _, q = split(size, heads, [0, 2, 1, 3])
        made, k = split(size, shared, [0, 2, 3, 1])
        same = size == value and self.choose(True, False)
        _, v = split(value, shared, [0, 2, 1, 3], made if same else None)
        if self.choose(True, False):
            q = self.node("Mul", [q, self.weight(*self.choose((), (heads, 1, 1), (size,)))])
        scores = self.node("MatMul", [q, k])
        if self.choose(True, False):
            scores = self.node("Add", [scores, self.weight(*self.choose((length, length), (1, length), (heads, 1, 1)))])
        heads_out = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), v])
        turned = self.node("Transpose", [heads_out], perm=[0, 2, 1, 3])
        return self.add("Reshape", [turned, self.store([0, 0, heads * value])], (length, heads * value), tokens=True)

    def node(self, op: str, operands: list[str], **attributes: object) -> str:
        """A node whose output no other step starts from."""
        name = f"t{next(self.count)}"
        self.nodes.append(helper.make_node(op, operands, [name], name=f"n{name}", **attributes))
        return name

    def feed_forward(self, x: Tensor) -> Tensor:
        wide = self.draw(st.integers(2, 6))
        shape = (*x.shape[:-1], wide)
        gate, up = (self.add("MatMul", [x.name, self.weight(x.channels, wide)], shape, tokens=x.tokens) for _ in range(2))
        opened = self.add(
            "Mul", [gate.name, self.add("Sigmoid", [gate.name], shape, tokens=x.tokens).name], shape, tokens=x.tokens
        )
        return self.add("Mul", [opened.name, up.name], shape, tokens=x.tokens)

    def plain_steps(self, x: Tensor) -> list[Callable[[Tensor], Tensor]]:
        if x.is_map:
            return [
                *[self.convolution, self.same_convolution, self.activation] * 3,
                *[self.depthwise, self.transposed, self.normalisation, self.pool, self.flat, self.averaged],
                *[self.channels_last, self.joined, self.gated, self.residual],
            ]
        if x.tokens:
            products = [self.product, self.activation] * 3
            return [*products, self.channels_first, self.joined, self.normalised, self.residual]
        return [*[self.gemm, self.product, self.activation] * 3, self.joined, self.normalised, self.residual]

    def step(self, x: Tensor) -> Tensor:
        options = self.plain_steps(x)
        if self.mixed:
            options += [self.beside, self.parted, self.sliced, self.taken, self.padded]
            if x.is_map:
                options += [self.grouped, self.shuffled] * 2 + [self.pixels, self.normalised_by_group, self.enlarged]
            else:
                options += [self.feed_forward, *[self.attention] * 3 * x.tokens]
        found = self.draw(st.sampled_from(options))(x)
        return found if np.prod(found.shape) <= 600 else self.averaged(found) if found.is_map else x

    def output(self, x: Tensor) -> Tensor:
        """A head: mostly something that reads units, at times whatever is there."""
        if not self.choose(True, True, True, False):
            return x
        return self.convolution(x) if x.is_map else self.product(x)


@st.composite
def networks(draw: Callable[[st.SearchStrategy], object], *, mixed: bool = False) -> onnx.ModelProto:
    """A network of convolutions and products; `mixed`, of parts, groups, moved channels and attention as well."""
    network = Network(draw, np.random.default_rng(draw(st.integers(0, 2**16))), mixed)
    start = network.choose(
        Tensor("x", (3, 6, 6)), Tensor("x", (2, 5, 4)), Tensor("x", (4,)), Tensor("x", (3, 4), tokens=True)
    )
    tensors, wide = [start], network.choose(True, False)
    for _ in range(draw(st.integers(3, 9))):
        # Mostly on from the last tensor; at times a branch begins at an earlier one.
        tensors.append(network.step(tensors[-1] if network.choose(True, True, True, False) else network.choose(*tensors)))
    heads = {t.name: t for t in [network.output(tensors[-1]), *([network.output(network.choose(*tensors))] if wide else [])]}
    heads.pop("x", None)
    if not heads:
        last = network.product(network.flat(start))
        heads = {last.name: last}
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        network.nodes,
        "generated",
        [helper.make_tensor_value_info("x", float32, ["N", *start.shape])],
        [helper.make_tensor_value_info(t.name, float32, ["N", *t.shape]) for t in heads.values()],
        [numpy_helper.from_array(array, name) for name, array in network.stored.items()],
    )
    opset = helper.make_opsetid("", draw(st.sampled_from([17, 18, 20, 21])))
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    source=st.booleans().flatmap(lambda mixed: networks(mixed=mixed)),
    kind=st.sampled_from(KINDS),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**16),
)
def test_compiled_is_dense_under_the_plan(source: onnx.ModelProto, kind: str, share: float, seed: int):
    onnx.checker.check_model(source, full_check=True)
    dense = canonical(source)
    before = ir.to_proto(dense).SerializeToString(deterministic=True)
    plan = plan_for(dense, kind, np.random.default_rng(seed), lambda size: max(1, round(share * size)))
    compiled = rewrite(dense, plan)
    assert ir.to_proto(dense).SerializeToString(deterministic=True) == before
    proto = ir.to_proto(compiled.model)
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.graph.input, proto.graph.output) == (source.graph.input, source.graph.output)
    event(f"{len(plan.sites)} sites")
    if not plan.sites:
        return
    scm = read_scm(dense)
    pair = make_pair(scm, compiled.model, plan, compiled.alignment)
    samples = Samples(dict(inputs(dense, samples=SAMPLES, seed=seed)), None, "generated")
    assert fold_error(pair, plan, samples, SAMPLES) <= FOLD_TOLERANCE
    for site in plan.sites:
        left = compiled.alignment.get(site.tensor, np.arange(site.size))
        event("cut" if len(left) < site.size else "whole")
        units = scm.site(site.tensor).units
        # Rows that stay equally large, and parts of which one channel stays, may leave more.
        parted = any(isinstance(found, Signature) and found.moves for found in scm.signatures.values())
        if not parted and not any(np.isin(block.units, units).any() for block in scm.blocks):
            kept = {*units[site.kept].tolist()}
            assert len({*units[left].tolist()} - kept) <= 1, "more than a carrier was left"


@settings(max_examples=WHOLE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=networks(mixed=True), replacement=st.sampled_from(["affine", "constant"]), keep=st.sampled_from([0.4, 0.7]))
def test_the_whole_pipeline_on_generated_networks(source: onnx.ModelProto, replacement: str, keep: float):
    data = {"x": np.asarray(inputs(canonical(source), samples=ROWS, seed=1)["x"])}
    how = {"replacement": replacement, "samples": ROWS}
    whole = stage(source, data, Options(keep=1.0, **how))
    small = stage(source, data, Options(keep=keep, **how))
    for result in (whole, small):
        if result is None:
            continue
        proto = ir.to_proto(result.model)
        onnx.checker.check_model(proto, full_check=True)
        assert (proto.graph.input, proto.graph.output) == (source.graph.input, source.graph.output)
        again = stage(source, data, Options(keep=1.0 if result is whole else keep, **how))
        assert again is not None
        assert serialised(again.model) == proto.SerializeToString(deterministic=True)
    if whole is not None:
        for name, wanted in run(source, data).items():
            np.testing.assert_array_equal(run(ir.to_proto(whole.model), data)[name], wanted)
    if small is not None:
        event("compiled")
        kept = stage(ir.to_proto(small.model), data, Options(keep=1.0, **how))
        if kept is not None:
            assert serialised(kept.model) == serialised(small.model)
        assert small.report.fold_error <= FOLD_TOLERANCE
        assert untouched(canonical(source), {site.tensor for site in small.plan.sites}) <= parameters_of(small.model)


@settings(max_examples=PROVED, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(source=st.booleans().flatmap(lambda mixed: networks(mixed=mixed)), seed=st.integers(0, 2**16))
def test_what_weights_prove_is_all_done_at_once(source: onnx.ModelProto, seed: int):
    """A second run without data finds nothing, and brings what the first one made into no other form."""
    rng = np.random.default_rng(seed)
    for tensor in source.graph.initializer:  # rows and columns of zeros, and copies
        array = numpy_helper.to_array(tensor).copy()
        for axis in range(min(2, array.ndim) if array.dtype == np.float32 and array.size > 1 else 0):
            rows = np.moveaxis(array, axis, 0)
            one, other = rng.integers(0, len(rows), 2)
            rows[one] = rng.integers(0, 2) * rows[other]
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    dense = canonical(source)
    scm = read_scm(dense)
    plan = exact_plan(scm, selectable(scm), model_sha256="")
    event("proved" if plan.sites else "nothing to prove")
    compiled = rewrite(dense, plan).model
    before = serialised(compiled)
    again = canonical(ir.to_proto(compiled))
    assert serialised(again) == before
    scm = read_scm(again)
    assert exact_plan(scm, selectable(scm), model_sha256="").sites == ()


def serialised(source: ir.Model) -> bytes:
    return ir.to_proto(source).SerializeToString(deterministic=True)


def stage(source: onnx.ModelProto, data: Mapping[str, np.ndarray], options: Options) -> Compilation | None:
    try:
        return compile_model(source, data, None, options)
    except MscompileError as error:
        if error.exit_code not in REFUSALS:
            raise
        return None


def untouched(dense: ir.Model, planned: set[str]) -> set[tuple[str, bytes]]:
    """Name and content of parameters that neither units of the planned groups nor what reads these speak of."""
    scm = read_scm(dense)
    groups = {site.group for site in scm.sites if site.tensor in planned}
    cut = {unit for site in scm.sites if site.group in groups for unit in site.units.tolist()}
    near = {slot.node for slot in scm.slots if cut & set(slot.units.ravel().tolist())}
    near |= {reader.node for site in scm.sites if site.group in groups for reader in site.readers}
    near |= {slot.node for site in scm.sites if site.group in groups for p in site.pairings for slot in p.slots}
    near |= {use.node for node in near for out in node.outputs for use in out.uses()}  # additions behind them
    near |= {node for node, found in scm.signatures.items() if isinstance(found, Signature) and found.sizes}
    return {
        (name, value.const_value.tobytes())
        for name, value in dense.graph.initializers.items()
        if not {use.node for use in value.uses()} & near
    }


def parameters_of(compiled: ir.Model) -> set[tuple[str, bytes]]:
    return {(name, value.const_value.tobytes()) for name, value in compiled.graph.initializers.items()}
