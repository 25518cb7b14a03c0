"""Laws of the operator table: every declared operator is run, and what it does is what its axis signature says.

`EXAMPLES` enumerates the branches of each declaration; the laws are written once and hold for every example, in
onnxruntime and in onnx's reference evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mscompile.network.scm import infer_shapes
from mscompile.operators import DIALECT, OPERATORS, OUT, Move, NodeView, Port, Signature, declared, signature
from mscompile.operators.axes import Barrier

Array = np.ndarray[Any, Any]
Arrays = list[Array | None]

ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
"""Sums of some dozen float32 products of numbers around 1, taken in another order."""
LOUD = 50.0
"""Far outside the data: a channel that can reach an output element does so, through a maximum and a minimum as well."""
IR_VERSION = 10
MICROSOFT = "com.microsoft"
OPSET = 21

# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """An input: its shape, whether it is computed (else a parameter), and how its values are drawn."""

    shape: tuple[int, ...]
    live: bool = True
    dtype: str = "float32"
    low: float = -2.0
    high: float = 2.0
    given: tuple[float, ...] | None = None

    def draw(self, rng: np.random.Generator) -> Array:
        if self.given is not None:
            return np.array(self.given, dtype=self.dtype).reshape(self.shape)
        if self.dtype == "bool":
            return rng.random(self.shape) < 0.5
        return rng.uniform(self.low, self.high, self.shape).astype(self.dtype)


def x(*shape: int, **how: Any) -> Operand:
    """Computed tensor."""
    return Operand(shape, **how)


def w(*shape: int, **how: Any) -> Operand:
    """Parameter."""
    return Operand(shape, live=False, **how)


def ints(*values: int) -> Operand:
    """Integer parameter with these values."""
    return Operand((len(values),), live=False, dtype="int64", given=values)


def switch(value: float, dtype: str = "float32", *, live: bool = False) -> Operand:
    """Scalar with this value."""
    return Operand((), live=live, dtype=dtype, given=(value,))


@dataclass(frozen=True)
class Example:
    """A node: operator, operands (None where absent), attributes, opset."""

    op: str
    operands: tuple[Operand | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    opset: int
    outputs: int = 1
    domain: str = ""

    def __str__(self) -> str:
        shapes = ",".join("-" if o is None else ("" if o.live else "w") + "x".join(map(str, o.shape)) for o in self.operands)
        given = [o.given for o in self.operands if o is not None and o.given]
        attributes = ",".join(f"{k}={v}".replace(" ", "") for k, v in self.attributes)
        return f"{self.domain}{self.op}({shapes}){given or ''}{attributes}@{self.opset}".replace(" ", "")

    def view(self, batch: str | None = None) -> NodeView:
        """The node as declarations see it; the sample axis is named `batch` if that is given."""
        size = next((o.shape[0] for o in self.operands if o is not None and o.live and o.shape), None)
        inputs, stored = [], []
        for i, operand in enumerate(self.operands):
            if operand is None:
                continue
            if operand.live:
                shape: list[Any] = list(operand.shape)
                if batch is not None and shape and shape[0] == size > 1:
                    shape[0] = batch
                kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(operand.dtype))
                inputs.append(onnx.helper.make_tensor_value_info(f"i{i}", kind, shape))
            else:
                stored.append(onnx.numpy_helper.from_array(operand.draw(np.random.default_rng(i)), f"i{i}"))
        model = ir.from_proto(_model(self, dict(self.attributes), inputs, stored))
        return NodeView(model.graph[0], infer_shapes(model), self.opset)

    @cached_property
    def declared(self) -> Signature | str:
        return signature(self.view())

    @property
    def signature(self) -> Signature:
        assert isinstance(self.declared, Signature), self.declared
        return self.declared

    def draw(self, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        return [None if o is None else o.draw(rng) for o in self.operands]


def ex(
    op: str, *operands: Operand | None, opset: int = OPSET, outputs: int = 1, domain: str = "", **attributes: Any
) -> Example:
    given = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in attributes.items())
    return Example(op, operands, given, opset, outputs, domain)


def _model(example: Example, attributes: Mapping[str, Any], inputs: Sequence[Any], stored: Sequence[Any]) -> onnx.ModelProto:
    names = ["" if o is None else f"i{i}" for i, o in enumerate(example.operands)]
    node = onnx.helper.make_node(
        example.op, names, [f"o{i}" for i in range(example.outputs)], domain=example.domain, **attributes
    )
    kind = attributes.get("to", onnx.TensorProto.FLOAT)
    outs = [onnx.helper.make_tensor_value_info(name, kind, None) for name in node.output]
    graph = onnx.helper.make_graph([node], "g", inputs, outs, stored)
    opsets = [onnx.helper.make_opsetid("", example.opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


@cache
def _loaded(example: Example, attributes: tuple[tuple[str, Any], ...], runtime: type) -> Any:
    """The node with every operand as a graph input of free size; onnxruntime asks how many sizes Resize is given."""
    inputs = [
        onnx.helper.make_tensor_value_info(
            f"i{i}",
            onnx.helper.np_dtype_to_tensor_dtype(np.dtype(o.dtype)),
            o.shape if example.op == "Resize" and o.given is not None else [None] * len(o.shape),
        )
        for i, o in enumerate(example.operands)
        if o is not None
    ]
    model = _model(example, dict(attributes), inputs, ())
    if runtime is onnx.reference.ReferenceEvaluator:
        return runtime(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return runtime(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


REFERENCE_GAPS: Mapping[str, Callable[[Example], bool]] = {
    "BatchNormalization": lambda e: e.opset < 14,  # takes batch statistics
    # Adds the wrong bias in all groups but the first.
    "ConvTranspose": lambda e: (
        "output_shape" in dict(e.attributes) or ("group" in dict(e.attributes) and len(e.operands) > 2)
    ),
    "GlobalMaxPool": lambda e: len(e.operands[0].shape) == 3,  # drops the position axis
    "LogSoftmax": lambda e: e.opset < 13,  # normalises over one axis, as from opset 13 on
    "Pad": lambda e: any(n < 0 for n in e.operands[1].given) if len(e.operands) > 1 else False,  # cannot take away
    "Mean": lambda e: len(e.operands) == 2 and e.operands[0].shape != e.operands[1].shape,  # adds in place
    "Softmax": lambda e: e.opset < 13,
}
"""Examples that the reference evaluator cannot run, or computes otherwise than the standard says."""


def outputs(example: Example, arrays: Arrays, **changed: Any) -> list[Array]:
    """Outputs of the node in onnxruntime, after the reference evaluator has agreed with it."""
    feed = {f"i{i}": a for i, a in enumerate(arrays) if a is not None}
    attributes = tuple((dict(example.attributes) | changed).items())
    found: list[Array] = _loaded(example, attributes, ort.InferenceSession).run(None, feed)
    if not example.domain and not REFERENCE_GAPS.get(example.op, lambda _: False)(example):
        wanted = _loaded(example, attributes, onnx.reference.ReferenceEvaluator).run(None, feed)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, **ROUNDING)
    return found


def run(example: Example, arrays: Arrays, **changed: Any) -> Array:
    """The first output."""
    return outputs(example, arrays, **changed)[0]


_PLAIN = """Relu LeakyRelu ThresholdedRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Mish Tanh Softplus Softsign
Gelu Erf Exp Abs Neg Sign Floor Ceil Round Sin Cos Tan Atan Sinh Cosh Asinh Identity"""
_POSITIVE = "Log Sqrt Reciprocal"
_VARIADIC = "Min Max Mean Sum"
_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp"


def _broadcasts(op: str) -> Iterator[Example]:
    how = {"low": 0.5} if op in ("Div", "Pow") else {}
    yield ex(op, x(2, 3, 4, **how), x(2, 3, 4, **how))
    yield ex(op, x(2, 3, 4, **how), w(3, 1, **how))
    yield ex(op, w(4, **how), x(2, 3, 4, **how))
    yield ex(op, x(2, 3, 1, **how), x(2, 1, 4, **how))
    yield ex(op, x(2, 3, 4, **how), w(**how))
    yield ex(op, x(2, 3, **how), w(5, 1, 1, **how))
    yield ex(op, x(2, 1, **how), w(5, **how))
    yield ex(op, x(2, 3, 4, **how), w(3, 4, **how), opset=11)


def _reductions(op: str) -> Iterator[Example]:
    how = {"low": 0.5}
    old = 11 if op == "ReduceSum" else 13
    for keepdims in (0, 1):
        yield ex(op, x(2, 3, 4, 5, **how), opset=old, axes=[2, 3], keepdims=keepdims)
        yield ex(op, x(2, 3, 4, 5, **how), ints(-1, 2), keepdims=keepdims)
        yield ex(op, x(2, 3, 4, **how), ints(1), keepdims=keepdims)
    yield ex(op, x(2, 3, 4, **how), ints(-1))
    yield ex(op, x(2, 3, 4, **how), opset=old, axes=[-2])
    yield ex(op, x(2, 3, 4, **how))
    yield ex(op, x(2, 3, 4, **how), opset=old)
    if op in ("ReduceMean", "ReduceSum"):
        yield ex(op, x(2, 3, 4, **how), noop_with_empty_axes=1)
        yield ex(op, x(2, 3, 4, **how), ints(1), noop_with_empty_axes=1)


def _pools(op: str) -> Iterator[Example]:
    yield ex(op, x(2, 3, 6, 6), kernel_shape=[2, 2])
    yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2])
    yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    yield ex(op, x(2, 3, 6, 6), kernel_shape=[2, 2], pads=[0, 1, 1, 0], strides=[2, 2])
    yield ex(op, x(2, 3, 5, 5), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    yield ex(op, x(2, 3, 5, 5), kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2])
    yield ex(op, x(2, 3, 5, 5), kernel_shape=[3, 3], auto_pad="VALID")
    yield ex(op, x(2, 3, 7), kernel_shape=[3])
    yield ex(op, x(2, 3, 7, 7), kernel_shape=[2, 2], dilations=[2, 3])
    if op == "AveragePool":
        yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], count_include_pad=1)
        yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
        yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], pads=[0, 1, 0, 0], count_include_pad=1, opset=13)
        yield ex(op, x(2, 3, 6, 6), kernel_shape=[3, 3], auto_pad="SAME_LOWER", count_include_pad=1)


def _convolutions() -> Iterator[Example]:
    c, b = (x(2, 3, 6, 6), w(4, 3, 3, 3)), w(4)
    yield ex("Conv", *c, b)
    yield ex("Conv", *c, opset=11)
    yield ex("Conv", *c, b, pads=[1, 1, 1, 1])
    yield ex("Conv", *c, pads=[0, 1, 0, 0])
    yield ex("Conv", *c, b, strides=[2, 1])
    yield ex("Conv", *c, b, strides=[2, 2], pads=[1, 0, 2, 1])
    yield ex("Conv", *c, b, dilations=[2, 1])
    yield ex("Conv", *c, b, dilations=[2, 2], pads=[2, 2, 2, 2])
    yield ex("Conv", *c, b, auto_pad="SAME_UPPER", strides=[2, 2])
    yield ex("Conv", *c, auto_pad="SAME_LOWER")
    yield ex("Conv", *c, b, auto_pad="VALID", kernel_shape=[3, 3])
    yield ex("Conv", x(2, 3, 7), w(4, 3, 3), b, group=1)
    yield ex("Conv", x(2, 3, 4, 4, 4), w(2, 3, 2, 2, 2), w(2))
    yield ex("Conv", x(2, 1, 6, 6), w(4, 1, 3, 3), b)
    yield ex("Conv", x(2, 1, 6, 6), w(1, 1, 3, 3), pads=[1, 1, 1, 1], group=1)
    yield ex("Conv", x(2, 3, 6, 6), x(4, 3, 3, 3), b)
    yield ex("Conv", x(2, 3, 6, 6), w(4, 3, 3, 3), x(4))
    d = (x(2, 3, 6, 6), w(3, 1, 3, 3))
    yield ex("Conv", *d, group=3)
    yield ex("Conv", *d, w(3), group=3, strides=[2, 2])
    yield ex("Conv", *d, w(3), group=3, pads=[1, 1, 1, 1])
    yield ex("Conv", *d, group=3, auto_pad="SAME_UPPER")
    yield ex("Conv", *d, group=3, auto_pad="VALID", dilations=[2, 1])
    yield ex("Conv", x(2, 3, 6, 6), w(6, 1, 3, 3), w(6), group=3)
    yield ex("Conv", x(2, 3, 7), w(9, 1, 3), group=3, pads=[1, 1])
    yield ex("Conv", x(2, 4, 6, 6), w(6, 2, 3, 3), w(6), group=2)
    yield ex("Conv", x(2, 6, 6, 6), w(6, 2, 3, 3), group=3, pads=[1, 1, 1, 1])
    yield ex("Conv", x(2, 6, 7), w(4, 3, 3), w(4), group=2, strides=[2])
    t, b = (x(2, 3, 4, 4), w(3, 5, 3, 3)), w(5)
    yield ex("ConvTranspose", *t, b)
    yield ex("ConvTranspose", *t, opset=11)
    yield ex("ConvTranspose", *t, b, strides=[2, 2])
    yield ex("ConvTranspose", *t, b, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    yield ex("ConvTranspose", *t, pads=[0, 1, 0, 0])
    yield ex("ConvTranspose", *t, b, dilations=[2, 1])
    yield ex("ConvTranspose", x(2, 3, 5), w(3, 2, 3), strides=[2])
    yield ex("ConvTranspose", *t, b, auto_pad="SAME_UPPER", strides=[2, 2])
    yield ex("ConvTranspose", *t, strides=[2, 2], output_shape=[8, 8])
    yield ex("ConvTranspose", x(2, 3, 4, 4), w(3, 1, 3, 3), w(3), group=3)
    yield ex("ConvTranspose", x(2, 3, 4, 4), w(3, 1, 3, 3), group=3, strides=[2, 2])


def _products() -> Iterator[Example]:
    for a in (0, 1):
        for b in (0, 1):
            left, right = (4, 2) if a else (2, 4), (5, 4) if b else (4, 5)
            yield ex("Gemm", x(*left), w(*right), w(5), transA=a, transB=b)
            yield ex("Gemm", x(*left), w(*right), transA=a, transB=b, alpha=0.5, beta=3.0)
            yield ex("Gemm", w(*left), x(*right), w(2, 1), transA=a, transB=b)
    for bias in (w(5), w(1, 5), w(), w(1), w(2, 5), w(2, 1), w(1, 1), x(5), x(2, 5)):
        yield ex("Gemm", x(2, 4), w(4, 5), bias)
        yield ex("Gemm", x(2, 4), w(5, 4), bias, transB=1, alpha=0.5, beta=-2.0)
    yield ex("Gemm", x(2, 4), w(4, 5), w(5), beta=0.0)
    yield ex("Gemm", x(2, 4), w(4, 5), beta=0.0)
    yield ex("Gemm", x(2, 4), w(4, 1), w(1))
    yield ex("Gemm", x(2, 1), w(1, 5), w(5))
    yield ex("Gemm", x(2, 4), x(4, 5), opset=11)
    yield ex("MatMul", x(2, 4), w(4, 5))
    yield ex("MatMul", x(2, 3, 4), w(4, 5))
    yield ex("MatMul", x(2, 3, 6, 4), w(4, 5), opset=11)
    yield ex("MatMul", w(5, 3), x(3, 2))
    yield ex("MatMul", w(5, 3), x(2, 3, 4))
    yield ex("MatMul", x(2, 3, 4), w(2, 4, 5))
    yield ex("MatMul", x(2, 3, 4), w(1, 4, 5))
    yield ex("MatMul", x(1, 3, 4), w(2, 4, 5))
    yield ex("MatMul", x(3, 4), w(2, 4, 5))
    yield ex("MatMul", w(2, 5, 3), x(2, 3, 4))
    yield ex("MatMul", x(2, 3, 4), x(2, 4, 3))
    yield ex("MatMul", x(2, 5, 3, 4), x(5, 4, 3))
    yield ex("MatMul", x(2, 1, 3, 4), x(5, 4, 3))


def _normalisations() -> Iterator[Example]:
    for op in ("Softmax", "LogSoftmax"):
        yield ex(op, x(2, 3, 4))
        yield ex(op, x(2, 3, 4), axis=1)
        yield ex(op, x(2, 3, 4), axis=-3, opset=13)
        yield ex(op, x(2, 3, 4), opset=12)
        yield ex(op, x(2, 3, 4), axis=2, opset=12)
        yield ex(op, x(2, 3, 4), axis=-1, opset=11)
    scales = [((4,), {}), ((3, 4), {"axis": 1}), ((3, 4), {}), ((3, 1), {}), ((2, 1, 4), {}), ((1, 3, 1), {})]
    for op, opset, biased in (("LayerNormalization", 17, 1), ("LayerNormalization", 21, 0), ("RMSNormalization", 23, 0)):
        for shape, attributes in scales:
            yield ex(op, x(2, 3, 4), *(w(*shape) for _ in range(1 + biased)), opset=opset, **attributes)
    for shape in ((2, 3), (2, 3, 5), (2, 3, 4, 5)):
        for opset in (9, 14, 15):
            yield ex("BatchNormalization", x(*shape), w(3), w(3), w(3), w(3, low=0.5), opset=opset)
    yield ex("BatchNormalization", x(2, 3, 4), w(3), w(3), w(3), w(3, low=0.5), epsilon=0.1, training_mode=0)
    yield ex("InstanceNormalization", x(2, 3, 5), w(3), w(3))
    yield ex("InstanceNormalization", x(2, 3, 4, 4), w(3), w(3), epsilon=0.1)
    yield ex("GroupNormalization", x(2, 6, 4), w(6), w(6), num_groups=3)
    yield ex("GroupNormalization", x(2, 3, 4), w(3), w(3), num_groups=3)


CAUTIOUS = [
    ex("Conv", x(2, 3, 6, 6), w(4, 3, 1, 1), w(4)),
    ex("ConvTranspose", x(2, 3, 5), w(3, 2, 2), strides=[2]),
    ex("AveragePool", x(2, 3, 5, 5), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, count_include_pad=1),
]
"""Declared with more caution than is needed: where each position has a tap of its own, nothing mixes and no border shows;
and windows that hang over the edge count no zeros, as they did in older runtimes.
"""


def _fused() -> Iterator[Example]:
    """What onnxruntime's optimiser writes."""
    of = {"domain": MICROSOFT}
    yield from (ex(op, x(2, 3, 4), **of) for op in ("Gelu", "QuickGelu", "FastGelu"))
    yield from (ex(op, x(2, 3, 4), w(4), **of) for op in ("BiasGelu", "FastGelu"))
    for a in (0, 1):
        for b in (0, 1):
            left, right = (2, 4, 3) if a else (2, 3, 4), (5, 4) if b else (4, 5)
            yield ex("FusedMatMul", x(*left), w(*right), transA=a, transB=b, alpha=0.5, **of)
            yield ex("FusedMatMul", x(*left), x(2, *right), transA=a, transB=b, **of)
    yield ex("SkipLayerNormalization", x(2, 3, 4), x(2, 3, 4), w(4), w(4), w(4), epsilon=0.1, **of)


def _attentions() -> Iterator[Example]:
    q, k, v, kind = (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {"scale": 0.5, "opset": 23}
    yield ex("Attention", x(*q), x(*k), x(*v), **kind)
    yield ex("Attention", x(*q), x(*k), x(*v), w(3, 5), **kind)
    packed = {"q_num_heads": 2, "kv_num_heads": 2, **kind}
    yield ex("Attention", x(2, 3, 8), x(2, 5, 8), x(2, 5, 12), **packed)
    for mask in (x(2, 2, 3, 5), x(2, 1, 3, 5), x(3, 5, dtype="bool"), w(2, 3, 5)):
        yield ex("Attention", x(*q), x(*k), x(*v), mask, **kind)
    yield ex("Attention", x(*q), x(*k), x(*v), *[None] * 3, counts(2, 5), **(kind | {"opset": 24}))
    yield ex("Attention", x(2, 4, 3, 4), x(*k), x(*v), **kind)  # two heads of queries for each of keys
    yield ex("Attention", x(2, 6, 3, 4), x(*k), x(*v), x(2, 6, 3, 5), **kind)
    yield ex("Attention", x(2, 3, 16), x(2, 5, 8), x(2, 5, 12), **(packed | {"q_num_heads": 4}))
    fused = {"num_heads": 2, "scale": 0.5, "domain": MICROSOFT}
    operands = (x(2, 3, 8), x(2, 5, 8), x(2, 5, 12))
    yield ex("MultiHeadAttention", *operands, **fused)
    for mask in (counts(2, 5, dtype="int32"), flags(2, 5), flags(2, 3, 5)):
        yield ex("MultiHeadAttention", *operands, None, mask, **fused)
    yield ex("MultiHeadAttention", *operands, None, None, x(2, 2, 3, 5), **fused)
    yield ex("MultiHeadAttention", *operands, None, flags(2, 5), w(1, 2, 3, 5), **fused)


def counts(*values: int, dtype: str = "int64") -> Operand:
    """How many there are, a number per sample."""
    return Operand((len(values),), dtype=dtype, given=values)


def flags(*shape: int) -> Operand:
    """Which of them count: of the last axis the first three, or all."""
    ones = np.ones(shape, dtype=np.int32)
    ones.reshape(-1, shape[-1])[::2, 3:] = 0
    return Operand(shape, dtype="int32", given=tuple(ones.ravel().tolist()))


def _by_place() -> Iterator[Example]:
    """Attention in which what a query sees depends on the number of its place."""
    operands, kind = (x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 6)), {"scale": 0.5, "opset": 23}
    yield ex("Attention", *operands, is_causal=1, **kind)
    fused = {"num_heads": 2, "scale": 0.5, "unidirectional": 1, "domain": MICROSOFT}
    yield ex("MultiHeadAttention", x(2, 5, 8), x(2, 5, 8), x(2, 5, 12), **fused)
    grouped = {"kv_num_heads": 2, "scale": 0.5, "domain": MICROSOFT}
    ends = (counts(4, 4, dtype="int32"), switch(5, "int32"))
    for heads in (2, 4):
        operands = (x(2, 5, 16 * heads), x(2, 5, 32), x(2, 5, 32), None, None, *ends)
        yield ex("GroupQueryAttention", *operands, num_heads=heads, **grouped)
    yield ex("GroupQueryAttention", *operands, *[None] * 3, x(2, 1, 5, 5), num_heads=4, **grouped)


BY_PLACE = [*_by_place()]


def _movements() -> Iterator[Example]:
    yield ex("Transpose", x(2, 3, 4))
    yield ex("Transpose", x(2, 3, 4, 5), perm=[0, 2, 3, 1])
    for axis in (0, 1, 2, 3, -1):
        yield ex("Flatten", x(2, 3, 4, 5), axis=axis)
    yield ex("Flatten", x(2, 3, 1, 1))
    yield ex("Flatten", x(2, 3))
    yield ex("Squeeze", x(2, 3, 1, 1), opset=11, axes=[2, -1])
    yield ex("Squeeze", x(2, 3, 1, 1), ints(3))
    yield ex("Unsqueeze", x(2, 3), opset=11, axes=[0, 2])
    yield ex("Unsqueeze", x(2, 3), ints(-1, 1))
    for target in (
        (0, -1),
        (2, -1),
        (-1, 24),
        (2, 24),
        (0, 0, 4, 2),
        (0, 3, 8),
        (2, 3, -1),
        (-1, 3, 4, 2),
        (0, -1, 8),
        (0, 12, 2),
        (6, 8),
        (2, 3, 1, 4, 2),
        (1, 2, 3, 8),
        (2, 4, 3, 2),
        (0, 2, 0, -1),
        (-1,),
    ):
        yield ex("Reshape", x(2, 3, 4, 2), ints(*target))
    yield ex("Reshape", x(2, 3, 4, 2), ints(2, 3, 8), allowzero=1)
    yield ex("Reshape", x(2, 3, 4, 2), ints(0, -1), opset=13)
    yield ex("Reshape", x(2, 12), ints(0, 3, 4))
    yield ex("Reshape", x(2, 1, 3), ints(2, 3, 1))
    yield ex("Reshape", x(6, 3), ints(-1, 2, 3))
    yield ex("Expand", x(2, 3, 1), ints(2, 3, 4))
    yield ex("Expand", x(2, 3, 4), ints(1, 3, 1))
    yield ex("Expand", x(3, 1), ints(2, 3, 4))
    yield ex("Tile", x(2, 3, 4), ints(1, 1, 2))
    yield ex("Tile", x(2, 3), ints(1, 2))
    for mode in ("DCR", "CRD"):
        yield ex("DepthToSpace", x(2, 12, 2, 3), blocksize=2, mode=mode)
    yield ex("SpaceToDepth", x(2, 3, 4, 6), blocksize=2)
    yield ex("SpaceToDepth", x(2, 3, 4, 6), blocksize=2, mode="CRD", opset=28)


def _selections() -> Iterator[Example]:
    yield ex("Concat", x(2, 3, 4), x(2, 5, 4), axis=1)
    yield ex("Concat", x(2, 3, 4), w(2, 3, 2), x(2, 3, 1), axis=-1)
    yield ex("Concat", x(2, 3, 4), axis=1)
    yield ex("Split", x(2, 6, 3), ints(2, 4), axis=1, outputs=2)
    yield ex("Split", x(2, 6, 3), axis=1, outputs=2, num_outputs=2)
    yield ex("Split", x(2, 5, 3), axis=1, outputs=2, num_outputs=2)
    yield ex("Split", x(2, 6, 3), axis=1, outputs=3, opset=11)
    yield ex("Split", x(2, 6, 3), axis=-2, outputs=2, split=[2, 4], opset=11)
    yield ex("Slice", x(2, 6, 4), ints(1), ints(5), ints(1))
    yield ex("Slice", x(2, 6, 4), ints(-3, 0), ints(2**62, 2), ints(1, 2))
    yield ex("Slice", x(2, 6, 4), ints(0), ints(6), ints(1), ints(1))
    yield ex("Slice", x(2, 6, 4), ints(0, 1, 0), ints(2, 3, 4))
    yield ex("Slice", x(2, 6, 4), starts=[1], ends=[-1], axes=[1], opset=9)
    yield ex("Gather", x(2, 6, 4), ints(4, 0, 3), axis=1)
    yield ex("Gather", x(2, 6, 4), ints(-1, 2), axis=1)
    yield ex("Gather", x(2, 6, 4), switch(2, "int64"), axis=1)
    yield ex("Gather", w(7, 3), Operand((2, 4), dtype="int64", low=0, high=7), axis=0)
    yield ex("Pad", x(2, 3, 4), ints(0, 0, 1, 0, 0, 2))
    yield ex("Pad", x(2, 3, 4), ints(1, 2), None, ints(2), mode="edge")
    yield ex("Pad", x(2, 3, 4), ints(0, 0, 0, 0, 0, 0))
    yield ex("Pad", x(2, 3, 4), ints(0, 2, 0, 0, 1, 0), switch(3.0))
    yield ex("Pad", x(2, 3, 4), ints(0, -1, 0, 0, 1, 0))
    yield ex("Pad", x(2, 3, 4), pads=[0, 0, 1, 0, 0, 2], opset=2)
    two = w(4, given=(1.0, 1.0, 2.0, 2.0))
    yield ex("Resize", x(2, 3, 4, 4), None, two)
    yield ex("Resize", x(2, 3, 4, 4), None, two, mode="linear", coordinate_transformation_mode="asymmetric")
    yield ex("Resize", x(2, 3, 4, 4), None, None, ints(2, 3, 8, 6), mode="nearest")
    yield ex("Upsample", x(2, 3, 4, 4), two, opset=9)


EXAMPLES = [
    *(ex(op, x(2, 3, 4)) for op in _PLAIN.split()),
    *(ex(op, x(2, 3, 4, low=0.5)) for op in _POSITIVE.split()),
    *(ex(op, x(2, 3, 4, low=-0.6, high=0.6)) for op in ("Asin", "Acos", "Atanh")),
    ex("Acosh", x(2, 3, 4, low=1.5, high=3.0)),
    ex("LeakyRelu", x(2, 3), alpha=0.3, opset=11),
    ex("Gelu", x(2, 3), approximate="tanh"),
    ex("Swish", x(2, 3, 4), opset=24),
    ex("Clip", x(2, 3, 4), switch(-1.0), switch(1.0)),
    ex("Clip", x(2, 3, 4), None, switch(1.0), opset=11),
    ex("Clip", x(2, 3, 4), switch(-1.0, live=True)),
    ex("Clip", x(2, 3, 4), min=0.0, max=1.0, opset=7),
    ex("Cast", x(2, 3, 4), to=onnx.TensorProto.INT32),
    ex("Cast", x(2, 3, 4), to=onnx.TensorProto.DOUBLE, opset=13),
    ex("Dropout", x(2, 3, 4), opset=7),
    ex("Dropout", x(2, 3, 4), opset=11, ratio=0.9),
    ex("Dropout", x(2, 3, 4), switch(0.9)),
    ex("Dropout", x(2, 3, 4), switch(0.9), switch(0, "bool")),
    *(e for op in ("Add", "Sub", "Mul", "Div", "Pow", *_VARIADIC.split()) for e in _broadcasts(op)),
    *(ex(op, x(2, 3, 4), w(3, 1), x(2, 1, 4)) for op in _VARIADIC.split()),
    *(ex(op, x(2, 3, 4)) for op in _VARIADIC.split()),
    ex("PRelu", x(2, 3, 4), w(3, 1)),
    ex("PRelu", x(2, 3, 4), w(1)),
    ex("PRelu", x(2, 3), w(3), opset=11),
    ex("PRelu", x(2, 3, 4), w(1, 3, 1)),
    ex("PRelu", x(2, 3, 4), x(2, 3, 4)),
    ex("Where", x(2, 3, 4, dtype="bool"), x(2, 3, 4), x(2, 3, 4)),
    ex("Where", w(3, 1, dtype="bool"), x(2, 3, 4), w(4)),
    ex("Where", x(2, 1, 4, dtype="bool"), x(2, 3, 1), switch(0.0)),
    *(e for op in _REDUCTIONS.split() for e in _reductions(op)),
    *(e for op in ("MaxPool", "AveragePool") for e in _pools(op)),
    *(ex(op, x(2, 3, *spatial)) for op in ("GlobalMaxPool", "GlobalAveragePool") for spatial in ((4,), (4, 5))),
    *_convolutions(),
    *_products(),
    *_normalisations(),
    *_movements(),
    *_fused(),
    *_attentions(),
    *BY_PLACE,
    *_selections(),
    *CAUTIOUS,
]

_HEADS = {"num_heads": 2, "kv_num_heads": 2, "scale": 1.0}

REFUSED = [
    (
        ex("Attention", x(2, 2, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), opset=23),
        "scales its scores by their width, which is not stated",
    ),
    (
        ex("Attention", x(2, 2, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), scale=1.0, softcap=2.0, opset=23),
        "caps its scores",
    ),
    (
        ex("Attention", x(2, 3, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), scale=1.0, opset=23),
        "has heads of queries that share no whole number of heads of keys",
    ),
    (
        ex("Attention", x(2, 2, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), None, x(2, 2, 1, 4), x(2, 2, 1, 4), opset=23),
        "keeps keys and values, or returns scores",
    ),
    *(
        (ex("MultiHeadAttention", x(2, 3, 8), *operands, num_heads=2, scale=1.0, domain=MICROSOFT), reason)
        for operands, reason in [
            ((), "has operands that are packed together, or of unknown rank"),
            ((x(2, 3, 8), x(2, 3, 8), x(24)), "adds a bias that is computed"),
            ((x(2, 3, 8), x(2, 3, 8), None, counts(*[3] * 8)), "has a mask that says more than how many keys there are"),
            ((x(2, 3, 8), x(2, 3, 8), None, None, None, x(2, 2, 1, 4)), "keeps keys and values, or returns scores"),
        ]
    ),
    *(
        (ex("GroupQueryAttention", *(x(2, 3, 16) for _ in range(3)), *more, domain=MICROSOFT, **_HEADS, **how), reason)
        for more, how, reason in [
            ((None, None, counts(2, 2)), {"do_rotary": 1}, "rotates queries and keys"),
            ((x(2, 2, 1, 8), x(2, 2, 1, 8)), {}, "keeps keys and values, or returns scores"),
            ((), {"softcap": 1.0}, "caps or normalises more than its scores"),
            ((*[None] * 8, w(2)), {}, "caps or normalises more than its scores"),
        ]
    ),
    *(
        (ex("Attention", x(2, 3, 4), *more, domain=MICROSOFT, num_heads=2, **how), reason)
        for more, how, reason in [
            ((w(4, 12), w(12)), {"do_rotary": 1}, "rotates queries and keys"),
            ((w(4, 12), w(12), None, x(2, 2, 2, 1, 2)), {}, "keeps keys and values"),
            ((x(4, 12), w(12)), {}, "packs projections whose weight or bias is computed"),
            ((w(4, 13),), {}, "packs projections that its heads do not fill"),
            ((w(4, 12), w(12), counts(*[3] * 4)), {}, "has a mask that says more than which keys there are"),
            ((w(4, 12), w(12)), {}, "packs projections, heads and softmax into one operator"),
        ]
    ),
    (ex("Dropout", x(2, 3), switch(0.5), switch(1, "bool")), "may be in training mode"),
    (ex("Dropout", x(2, 3), switch(0.5), switch(0, "bool", live=True)), "may be in training mode"),
    (ex("BatchNormalization", x(2, 3), w(3), w(3), w(3), w(3, low=0.5), training_mode=1), "is in training mode"),
    (ex("BatchNormalization", x(2), w(1), w(1), w(1), w(1, low=0.5)), "its input has no channel axis"),
    (ex("ReduceMean", x(2, 3), Operand((1,), dtype="int64")), "its axes are computed"),
    (ex("Reshape", x(2, 3), Operand((2,), dtype="int64")), "computes its target shape"),
    (
        ex("ConvTranspose", x(2, 4, 5, 5), w(4, 3, 3, 3), group=2),
        "is a transposed convolution in groups of several channels",
    ),
    (ex("MatMul", x(2, 3, 4), w(4)), "its operands are not matrices of known rank"),
    (ex("Squeeze", x(2, 3, 1, 1)), "squeezes every axis of size 1, whichever these are"),
    (ex("LRN", x(2, 3, 4, 4), size=3), "has no declaration"),
]

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)


def examples(select: Callable[[Signature], object]) -> pytest.MarkDecorator:
    """The examples whose signature has something; there must be some."""
    found = [e for e in EXAMPLES if isinstance(e.declared, Signature) and select(e.declared)]
    assert found
    return pytest.mark.parametrize("example", found, ids=str)


def test_every_operator_has_examples():
    # The compiler's own operators are none of a runtime: they are tested with the passes.
    channels = {
        (row.domain, row.name)
        for row in OPERATORS.values()
        if row.domain != DIALECT and not isinstance(row.declare, Barrier)
    }
    assert {(e.domain, e.op) for e in EXAMPLES} == channels - {("", "Shape")}  # whose output holds no channels


@pytest.mark.parametrize(("example", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, Example) else "")
def test_refusals_say_why(example: Example, reason: str):
    assert example.declared == reason


def test_operators_of_other_domains_are_not_taken_for_standard_ones():
    node = ir.node("Relu", [ir.Value(name="a")], domain="com.example")
    assert signature(NodeView(node, {"a": (2, 3)}, OPSET)) == "has no declaration (domain com.example)"


@pytest.mark.parametrize("operator", sorted({e.op for e in EXAMPLES} - {"ConvTranspose"}))
def test_unknown_shapes_make_a_barrier(operator: str):
    # A transposed convolution has its channels on the same axes whatever its rank.
    values = [ir.Value(name=f"i{i}") for i in range(5)]
    found = signature(NodeView(ir.node(operator, values), {}, OPSET))
    assert isinstance(found, str)


# --- the laws ---------------------------------------------------------------------------------------------------------


def inputs_of(link: Sequence[Port]) -> list[Port]:
    return [port for port in link if port[0] >= 0]


def outputs_of(link: Sequence[Port]) -> list[Port]:
    return [port for port in link if port[0] < 0]


def output_axis(link: Sequence[Port]) -> int | None:
    return next((axis for operand, axis in link if operand == OUT), None)


def places_of(move: Move, size: int) -> Array:
    """Where the channels of a move go, on an axis of this size."""
    return np.arange(size) if move.at is None else move.at


def across(array: Array, axis: int) -> Array:
    """[channels, everything else]."""
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(len(moved), -1)


def put(array: Array, axis: int, channel: int | Array, value: Any) -> Array:
    """Copy with one channel set, or several."""
    changed = array.copy()
    np.moveaxis(changed, axis, 0)[channel] = value
    return changed


@every_example
def test_ports_are_axes_that_run_in_step(example: Example):
    arrays, found = example.draw(0), example.signature
    shapes = {i: a.shape for i, a in enumerate(arrays) if a is not None}
    shapes |= {~i: out.shape for i, out in enumerate(outputs(example, arrays))}
    for link in found.links:
        # The weight of a linear operator in groups holds the channels of one group.
        share = found.linear.groups if found.linear and output_axis(link) is None else 1
        met = {port: times for port, _, times in found.repeated}
        sizes = {
            shapes[o][a] * (share if found.linear and o == found.linear.weight else 1) * met.get((o, a), 1) for o, a in link
        }
        assert len(sizes) == 1
    taken: dict[Port, list[int]] = {}
    for move in found.moves:
        places = places_of(move, shapes[move.target[0]][move.target[1]])
        assert move.index.shape[-1] == len(places)
        assert shapes[move.source[0]][move.source[1]] > move.index.max()
        if move.at is None and len([m for m in found.moves if m.target == move.target]) > 1:
            assert places.tolist() == [*range(shapes[move.target[0]][move.target[1]])]  # operands that meet there
            continue
        taken.setdefault(move.target, []).extend(places.tolist())
    for (operand, axis), places in taken.items():
        assert len(set(places)) == len(places)
        assert set(places) == {*range(shapes[operand][axis])} or example.op == "Pad"
    for regroup in found.regroups:
        assert tuple(shapes[0][a] for a in regroup.source) == regroup.source_sizes
        assert tuple(shapes[OUT][a] for a in regroup.target) == regroup.target_sizes
    for (operand, axis), count in (*found.ties, *found.even):
        assert shapes[operand][axis] % count == 0
    ports = [port for link in found.links for port in link]
    assert len(ports) == len(set(ports))
    assert not set(ports) & ({m.source for m in found.moves} | {p.source for p in found.picks})


def tied(found: Signature, link: Sequence[Port], size: int) -> Array:
    """[channels of a link]: the block of each, of those that live and die together."""
    count = next((count for port, count in found.ties if port in link), size)
    return np.arange(size) // (size // count)


@every_example
def test_a_channel_reaches_its_own_channel_only(example: Example):
    """Or, where channels live and die together, those of its block."""
    arrays, others = example.draw(1), example.draw(2)
    before = outputs(example, arrays)
    for link in example.signature.links:
        ports, outs = inputs_of(link), outputs_of(link)
        size = before[~outs[0][0]].shape[outs[0][1]] if outs else 1
        if not ports or size == 1:
            continue
        block, reached = tied(example.signature, link, size), []
        for channel in range(size):
            changed = list(arrays)
            for operand, a in ports:
                changed[operand] = put(changed[operand], a, channel, np.take(others[operand], channel, axis=a))
            after = outputs(example, changed)
            differs = np.any([across(after[~o] != before[~o], a).any(axis=1) for o, a in outs], axis=0)
            assert not differs[block != block[channel]].any(), f"channel {channel} of {link}"
            reached.append(differs[channel])
        assert any(reached), f"{link} carries nothing"


@examples(lambda s: s.moves or s.picks)
def test_a_moved_channel_reaches_its_places_only(example: Example):
    arrays, others, found = example.draw(1), example.draw(2), example.signature
    before = outputs(example, arrays)
    for operand, axis in {*(m.source for m in found.moves), *(p.source for p in found.picks)}:
        for channel in range(arrays[operand].shape[axis]):
            changed = list(arrays)
            changed[operand] = put(changed[operand], axis, channel, np.take(others[operand], channel, axis=axis))
            after = outputs(example, changed)
            for move in found.moves:
                if move.source == (operand, axis):
                    out, along = move.target
                    differs = across(after[~out] != before[~out], along).any(axis=1)
                    places = places_of(move, len(differs))
                    wanted = places[(np.atleast_2d(move.index) == channel).any(axis=0)]
                    np.testing.assert_array_equal(np.flatnonzero(differs), np.sort(wanted))
            for pick in found.picks:
                if pick.source == (operand, axis):
                    assert (after[0] != before[0]).any() == (channel == pick.index)


Alive = dict[Port, Array]


def selections(example: Example, arrays: Arrays, whole: Sequence[Array]) -> Iterator[Alive]:
    """Ways to keep some channels: of a link, or of an axis whose channels move and whatever runs in step with them."""
    found = example.signature

    def some(block: Array) -> Iterator[Array]:
        yield block != block.max()
        yield block == block.max()

    for link in found.links:
        outs = outputs_of(link)
        size = whole[~outs[0][0]].shape[outs[0][1]] if outs and inputs_of(link) else 1
        if size > 1 and not any(move.target in link for move in found.moves) and found.together is None:
            block = tied(found, link, size)
            for count in (count for port, count in found.even if port in link):  # as many go from every block
                block = np.arange(size) % (size // count)
            for stay in some(block):
                yield dict.fromkeys(link, stay)
    if found.together is not None:  # half of every block at once
        yield {
            (o, a): np.arange(n) % (n // c) < found.together
            for (o, a), c in found.even
            for n in [_size(arrays, whole, o, a)]
        }
    for operand, axis in dict.fromkeys(m.source for m in found.moves if found.together is None):
        moves = [m for m in found.moves if m.source == (operand, axis)]
        block = np.arange(arrays[operand].shape[axis])
        for move in moves:
            for together in move.index.T if move.index.ndim > 1 else ():
                block[together] = block[together].min()
        for count in (count for port, count in found.even if port == (operand, axis)):
            block %= len(block) // count
        for stay in some(block) if block.max() > 0 else ():
            alive = {(operand, axis): stay}
            # What meets these channels goes as well.
            alive |= {m.source: stay for m in found.moves if m.at is None and m.target in {own.target for own in moves}}
            for move in moves:
                out, along = move.target
                size = whole[~out].shape[along]
                there = np.ones(size, dtype=bool)
                there[places_of(move, size)] = stay[np.atleast_2d(move.index)[0]]
                alive |= dict.fromkeys(next((li for li in found.links if move.target in li), (move.target,)), there)
            yield alive


def _size(arrays: Arrays, whole: Sequence[Array], operand: int, axis: int) -> int:
    return (arrays[operand] if operand >= 0 else whole[~operand]).shape[axis]


def cut(example: Example, arrays: Arrays, alive: Alive) -> tuple[Arrays, dict[str, Any]]:
    """Operands and attributes with only the channels that are alive; sizes speak of those."""
    changed, held = list(arrays), {}
    for (operand, axis), stay in alive.items():
        if operand >= 0:
            changed[operand] = np.compress(stay, changed[operand], axis=axis)
    for size in example.signature.sizes:
        if size.port not in alive:
            continue
        stay, holder = alive[size.port], size.holder
        given = arrays[holder] if isinstance(holder, int) else dict(example.attributes)[holder]
        numbers = held.setdefault(holder, np.array(given))
        if size.meaning == "width":
            numbers[size.position if size.position is not None else ...] = stay.sum() // size.share
        elif size.meaning == "bound":
            numbers[size.position] = stay[: int(numbers[size.position])].sum()
        else:
            left = [c for c in (numbers % len(stay)).tolist() if stay[c]]
            held[holder] = np.array([stay[:c].sum() for c in left], dtype=np.int64)
    for holder, numbers in held.items():
        if isinstance(holder, int):
            changed[holder] = numbers
    return changed, {h: _hashable(n) for h, n in held.items() if isinstance(h, str)}


def _hashable(numbers: Array) -> Any:
    return tuple(numbers.tolist()) if numbers.ndim else int(numbers)


@every_example
def test_selecting_channels_selects_them_in_the_output(example: Example):
    arrays, together = example.draw(3), example.signature.together
    if together is not None:  # queries of zeros read no keys, so that these may go with what passes
        (count,) = (count for port, count in example.signature.even if port == (0, 2))
        arrays[0] = arrays[0] * (np.arange(arrays[0].shape[2]) % (arrays[0].shape[2] // count) < together)
    whole = outputs(example, arrays)
    for alive in selections(example, arrays, whole):
        changed, attributes = cut(example, arrays, alive)
        if any(a is not None and not a.size for a in changed):
            continue
        for i, found in enumerate(outputs(example, changed, **attributes)):
            wanted = whole[i]
            for (operand, axis), stay in alive.items():
                wanted = np.compress(stay, wanted, axis=axis) if operand == ~i else wanted
            np.testing.assert_allclose(found, wanted, **ROUNDING)


@examples(lambda s: s.scaled)
def test_an_output_is_proportional_to_what_scales_it(example: Example):
    arrays = example.draw(4)
    for operand in example.signature.scaled:
        tripled = [np.array(3 * a, a.dtype) if i == operand and a is not None else a for i, a in enumerate(arrays)]
        np.testing.assert_allclose(run(example, tripled), 3 * run(example, arrays), **ROUNDING)


@examples(lambda s: s.centred)
def test_a_constant_is_centred_to_what_zeros_are(example: Example):
    arrays = example.draw(4)
    flat = [np.full_like(arrays[0], level) for level in (0.0, 1.0, -8.0)]
    wanted, *found = (run(example, [array, *arrays[1:]]) for array in flat)
    for one in found:
        np.testing.assert_allclose(one, wanted, **ROUNDING)


@examples(lambda s: s.levels is not None)
def test_levels_do_not_matter(example: Example):
    arrays, axis = example.draw(4), example.signature.levels
    level = np.take(example.draw(5)[0], [0], axis=axis)
    np.testing.assert_allclose(run(example, [arrays[0] + level, *arrays[1:]]), run(example, arrays), **ROUNDING)


@examples(lambda s: s.moving)
def test_movement_keeps_every_value(example: Example):
    arrays = example.draw(5)
    assert arrays[0] is not None
    arrays[0] = np.arange(arrays[0].size, dtype=np.float32).reshape(arrays[0].shape)
    np.testing.assert_array_equal(np.sort(run(example, arrays), axis=None), arrays[0].ravel())


@examples(lambda s: s.copies)
def test_copies_hold_elements_of_the_first_operand(example: Example):
    arrays = example.draw(5)
    for found in outputs(example, arrays):
        assert np.isin(found, arrays[0]).all()


@examples(lambda s: s.additive)
def test_additive_operators_add(example: Example):
    arrays = example.draw(6)
    signs = [1, -1] if example.op == "Sub" else [1] * len(arrays)
    total = sum(sign * a for sign, a in zip(signs, arrays, strict=True) if a is not None)
    np.testing.assert_allclose(run(example, arrays), total, **ROUNDING)


@examples(lambda s: any(output_axis(link) is None for link in s.links))
def test_a_channel_with_zero_weights_is_not_read(example: Example):
    arrays = example.draw(7)
    for link in example.signature.links:
        if output_axis(link) is not None:
            continue
        blocks = dict(example.signature.even)  # one channel of a group goes from all
        each = min(arrays[operand].shape[axis] // blocks.get((operand, axis), 1) for operand, axis in link)
        for channel in range(each):
            results = []
            at = {operand: np.arange(channel, arrays[operand].shape[axis], each) for operand, axis in link}
            for operand, axis in link:
                zeroed = list(arrays)
                zeroed[operand] = put(zeroed[operand], axis, at[operand], 0.0)
                results.append(run(example, zeroed))
            gone = list(arrays)
            for operand, axis in link:
                gone[operand] = np.delete(gone[operand], at[operand], axis=axis)
            if all(a is None or a.size for a in gone) and example.signature.together is None:
                results.append(run(example, gone))
            for other in results[1:]:
                np.testing.assert_allclose(other, results[0], **ROUNDING)


def created(found: Signature) -> tuple[int, int]:
    """Weight axis and output axis of the channels that a linear operator creates."""
    (link,) = [li for li in found.links if found.linear.weight in dict(li) and OUT in dict(li)]
    return dict(link)[found.linear.weight], dict(link)[OUT]


def linear_operands(example: Example, seed: int) -> tuple[Arrays, Array, Array]:
    """Operands with any bias zero, the data, and the weight."""
    linear, arrays = example.signature.linear, example.draw(seed)
    arrays = [a if a is None or i in (linear.data, linear.weight) else np.zeros_like(a) for i, a in enumerate(arrays)]
    return arrays, arrays[linear.data], arrays[linear.weight]


@examples(lambda s: s.linear)
def test_linear_operators_are_linear_in_data_and_weight(example: Example):
    linear = example.signature.linear
    arrays, data, weight = linear_operands(example, 8)
    _, other_data, other_weight = linear_operands(example, 9)
    for operand, one, other in ((linear.data, data, other_data), (linear.weight, weight, other_weight)):

        def at(array: Array, operand: int = operand) -> Array:
            return run(example, [array if i == operand else a for i, a in enumerate(arrays)])

        np.testing.assert_allclose(at(one + 2 * other), at(one) + 2 * at(other), **ROUNDING)


@examples(lambda s: s.linear)
def test_the_response_to_a_constant_channel_is_a_bias_unless_there_is_a_border(example: Example):
    found = example.signature
    arrays, data, weight = linear_operands(example, 10)
    weight_axis, out_axis = created(found)
    (read,) = [dict(link) for link in found.links if found.linear.data in dict(link) and OUT not in dict(link)]
    for channel in range(data.shape[read[found.linear.data]]):
        arrays[found.linear.data] = put(np.zeros_like(data), read[found.linear.data], channel, 1.0)
        response = across(run(example, arrays), out_axis)
        taps = np.moveaxis(weight, (weight_axis, read[found.linear.weight]), (0, 1))
        group, column = divmod(channel, taps.shape[1])
        own = np.arange(len(taps)) // (len(taps) // found.linear.groups) == group
        wanted = found.linear.gain * own[:, None] * taps[:, column].reshape(len(taps), -1).sum(axis=1, keepdims=True)
        even = np.allclose(response, wanted, **ROUNDING)
        assert even != found.linear.border or (even and example in CAUTIOUS)


@examples(lambda s: s.linear and s.linear.bias is not None)
def test_a_bias_adds_to_the_created_channels(example: Example):
    found = example.signature
    arrays, _, weight = linear_operands(example, 11)
    weight_axis, out_axis = created(found)
    before = run(example, arrays)
    operand, size = found.linear.bias, weight.shape[weight_axis]
    vector = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    absent = operand >= len(arrays) or arrays[operand] is None
    arrays = [*arrays, None][: max(len(arrays), operand + 1)]
    arrays[operand] = vector if absent else vector.reshape(arrays[operand].shape)
    biased = ex(example.op, *example.operands[:operand], w(*arrays[operand].shape), opset=example.opset)
    biased = Example(biased.op, biased.operands, example.attributes, biased.opset)
    shift = across(run(biased, arrays) - before, out_axis)
    wanted = found.linear.bias_gain * vector[:, None]
    np.testing.assert_allclose(shift, np.broadcast_to(wanted, shift.shape), **ROUNDING)


@every_example
def test_constants_stay_constant_unless_guarded(example: Example):
    """Operands that vary along one axis only give an output that varies along it only, unless the signature denies it.

    What is put side by side varies alike, as do channels that make up one channel of the output or live and die together.
    """
    found = example.signature
    guarded = not found.steady or (found.linear is not None and found.linear.border)
    beside = len({move.source for move in found.moves}) > len({move.target for move in found.moves})
    uneven = []
    for ports, outs, block in _flows(example):
        if not any(example.operands[operand].live for operand in ports):
            continue
        rng, arrays = np.random.default_rng(12), []
        for i, operand in enumerate(example.operands):
            if operand is None or operand.given is not None:
                arrays.append(None if operand is None else operand.draw(rng))
                continue
            # Multiples of 1/8 are added and averaged without rounding.
            count = operand.shape[ports[i]] if i in ports else 1
            drawn = (np.random.default_rng(12) if beside else rng).integers(
                max(1, 8 * operand.low), 8 * operand.high + 1, count
            )
            levels = drawn[block] / 8 if i in ports else drawn / 8
            shape = [-1 if a == ports.get(i) else 1 for a in range(len(operand.shape))]
            arrays.append(np.array(np.broadcast_to(levels.reshape(shape), operand.shape), dtype=operand.dtype))
        results = outputs(example, arrays)
        for operand, axis in outs:
            out = across(results[~operand].astype(np.float64), axis)
            uneven.append(not np.allclose(out, out[:, :1], **ROUNDING))
    assert any(uneven) == guarded or (guarded and example in CAUTIOUS)


def _flows(example: Example) -> Iterator[tuple[dict[int, int], list[Port], Array]]:
    """Axes that channels take through a node: by operand, of outputs, and the block of channels each one belongs to."""
    found, arrays = example.signature, example.draw(0)
    for link in found.links:
        ports = dict(inputs_of(link))
        if ports and outputs_of(link):
            (size,) = {arrays[operand].shape[axis] for operand, axis in ports.items()}
            yield ports, outputs_of(link), tied(found, link, size)
    for operand, axis in dict.fromkeys(m.source for m in found.moves):
        moves = [m for m in found.moves if m.source == (operand, axis)]
        block = np.arange(arrays[operand].shape[axis])
        for move in moves:
            for together in move.index.T if move.index.ndim > 1 else ():
                block[together] = block[together].min()
        if len({m.target for m in found.moves}) == len({m.source for m in found.moves}):
            yield {operand: axis}, [m.target for m in moves], block


@every_example
def test_axes_that_nothing_is_said_of_are_barriers(example: Example):
    """Two channels of such an axis, or a contracted one, meet in one element; or no output has an axis in step with it."""
    found, arrays = example.signature, example.draw(13)
    passing = {p for link in found.links if output_axis(link) is not None for p in link} | {m.source for m in found.moves}
    passing |= {(0, axis) for regroup in found.regroups for axis in regroup.source} | {p.source for p in found.picks}
    before = outputs(example, arrays)
    for i, operand in enumerate(example.operands):
        if operand is None or not operand.live or found.moving:
            continue
        for axis, size in enumerate(operand.shape):
            if (i, axis) in passing or size == 1:
                continue
            reach = []
            for channel in range(size):
                changed = [put(arrays[i], axis, channel, np.array(v, operand.dtype)) for v in (LOUD, 1 / LOUD, -LOUD)]
                outs = [outputs(example, [c if k == i else a for k, a in enumerate(arrays)]) for c in changed]
                reach.append([np.any([out[o] != before[o] for out in outs], axis=0) for o in range(len(before))])
            mixed = any((one[o] & other[o]).any() for one, other in combinations(reach, 2) for o in range(len(before)))
            apart = not any(_in_step([r[o] for r in reach]) for o in range(len(before)))
            cautious = (example in CAUTIOUS and axis > 1) or (example in BY_PLACE and i == 0)
            assert mixed or apart or cautious, f"operand {i}, axis {axis}"


def _in_step(reach: Sequence[Array]) -> bool:
    """Whether each channel reaches the channel of its number, and no other, on some axis of an output."""
    own = np.eye(len(reach), dtype=bool)
    return any(
        size == len(reach) and np.array_equal([across(r, axis).any(axis=1) for r in reach], own)
        for axis, size in enumerate(reach[0].shape)
    )


def _sized(example: Example) -> bool:
    """Whether the node has a sample axis, and no other axis of its output depends on that one's size."""
    view = example.view(batch="N")
    out = view.shape(OUT)
    return any("N" in s for s in view.shapes.values()) and out is not None and all(isinstance(d, int) for d in out[1:])


@pytest.mark.parametrize("example", [*filter(_sized, EXAMPLES)], ids=str)
def test_a_sample_axis_of_any_size_changes_no_other_link(example: Example):
    """Links between axes other than the sample axis are found as well where its size is but a name."""
    fixed, free = example.signature, signature(example.view(batch="N"))
    assert isinstance(free, Signature)
    at_samples = {(i, 0) for i, o in enumerate(example.operands) if o is not None and o.live}
    kept = {link for link in fixed.links if not at_samples & set(link)}
    assert kept <= set(free.links)
    assert (free.steady, free.linear, free.moving) == (fixed.steady, fixed.linear, fixed.moving)


def _counted(example: Example) -> bool:
    """Whether multiply-accumulates are declared, and the example says how many zeros it pads with."""
    attributes = dict(example.attributes)
    padded = "output_shape" in attributes or attributes.get("auto_pad", "VALID") != "VALID"
    return declared(example.view().node).macs is not None and not padded


@pytest.mark.parametrize("example", [*filter(_counted, EXAMPLES)], ids=str)
def test_products_of_ones_sum_to_their_multiply_accumulates(example: Example):
    attributes = dict(example.attributes)
    arrays = [None if a is None else np.full_like(a, i < 2) for i, a in enumerate(example.draw(0))]
    unpadded = {}
    if "pads" in attributes:
        unpadded["pads"] = tuple(0 for _ in attributes["pads"])
        if example.op == "Conv":  # zeros in the padding are multiplied as well; a transposed one pads its output
            ends = np.reshape(attributes["pads"], (2, -1)).T.tolist()
            arrays[0] = np.pad(arrays[0], [(0, 0), (0, 0), *ends], constant_values=1.0)
    if "output_padding" in attributes:
        unpadded["output_padding"] = tuple(0 for _ in attributes["output_padding"])
    gain = example.signature.linear.gain if example.signature.linear else 1.0
    view = example.view()
    assert run(example, arrays, **unpadded).sum() == gain * declared(view.node).macs(view)
