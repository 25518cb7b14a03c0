"""Reverse mode: every rule against finite differences, whole networks against torch.

`EXAMPLES` enumerates the branches of each rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from mscompile.calibration.reverse import Gradients, differentiate, sample_shapes
from mscompile.network.scm import infer_shapes
from mscompile.operators import OPERATORS
from mscompile.operators.backward import Builder, nothing

Array = np.ndarray[Any, Any]

OPSETS = (9, 10, 11, 13, 16, 17, 18, 20, 25)
"""Those in which rules change, and the newest; every example is run in its own first one as well."""
FLOAT = object()
"""Stands for the element type that an example is run in, as value of an attribute."""

# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """An input: shape, whether its gradient is asked for, whether it is stored, and how its values are drawn."""

    shape: tuple[int, ...]
    wanted: bool = True
    stored: bool = False
    low: float = -2.0
    high: float = 2.0
    values: Array | None = None

    def draw(self, rng: np.random.Generator) -> Array:
        return rng.uniform(self.low, self.high, self.shape) if self.values is None else self.values


def x(*shape: int, **how: Any) -> Operand:
    """A tensor whose gradient is asked for."""
    return Operand(shape, **how)


def w(*shape: int, **how: Any) -> Operand:
    """A parameter."""
    return Operand(shape, wanted=False, stored=True, **how)


def const(values: Any, dtype: str = "int64") -> Operand:
    """A parameter with these values."""
    array = np.array(values, dtype=dtype)
    return Operand(array.shape, wanted=False, stored=True, values=array)


def live(values: Any, dtype: str = "int64", *, wanted: bool = False) -> Operand:
    """A computed tensor with these values."""
    array = np.array(values, dtype=dtype)
    return Operand(array.shape, wanted=wanted, values=array)


def spread(*shape: int) -> Operand:
    """A tensor whose values keep their order, and their side of any multiple of 0.25, when one of them moves by 0.1."""
    values = np.random.default_rng(1).permutation(int(np.prod(shape))).reshape(shape)
    return Operand(shape, values=(values - values.size // 2) * 0.25 + 0.125)


def ties(*shape: int) -> Operand:
    """A tensor with many equal values, all positive."""
    return Operand(shape, values=np.random.default_rng(2).integers(1, 4, shape).astype(np.float64))


@dataclass(frozen=True)
class Example:
    """A node: operator, operands (None where absent), attributes.

    Attributes
    ----------
    since, until
        First and last opset in which the node is valid and has a gradient.
    outputs, seeded
        Number of outputs, and those at which a gradient arrives.
    """

    op: str
    operands: tuple[Operand | None, ...]
    attributes: Mapping[str, Any]
    since: int
    until: int
    outputs: int
    seeded: tuple[int, ...]
    domain: str

    def __str__(self) -> str:
        shapes = ",".join("-" if o is None else "x".join(map(str, o.shape)) or "()" for o in self.operands)
        attributes = "".join(f",{k}={v}" for k, v in self.attributes.items())
        return f"{self.op}({shapes}{attributes})@{self.since}".replace(" ", "")

    @property
    def opsets(self) -> list[int]:
        return sorted({self.since, *(opset for opset in OPSETS if self.since <= opset <= self.until)})

    @property
    def wanted(self) -> list[int]:
        return [i for i, o in enumerate(self.operands) if o is not None and o.wanted]

    def draw(self, dtype: Any) -> dict[int, Array]:
        rng = np.random.default_rng(0)
        arrays = {i: o.draw(rng) for i, o in enumerate(self.operands) if o is not None}
        return {i: a.astype(dtype) if a.dtype.kind == "f" else a for i, a in arrays.items()}


def ex(
    op: str,
    *operands: Operand | None,
    since: int = 11,
    until: int = 99,
    outputs: int = 1,
    seeded: tuple[int, ...] = (0,),
    domain: str = "",
    **attributes: Any,
) -> Example:
    return Example(op, operands, attributes, since, until, outputs, seeded, domain)


_UNARY = "Sigmoid HardSigmoid Softplus Softsign Exp Abs Neg Sin Cos Identity Tanh Erf Relu Sinh Cosh Atan Asinh"
_IMAGE = x(2, 3, 6, 5)
EMBEDDED = live([[0, 6, 3], [1, 1, 5]], "int32"), None
"""Words, which have no gradient, and no segments."""

EXAMPLES = [
    # elementwise
    *(ex(op, x(3, 4), since=9) for op in _UNARY.split()),
    *(ex(op, x(3, 4, low=0.3), since=9) for op in ("Log", "Sqrt", "Reciprocal")),
    *(ex(op, x(3, 4, low=-0.6, high=0.6), since=9) for op in ("Tan", "Asin", "Acos", "Atanh")),
    ex("Acosh", x(3, 4, low=1.5), since=9),
    *(ex(op, spread(3, 4), since=9) for op in ("LeakyRelu", "ThresholdedRelu", "Elu", "Selu")),
    ex("LeakyRelu", spread(3, 4), since=9, alpha=0.3),
    ex("ThresholdedRelu", spread(3, 4), since=10, alpha=0.5),
    ex("Elu", spread(3, 4), since=9, alpha=0.5),
    ex("Selu", spread(3, 4), since=9, alpha=1.2, gamma=0.8),
    ex("Celu", x(3, 4), since=12),
    ex("Celu", x(3, 4), since=12, alpha=0.5),
    ex("HardSigmoid", x(3, 4), since=9, alpha=0.3, beta=0.4),
    ex("HardSwish", x(3, 4, low=-5.0, high=5.0), since=14),
    ex("Mish", x(3, 4), since=18),
    ex("Swish", x(3, 4), since=24, until=24),
    ex("Swish", x(3, 4), since=24, until=24, alpha=1.5),
    ex("Gelu", x(3, 4), since=20),
    ex("Gelu", x(3, 4), since=20, approximate="tanh"),
    ex("Clip", spread(3, 4), since=9, until=10, min=-1.0, max=0.5),
    ex("Clip", spread(3, 4), since=9, until=10, min=-1.0),
    ex("Clip", spread(3, 4), since=11),
    ex("Clip", spread(3, 4), const(-1.0, "float64"), const(0.5, "float64")),
    ex("Clip", spread(3, 4), None, const(0.5, "float64")),
    ex("Cast", x(3, 4), since=9, to=FLOAT),
    ex("Dropout", x(3, 4), since=9, until=11, ratio=0.5),
    ex("Dropout", x(3, 4), const(0.5, "float32"), const(False, "bool"), since=13),
    ex("PRelu", spread(2, 3, 4), w(3, 1), since=9),
    ex("PRelu", spread(2, 3, 4), x(3, 1), since=9),
    *(ex(op, x(2, 3, 4), w(4), since=9) for op in ("Add", "Sub", "Mul")),
    *(ex(op, x(2, 3, 4), x(3, 1), since=9) for op in ("Add", "Sub", "Mul")),
    *(ex(op, x(3, 1), x(2, 1, 4), since=9) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    ex("Div", x(3, 1), x(2, 1, 4, low=0.5), since=9),
    ex("Pow", x(3, 4), const(2.0, "float64"), since=9),
    ex("Pow", x(3, 4, low=0.3), w(4), since=9),
    ex("Pow", x(3, 4), const(3), since=12),
    ex("Pow", x(2, 3, 4, low=0.3), x(3, 1), since=9),
    ex("Pow", w(3, 4, low=0.3), x(4), since=9),
    ex("Max", x(3, 4), w(3, 4), x(4), since=9),
    ex("Max", x(3, 4), x(3, 4), x(4), since=9),
    ex("Min", w(3, 4), x(3, 4), x(4), since=9),
    ex("Mean", x(3, 4), w(3, 4), x(4), since=9),
    ex("Sum", x(3, 4), w(3, 4), x(4), since=9),
    ex("Sum", x(3, 4), since=9),
    ex("Where", live([[True, False, True]], "bool"), x(2, 3), x(1, 3), since=9),
    ex("Where", live([[True], [False]], "bool"), x(3), w(2, 3), since=9),
    # products
    *(
        ex("Gemm", x(*left), x(*right), x(*bias), since=9, transA=a, transB=b, alpha=0.5, beta=2.0)
        for a, left in enumerate([(2, 3), (3, 2)])
        for b, right in enumerate([(3, 4), (4, 3)])
        for bias in ((4,), (2, 1))
    ),
    ex("Gemm", x(2, 3), w(3, 4), since=11),
    ex("MatMul", x(2, 3), w(3, 4), since=9),
    ex("MatMul", x(2, 5, 3), w(3, 4), since=9),
    ex("MatMul", w(2, 5, 3), x(3, 4), since=9),
    ex("MatMul", x(2, 1, 5, 3), x(3, 3, 4), since=9),
    ex("MatMul", x(3), x(3), since=9),
    ex("MatMul", x(5, 3), x(3), since=9),
    ex("MatMul", x(2, 5, 3), x(3), since=9),
    ex("MatMul", x(3), x(3, 4), since=9),
    ex("MatMul", x(3), x(2, 3, 4), since=9),
    ex("Einsum", x(2, 3), x(3, 4), since=12, equation="ij,jk->ik"),
    ex("Einsum", x(2, 3), w(3, 4), since=12, equation="ij, jk"),
    ex("Einsum", x(2, 5, 3, 4), x(2, 6, 3, 4), since=12, equation="bihd,bjhd->bhij"),
    ex("Einsum", x(2, 2, 3), x(2, 3, 4), since=12, equation="...ij,...jk->...ik"),
    ex("Einsum", x(2, 3), since=12, equation="ij->ji"),
    *(
        ex("Conv", x(2, 4, *size), w(6, 4 // group, *kernel), x(6), since=9, group=group, **how)
        for size, kernel, how in (
            ((7,), (3,), {}),
            ((7,), (3,), {"pads": [2, 0], "dilations": [2]}),
            ((6, 5), (3, 2), {"pads": [1, 0, 1, 1]}),
            ((6, 5), (1, 1), {}),
            ((6, 5), (3, 3), {"pads": [3, 1, 1, 1]}),
            ((8, 7), (3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
            ((8, 7), (1, 1), {"strides": [2, 2]}),
            ((8, 7), (3, 3), {"strides": [2, 1], "auto_pad": "SAME_UPPER"}),
            ((7, 8), (2, 4), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
            ((7, 8), (3, 4), {"auto_pad": "SAME_LOWER"}),
            ((7, 8), (2, 4), {"auto_pad": "VALID", "strides": [3, 2]}),
            ((4, 3, 5), (2, 3, 3), {"pads": [1, 1, 1, 0, 1, 1]}),
            ((4, 5, 5), (2, 3, 3), {"pads": [1, 1, 1, 0, 1, 1], "strides": [2, 2, 1]}),
        )
        for group in (1, 2)
    ),
    ex("Conv", x(2, 4, 6, 5), w(4, 1, 3, 3), since=9, group=4, pads=[1, 1, 1, 1]),
    *(
        ex("ConvTranspose", x(2, 4, *size), w(4, 6 // group, *kernel), x(6), since=9, group=group, **how)
        for size, kernel, how in (
            ((5,), (3,), {"strides": [2], "output_padding": [1], "pads": [1, 0]}),
            ((4, 3), (3, 2), {}),
            ((4, 3), (3, 2), {"strides": [2, 3], "dilations": [2, 1], "pads": [1, 0, 0, 1]}),
            ((4, 3), (3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
            ((4, 3), (4, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
            ((4, 3), (3, 3), {"strides": [2, 2], "output_shape": [8, 6]}),
            ((3, 3, 2), (2, 3, 2), {"strides": [1, 2, 1]}),
        )
        for group in (1, 2)
    ),
    # pooling
    *(
        ex("MaxPool", spread(2, 3, *size), since=since, **how)
        for since, how, size in (
            (9, {"kernel_shape": [2], "strides": [2]}, (6,)),
            (10, {"kernel_shape": [3]}, (7,)),
            (9, {"kernel_shape": [2, 2], "strides": [2, 2]}, (4, 6)),
            (9, {"kernel_shape": [3, 2], "strides": [3, 2], "auto_pad": "VALID"}, (6, 4)),
            (9, {"kernel_shape": [2, 2], "strides": [2, 2]}, (5, 6)),
        )
    ),
    *(
        ex("MaxPool", spread(2, 3, *size), since=10, **how)
        for how, size in (
            ({"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, (7, 6)),
            ({"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}, (5, 6)),
            ({"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, (5, 6)),
            ({"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"}, (5, 6)),
            ({"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, (5, 6)),
            ({"kernel_shape": [2, 3], "strides": [2, 1], "dilations": [2, 1]}, (6, 6)),
            ({"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}, (4, 4, 6)),
            ({"kernel_shape": [2, 3, 2], "strides": [1, 2, 2], "storage_order": 1}, (3, 5, 4)),
        )
    ),
    *(
        ex("AveragePool", x(2, 3, *size), since=since, **how)
        for since, how, size in (
            (9, {"kernel_shape": [3]}, (7,)),
            (9, {"kernel_shape": [2, 2], "strides": [2, 2]}, (6, 5)),
            (9, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, (6, 5)),
            (9, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}, (6, 5)),
            (9, {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, (6, 5)),
            (9, {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER", "count_include_pad": 1}, (6, 5)),
            (10, {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}, (6, 5)),
            (19, {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}, (6, 5)),
            (19, {"kernel_shape": [3, 1], "dilations": [2, 1]}, (6, 5)),
            (9, {"kernel_shape": [2, 2, 3], "strides": [1, 2, 1], "pads": [0, 1, 1, 0, 1, 0]}, (3, 4, 5)),
        )
    ),
    *(ex(op, spread(2, 3, *size), since=9) for op in ("GlobalMaxPool", "GlobalAveragePool") for size in ((4,), (3, 2))),
    # reductions
    *(
        ex(op, x(2, 3, 4, low=0.3), since=9, until=17 if op != "ReduceSum" else 12, **how)
        for op in (name for _, name in OPERATORS if name.startswith("Reduce"))
        for how in ({}, {"axes": [1], "keepdims": 0}, {"axes": [-1, 0]})
    ),
    *(
        ex(op, x(2, 3, 4, low=0.3), *axes, since=18 if op != "ReduceSum" else 13, **how)
        for op in (name for _, name in OPERATORS if name.startswith("Reduce"))
        for axes, how in (((), {"keepdims": 0}), ((const([1]),), {"keepdims": 0}), ((const([-1, 0]),), {}))
    ),
    *(ex(op, x(2, 3, 4), since=9, until=17, axes=[1, 2]) for op in ("ReduceL1", "ReduceL2", "ReduceProd", "ReduceMax")),
    # normalisation
    *(ex(op, x(2, 3, 4), since=9) for op in ("Softmax", "LogSoftmax")),
    *(ex(op, x(2, 3, 4), since=11, axis=axis) for op in ("Softmax", "LogSoftmax") for axis in (-1, 1)),
    ex("BatchNormalization", x(2, 3, 4, 5), w(3), w(3), w(3), w(3, low=0.5), since=9, epsilon=0.1),
    ex("BatchNormalization", x(2, 3), w(3), w(3), w(3), w(3, low=0.5), since=9),
    ex("InstanceNormalization", x(2, 3, 4, 5), w(3), w(3), since=9, epsilon=0.1),
    ex("InstanceNormalization", x(2, 3, 4), w(3), w(3), since=9),
    ex("GroupNormalization", x(2, 4, 3, 2), w(2), w(2), since=18, until=20, num_groups=2),
    ex("GroupNormalization", x(2, 4, 3), w(4), w(4), since=21, num_groups=2, epsilon=0.1),
    ex("LayerNormalization", x(2, 3, 4), w(4), w(4), since=17, epsilon=0.1),
    ex("LayerNormalization", x(2, 3, 4), w(3, 4), since=17, axis=1),
    ex("LayerNormalization", x(2, 3, 4), w(4), w(4), since=17, outputs=3, axis=2),
    ex("RMSNormalization", x(2, 3, 4), w(4), since=23, epsilon=0.1),
    ex("RMSNormalization", x(2, 3, 4), w(3, 4), since=23, axis=1),
    *(ex("LpNormalization", x(2, 3, 4), since=9, axis=axis, p=p) for axis, p in ((-1, 2), (1, 1))),
    # movement
    ex("Transpose", x(2, 3, 4), since=9),
    ex("Transpose", x(2, 3, 4), since=9, perm=[1, 2, 0]),
    ex("Reshape", x(2, 3, 4), const([0, -1]), since=9),
    ex("Reshape", x(2, 3, 4), live([4, 6]), since=9),
    ex("Flatten", x(2, 3, 4), since=9, axis=2),
    ex("Squeeze", x(2, 1, 4, 1), since=9, until=12, axes=[1]),
    ex("Squeeze", x(2, 1, 4, 1), const([1, -1]), since=13),
    ex("Squeeze", x(2, 1, 4, 1), since=9),
    ex("Unsqueeze", x(2, 4), since=9, until=12, axes=[0, 2]),
    ex("Unsqueeze", x(2, 4), const([0, -1]), since=13),
    ex("Expand", x(3, 1), const([2, 1, 4]), since=9),
    ex("Expand", x(3, 4), live([3, 1]), since=9),
    ex("Tile", x(2, 3), const([2, 3]), since=9),
    ex("Tile", x(2, 3), live([1, 2]), since=9),
    ex("DepthToSpace", x(2, 8, 2, 3), since=9, blocksize=2),
    ex("DepthToSpace", x(2, 8, 2, 3), since=11, blocksize=2, mode="CRD"),
    ex("SpaceToDepth", x(2, 2, 4, 6), since=9, blocksize=2),
    # selection
    ex("Concat", x(2, 3), w(2, 1), x(2, 2), since=9, axis=1),
    ex("Concat", x(2, 3), x(4, 3), axis=-2),
    ex("Concat", x(2, 3), since=9, axis=0),
    ex("Split", x(4, 3), since=9, until=12, outputs=2, seeded=(0, 1), split=[3, 1]),
    ex("Split", x(4, 3), const([3, 1]), since=13, outputs=2, seeded=(1,)),
    ex("Split", x(4, 3), since=9, until=17, outputs=2, seeded=(0, 1)),
    ex("Split", x(2, 4), since=18, outputs=2, seeded=(0,), num_outputs=2, axis=-1),
    ex("Slice", x(4, 5), const([1]), const([3])),
    ex("Slice", x(4, 5), const([1, -2]), const([-1, 2**40]), const([0, -1])),
    ex("Slice", x(4, 5), const([-9]), const([3]), const([1]), const([1])),
    ex("Slice", x(4, 5), const([-1, 1]), const([-9, 5]), const([0, 1]), const([-2, 3])),
    ex("Slice", x(4, 5), live([1, -4]), live([4, -1]), const([1, 0])),
    ex("Slice", x(4, 5), live([1], "int32"), live([4], "int32"), const([1], "int32"), live([2], "int32")),
    ex("Gather", x(4, 5), const(1), since=9),
    ex("Gather", x(4, 5, 2), const(-1), axis=1),
    ex("Gather", x(4, 5), const([1, 2]), axis=-1),
    ex("Gather", x(4, 5), const([3, 0, 2])),
    ex("Gather", x(4, 5), const([-1, 0])),
    ex("Gather", x(4, 5), const([[3, 0], [3, -1]]), since=9),
    ex("Gather", x(4, 5, 2), live([[3, 0], [3, -1]], "int32"), axis=1),
    ex("Gather", x(4, 5, 2), live([1, 1]), axis=-1),
    ex("Gather", x(4, 5, 2), live(3), since=9, axis=0),
    ex("GatherElements", x(3, 4), live([[0, 0, 1, 3], [1, 1, 1, -1]]), since=16, axis=1),
    ex("GatherND", x(3, 4), live([[0, 1], [2, 3], [0, 1]]), since=16),
    ex("GatherND", x(3, 4), live([[2], [2]]), since=16),
    ex("ScatterElements", x(3, 4), live([[0, 2, 1, 0]]), x(1, 4), since=11),
    ex("ScatterElements", x(3, 4), live([[0, 2], [1, 0]]), x(2, 2), since=11, axis=1),
    ex("ScatterElements", x(3, 4), live([[0, 0, 1, 0]]), x(1, 4), since=16, reduction="add"),
    ex("ScatterND", x(3, 4), live([[0, 1], [2, 3]]), x(2), since=11),
    ex("ScatterND", x(3, 4), live([[2], [2]]), x(2, 4), since=16, reduction="add"),
    ex("TopK", spread(3, 5), const([2]), since=11, outputs=2),
    ex("TopK", spread(5, 3), const([2]), since=11, outputs=2, axis=0, largest=0),
    ex("Trilu", x(2, 3, 4), since=14),
    ex("Trilu", x(2, 3, 4), const(-1), since=14, upper=0),
    *(ex("CumSum", x(3, 4), const(1), since=11, exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    ex("Pad", x(3, 4), since=9, until=10, pads=[1, 0, 0, 2], value=3.0),
    ex("Pad", x(3, 4), since=9, until=10, pads=[1, 0, 1, 2], mode="reflect"),
    ex("Pad", x(3, 4), const([1, -1, 0, 2]), since=11),
    ex("Pad", x(3, 4), live([1, -1, 0, 2]), const(3.0, "float64"), since=11),
    ex("Pad", x(3, 4), const([1, 2]), None, const([-1]), since=18),
    ex("Pad", x(2, 3, 4, 5), const([0, 0, 1, 2, 0, 0, 2, 0]), mode="reflect"),
    ex("Pad", x(3, 4), const([1, 0, 0, 2]), mode="edge"),
    ex("Pad", x(3, 4), const([1, 2]), None, const([1]), since=19, mode="wrap"),
    *(
        ex("Resize", x(2, 3, 4, 5), const([], "float32"), const([1, 1, *scales], "float32"), **how)
        for scales in ((2.0, 2.0), (0.6, 1.7), (1.0, 3.0))
        for how in (
            {"mode": "nearest"},
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"mode": "linear"},
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            {"mode": "cubic", "cubic_coeff_a": -0.5},
        )
    ),
    ex("Resize", x(2, 3, 4, 5), const([], "float32"), const([], "float32"), const([2, 3, 7, 5]), mode="linear"),
    ex("Resize", x(2, 3, 4, 5), None, None, const([7, 5]), since=18, mode="linear", axes=[2, 3], antialias=1),
    ex("Resize", x(2, 3, 5), None, live([1.0, 1.0, 1.6], "float32"), since=13, mode="linear"),
    ex("Resize", x(2, 3, 4, 5), const([1, 1, 2, 1.5], "float32"), since=10, until=10),
    ex("Upsample", x(2, 3, 4, 5), const([1, 1, 2, 1.5], "float32"), since=9, until=9, mode="linear"),
    # onnxruntime's own
    *(ex(op, x(3, 4), domain="com.microsoft") for op in ("Gelu", "QuickGelu", "FastGelu")),
    *(ex(op, x(3, 4), w(4), domain="com.microsoft") for op in ("BiasGelu", "FastGelu")),
    *(
        ex(
            "FusedMatMul",
            x(*((2, 4, 3) if a else (2, 3, 4))),
            x(*((2, 5, 4) if b else (2, 4, 5))),
            transA=a,
            transB=b,
            alpha=0.5,
            since=12,
            domain="com.microsoft",
        )
        for a in (0, 1)
        for b in (0, 1)
    ),
    ex("Attention", x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 6), since=23),
    ex("Attention", x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 6), w(3, 5), since=23, scale=0.7),
    ex("Attention", x(2, 3, 8), x(2, 5, 8), x(2, 5, 12), since=23, q_num_heads=2, kv_num_heads=2),
    ex("Attention", x(2, 2, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 6), const(np.tri(3, 5) > 0, "bool"), since=23),
    ex("Attention", x(2, 4, 3, 4), x(2, 2, 5, 4), x(2, 2, 5, 6), since=23, is_causal=1),
    ex("Attention", x(2, 3, 16), x(2, 5, 8), x(2, 5, 12), since=23, q_num_heads=4, kv_num_heads=2),
    ex("Attention", x(2, 3, 8), x(2, 5, 8), x(2, 5, 12), *[None] * 3, live([2, 5]), since=24, q_num_heads=2, kv_num_heads=2),
    *(
        ex("MultiHeadAttention", x(2, 5, 8), x(2, 5, 8), x(2, 5, 12), *more, since=12, domain="com.microsoft", **how)
        for more, how in [
            ((), {"num_heads": 2}),
            ((None, live([2, 5], "int32")), {"num_heads": 2, "unidirectional": 1}),
            ((None, live(np.tri(2, 5, 2), "int32"), w(1, 2, 5, 5)), {"num_heads": 2, "scale": 0.7}),
            ((None, live(np.tri(5)[None].repeat(2, 0), "int32")), {"num_heads": 4}),
        ]
    ),
    *(
        ex(
            "GroupQueryAttention",
            *(x(2, 5, 8 * heads) for heads in (4, shared, shared)),
            *(None, None, live([4, 4], "int32"), live(5, "int32")),
            since=12,
            domain="com.microsoft",
            num_heads=4,
            kv_num_heads=shared,
        )
        for shared in (4, 2)
    ),
    ex("SkipLayerNormalization", x(2, 3, 4), x(2, 3, 4), w(4), w(4), w(4), domain="com.microsoft", epsilon=0.1),
    ex(
        "SkipLayerNormalization", x(2, 3, 4), x(2, 3, 4), w(4), outputs=4, seeded=(0, 3), domain="com.microsoft", epsilon=0.1
    ),
]

GIVES_NONE = {("com.microsoft", "EmbedLayerNormalization")}
"""What has no operand that a gradient could be given: among the refusals."""
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)


# --- finite differences -----------------------------------------------------------------------------------------------


def model_of(example: Example, opset: int, dtype: Any) -> ir.Model:
    """``i{k}`` through Identity to ``t{k}`` where operand k is computed, the node, its outputs ``o{k}``."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs, stored, nodes = [], [], []
    names = ["" if operand is None else f"t{i}" for i, operand in enumerate(example.operands)]
    for i, array in example.draw(dtype).items():
        if example.operands[i].stored:
            stored.append(numpy_helper.from_array(array, f"t{i}"))
        else:
            free = [None] * array.ndim
            inputs.append(helper.make_tensor_value_info(f"i{i}", helper.np_dtype_to_tensor_dtype(array.dtype), free))
            nodes.append(helper.make_node("Identity", [f"i{i}"], [f"t{i}"], name=f"copy{i}"))
    attributes = {k: kind if v is FLOAT else v for k, v in example.attributes.items()}
    outputs = [f"o{k}" for k in range(example.outputs)]
    nodes.append(helper.make_node(example.op, names, outputs, name="node", domain=example.domain, **attributes))
    ends = [helper.make_tensor_value_info(f"o{k}", kind, None) for k in example.seeded]
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(example.domain, 1)] if example.domain else [])]
    graph = helper.make_graph(nodes, "g", inputs, ends, stored)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def attach(model: ir.Model, seeds: Sequence[str], tensors: Sequence[str], dtype: Any = np.float32, **how: Any) -> Gradients:
    """Append the reverse pass of a model; seed ``v:o`` is for output o, the gradient of tensor t is output ``g:t``."""
    build = Builder(model.graph, model.graph.opset_imports[""], fused=how.pop("fused", False))
    vectors = {}
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    for name in seeds:
        vectors[name] = ir.Value(name=f"v:{name}", type=kind)
        model.graph.inputs.append(vectors[name])
    gradients = differentiate(model.graph, build, vectors, tensors, dtype=dtype, **how)
    for name, value in gradients.values.items():
        named = ir.Value(name=f"g:{name}", type=kind)
        model.graph.append(ir.node("Identity", [value], outputs=[named]))
        model.graph.outputs.append(named)
    return gradients


def forward(example: Example, opset: int) -> tuple[Callable[[dict[str, Array]], list[Array]], Any]:
    """The node as a function in the best arithmetic there is, and its element type."""
    names = [f"o{k}" for k in example.seeded]
    try:
        run, dtype = session(model_of(example, opset, np.float64)), np.float64
    except Exception:
        run, dtype = session(model_of(example, opset, np.float32)), np.float32
    return lambda feed: run.run(names, feed), dtype


def backward(
    example: Example, opset: int, dtypes: Sequence[Any] = (np.float64, np.float32), **how: Any
) -> tuple[ort.InferenceSession, Any, Gradients]:
    """The reverse pass in the first arithmetic there is."""
    for dtype in dtypes:
        model = model_of(example, opset, dtype)
        tensors, seeds = [f"t{i}" for i in example.wanted], [f"o{k}" for k in example.seeded]
        gradients = attach(model, seeds, tensors, dtype, **how)
        try:
            assert dtype == dtypes[-1] or not gradients.refused
            return session(model), dtype, gradients
        except Exception:
            if dtype == dtypes[-1]:
                raise
    raise AssertionError


def feeds(example: Example, dtype: Any) -> dict[str, Array]:
    return {f"i{i}": array for i, array in example.draw(dtype).items() if not example.operands[i].stored}


def shapes_of(example: Example, opset: int) -> dict[str, Any]:
    bound = {name: array.shape for name, array in feeds(example, np.float32).items()}
    return infer_shapes(model_of(example, opset, np.float32), bound)


def differences(function: Callable[[], float], array: Array, step: float) -> Array:
    """Central differences of fourth order of a function of an array, element by element."""
    found = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        kept = array[place]
        for offset, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            array[place] = kept + offset * step
            found[place] += weight * function()
        array[place] = kept
    return found / (12 * step)


class Checker:
    """Compares a rule with differences; those are kept for the opsets in which the operator gives the same outputs."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.outputs: list[Array] = []
        self.expected: dict[int, Array] = {}

    def differentiate(self, opset: int) -> dict[str, Array]:
        """Expected gradients by input, of a random combination of the outputs; returns the combination."""
        run, self.exact = forward(self.example, opset)
        feed = feeds(self.example, self.exact)
        outputs = run(feed)
        rng = np.random.default_rng(3)
        vectors = {f"v:o{k}": rng.standard_normal(y.shape) for k, y in zip(self.example.seeded, outputs, strict=True)}

        def value() -> float:
            return sum(float((v * y.astype(np.float64)).sum()) for v, y in zip(vectors.values(), run(feed), strict=True))

        if not self.outputs or not all(map(np.array_equal, self.outputs, outputs)):
            self.outputs = outputs
            step = 0.05 if self.single(self.exact) else 1e-3
            self.expected = {i: differences(value, feed[f"i{i}"], step) for i in self.example.wanted}
        return vectors

    def single(self, dtype: Any) -> bool:
        """Whether something is computed in float32; then steps of 0.05 keep truncation and rounding below 1e-5."""
        return dtype == np.float32 or self.example.op == "GroupNormalization"  # its float64 kernel is float32 inside

    def check(self, opset: int, **how: Any) -> None:
        vectors = self.differentiate(opset)
        reverse, dtype, gradients = backward(self.example, opset, **how)
        assert not gradients.refused, [str(r) for r in gradients.refused.values()]
        names = [f"g:{t}" for t in gradients.values]
        seeds = {name: vector.astype(dtype) for name, vector in vectors.items()}
        found = dict(zip(names, reverse.run(names, feeds(self.example, dtype) | seeds), strict=True))
        tolerance = 1e-4 if self.single(self.exact) or dtype == np.float32 else 1e-6  # attributes are float32 always
        for i, expected in self.expected.items():
            actual = found.get(f"g:t{i}", np.zeros_like(expected))
            assert actual.shape == expected.shape
            scale = max(1.0, np.abs(expected).max(initial=0.0))
            np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def test_every_rule_has_examples():
    rules = {(row.domain, row.name) for row in OPERATORS.values() if row.reverse not in (None, nothing)}
    assert {(e.domain, e.op) for e in EXAMPLES} == rules - GIVES_NONE


@every_example
def test_rule_agrees_with_finite_differences(example: Example):
    checker = Checker(example)
    assert example.opsets
    for opset in example.opsets:
        try:
            shapes = shapes_of(example, opset)
            checker.check(opset, shapes=shapes)
        except Exception as error:
            raise AssertionError(f"opset {opset}") from error
    # In float32, and with sizes that the model states, some rules take a faster way.
    checker.check(opset, shapes=shapes, declared=shapes, dtypes=[np.float32])


@pytest.mark.parametrize(
    ("sample", "other"),
    [
        (ex("Add", x(2, 3), x(1, 3)), ex("Add", x(5, 3), x(1, 3))),
        (ex("MatMul", x(2, 4, 3), x(2, 3, 4)), ex("MatMul", x(5, 7, 3), x(5, 3, 7))),
        (ex("Conv", x(2, 4, 8), w(6, 4, 3), strides=[2]), ex("Conv", x(3, 4, 9), w(6, 4, 3), strides=[2])),
        (ex("Conv", x(2, 4, 8), w(6, 4, 3), pads=[1, 1]), ex("Conv", x(3, 4, 9), w(6, 4, 3), pads=[1, 1])),
        (ex("ConvTranspose", x(2, 4, 8), w(4, 6, 3)), ex("ConvTranspose", x(3, 4, 9), w(4, 6, 3))),
        (ex("MaxPool", spread(2, 4, 8), kernel_shape=[2], strides=[2]),) * 2,
        (ex("MaxPool", spread(2, 4, 8), kernel_shape=[3]), ex("MaxPool", spread(3, 4, 9), kernel_shape=[3])),
        (ex("AveragePool", x(2, 4, 8), kernel_shape=[3]), ex("AveragePool", x(3, 4, 9), kernel_shape=[3])),
        (ex("GlobalAveragePool", x(2, 4, 8)), ex("GlobalAveragePool", x(3, 4, 9))),
        (ex("ReduceMean", x(2, 4, 8), until=17, axes=[1]), ex("ReduceMean", x(3, 5, 9), until=17, axes=[1])),
        (ex("Softmax", x(2, 4)), ex("Softmax", x(3, 5))),
        (ex("LayerNormalization", x(2, 4), w(4), since=17), ex("LayerNormalization", x(3, 4), w(4), since=17)),
        (ex("InstanceNormalization", x(2, 4, 5), w(4), w(4)), ex("InstanceNormalization", x(3, 4, 6), w(4), w(4))),
        (ex("Reshape", x(2, 4, 3), const([0, -1])), ex("Reshape", x(3, 5, 3), const([0, -1]))),
        (ex("Tile", x(2, 4), const([1, 3])), ex("Tile", x(3, 5), const([1, 3]))),
        (ex("Concat", x(2, 4), x(2, 3), since=13, axis=1), ex("Concat", x(3, 5), x(3, 2), since=13, axis=1)),
        (ex("Slice", x(3, 4), const([-1]), const([9])), ex("Slice", x(2, 4), const([-1]), const([9]))),
        (ex("Slice", x(3, 4), const([9]), const([-9]), None, const([-2])),) * 2,
        (ex("Gather", x(3, 4), const(-1), axis=1), ex("Gather", x(2, 5), const(-1), axis=1)),
        (ex("Gather", x(3, 4), live([1, 1, 0])), ex("Gather", x(2, 5), live([1, 1]))),
        (ex("Pad", x(3, 4), const([0, 1, 0, 1]), mode="reflect"), ex("Pad", x(2, 5), const([0, 1, 0, 1]), mode="reflect")),
        (
            ex("Resize", x(1, 2, 4), None, const([1, 1, 1.5], "float32"), since=13, mode="linear"),
            ex("Resize", x(2, 2, 7), None, const([1, 1, 1.5], "float32"), since=13, mode="linear"),
        ),
    ],
    ids=str,
)
def test_a_reverse_pass_serves_batches_and_sequences_of_other_sizes(sample: Example, other: Example):
    for opset in (11, 13, 18):
        if opset in sample.opsets:
            Checker(other).check(opset, shapes=shapes_of(sample, opset))


@pytest.mark.parametrize(
    "example",
    [
        ex("Mul", x(2, 3, 4), x(3, 1), since=13),
        ex("Expand", x(3, 1), const([2, 1, 4]), since=13),
        ex("MatMul", x(2, 1, 5, 3), x(3, 3, 4), since=13),
        ex("Where", live([[True, False, True]], "bool"), x(2, 3), x(1, 3), since=13),
        ex("Conv", x(2, 4, 7), w(6, 4, 3), strides=[2]),
        ex("Slice", x(3, 4), const([1]), const([3])),
        ex("Resize", x(2, 3, 5), None, const([1, 1, 1.6], "float32"), since=13, mode="linear"),
    ],
    ids=str,
)
def test_sizes_may_be_unknown_where_ranks_are_known(example: Example):
    known = shapes_of(example, example.opsets[-1])
    stored = {f"t{i}" for i, operand in enumerate(example.operands) if operand is not None and operand.stored}
    unknown = {name: shape if name in stored else (None,) * len(shape) for name, shape in known.items()}
    Checker(example).check(example.opsets[-1], shapes=unknown)


# --- ties and steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "size"), [(2, 2, 0, 6), (3, 3, 0, 6), (2, 2, 0, 5), (3, 2, 1, 6), (3, 1, 1, 5)]
)
def test_the_first_of_several_largest_elements_gets_the_gradient(
    dtype: Any, opset: int, kernel: int, stride: int, pad: int, size: int
):
    example = ex("MaxPool", ties(2, 3, size, size), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    run, *_ = backward(example, opset, [dtype], shapes=shapes_of(example, opset))
    (values,) = feeds(example, dtype).values()
    places = (size + 2 * pad - kernel) // stride + 1
    gradient = np.random.default_rng(0).standard_normal((2, 3, places, places)).astype(dtype)
    expected = np.zeros((2, 3, size + 2 * pad, size + 2 * pad))
    padded = np.pad(values, [(0, 0), (0, 0), (pad, pad), (pad, pad)], constant_values=-np.inf)
    for n, c, i, j in np.ndindex(gradient.shape):
        window = padded[n, c, i * stride :, j * stride :][:kernel, :kernel]
        row, column = np.unravel_index(window.argmax(), window.shape)
        expected[n, c, i * stride + row, j * stride + column] += gradient[n, c, i, j]
    (found,) = run.run(["g:t0"], {"i0": values, "v:o0": gradient})
    np.testing.assert_allclose(found, expected[:, :, pad : pad + size, pad : pad + size], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", ["Max", "Min"])
def test_the_first_of_several_extreme_operands_gets_the_gradient(operator: str):
    operands = [live([[1.0, 2.0, 3.0]], "float64", wanted=True), live([1.0, 2.0, 0.0], "float64", wanted=True)]
    example = ex(operator, *operands, live([1.0, 0.0, 3.0], "float64", wanted=True))
    run, dtype, _ = backward(example, 13, shapes=shapes_of(example, 13))
    found = run.run(["g:t0", "g:t1", "g:t2"], feeds(example, dtype) | {"v:o0": np.ones((1, 3), dtype)})
    expected = [[1, 1, 1], [0, 0, 0], [0, 0, 0]] if operator == "Max" else [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    np.testing.assert_array_equal([part.ravel() for part in found], expected)


@pytest.mark.parametrize(("operator", "axes"), [("ReduceMax", (1,)), ("ReduceMin", (1,)), ("GlobalMaxPool", None)], ids=str)
def test_extreme_elements_share_the_gradient_of_a_reduction(operator: str, axes: tuple[int, ...] | None):
    values = live(np.array([[[2.0, 2.0], [1.0, 2.0], [2.0, 1.0]]]), "float64", wanted=True)
    example = ex(operator, values, **({} if axes is None else {"axes": axes}))
    run, dtype, _ = backward(example, 13, shapes=shapes_of(example, 13))
    feed = feeds(example, dtype)
    shape = (1, 3, 1) if axes is None else (1, 1, 2)
    (found,) = run.run(["g:t0"], feed | {"v:o0": np.ones(shape, dtype)})
    x, over = feed["i0"], (2,) if axes is None else axes
    best = (x.min if operator == "ReduceMin" else x.max)(axis=over, keepdims=True) == x
    np.testing.assert_allclose(found, best / best.sum(axis=over, keepdims=True))


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products_have_gradients_at_zeros(zeros: int):
    values = np.array([[2.0, -3.0, 0.5, 4.0]])
    values[:, :zeros] = 0.0
    example = ex("ReduceProd", live(values, "float64", wanted=True))
    Checker(example).check(13, shapes=shapes_of(example, 13))


# --- graphs -----------------------------------------------------------------------------------------------------------


def graph_of(nodes: Sequence[Any], inputs: Mapping[str, Sequence[int | None]], output: str = "y", **stored: Any) -> ir.Model:
    """A float32 model of opset 18."""
    ins = [helper.make_tensor_value_info(name, 1, shape) for name, shape in inputs.items()]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(list(nodes), "g", ins, [helper.make_tensor_value_info(output, 1, None)], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op} to {outputs}", **attributes)


@pytest.mark.parametrize("operator", sorted(row.name for row in OPERATORS.values() if row.reverse is nothing))
def test_nothing_comes_back_through_steps_and_shapes(operator: str):
    nodes = [node("Identity", "x", "a"), node(operator, "a a", "b"), node("Cast", "b", "c", to=1), node("Add", "a c", "y")]
    model = graph_of(nodes, {"x": [2, 3]})
    gradients = attach(model, ["y"], ["a"], shapes=dict.fromkeys("abcy", (2, 3)))
    assert not gradients.refused
    assert gradients.values["a"].name == "v:y"


def test_an_operator_without_a_rule_refuses_what_comes_before_it():
    nodes = [
        node("Relu", "x", "a"),
        node("LRN", "a", "b", size=3),
        node("Sigmoid", "b", "c"),
        node("LRN", "a", "aside", size=3),
        node("Tanh", "c", "y"),
    ]
    model = graph_of(nodes, {"x": [None, 4, 5]})
    gradients = attach(model, ["y"], ["a", "b", "c"], shapes=infer_shapes(model, {"x": (2, 4, 5)}))
    assert set(gradients.values) == {"b", "c"}
    assert {name: str(reason) for name, reason in gradients.refused.items()} == {
        "a": "LRN 'LRN to b' has no reverse-mode rule"
    }


def test_an_operator_without_a_rule_aside_of_the_output_does_not_matter():
    nodes = [node("Relu", "x", "a"), node("LRN", "a", "aside", size=3), node("Tanh", "a", "y")]
    model = graph_of(nodes, {"x": [None, 4, 5]})
    assert not attach(model, ["y"], ["a"], shapes=infer_shapes(model, {"x": (2, 4, 5)})).refused


def test_a_tensor_that_the_output_does_not_depend_on_has_neither_gradient_nor_refusal():
    model = graph_of([node("Relu", "x", "a"), node("Tanh", "x", "y")], {"x": [2]})
    gradients = attach(model, ["y"], ["a"], shapes=infer_shapes(model))
    assert not gradients.values
    assert not gradients.refused


def test_tensors_that_a_subgraph_uses_are_refused():
    branch = helper.make_graph([node("Relu", "a", "z")], "branch", [], [helper.make_tensor_value_info("z", 1, None)])
    nodes = [
        node("Tanh", "x", "a"),
        node("ReduceMax", "x", "m", keepdims=0),
        node("Cast", "m", "flag", to=9),
        node("If", "flag", "b", then_branch=branch, else_branch=branch),
        node("Relu", "b", "y"),
    ]
    model = graph_of(nodes, {"x": [2]})
    gradients = attach(model, ["y"], ["a", "b"], shapes=infer_shapes(model))
    assert set(gradients.values) == {"b"}
    assert str(gradients.refused["a"]) == "If 'If to b' uses them inside a subgraph"


@pytest.mark.parametrize(
    ("example", "opset", "reason"),
    [
        (ex("Clip", x(3), live(-1.0, "float64", wanted=True)), 13, "computes its bounds"),
        (ex("Conv", x(1, 2, 4), x(2, 2, 3)), 13, "computes its filters"),
        (ex("ConvTranspose", x(1, 2, 4), x(2, 2, 3)), 13, "computes its filters"),
        (
            ex("ConvTranspose", x(1, 2, 4), w(2, 2, 3), strides=[1], dilations=[2], output_padding=[1]),
            13,
            "pads its output by more than its stride",
        ),
        (ex("LayerNormalization", x(2, 3), x(3)), 17, "computes its parameters"),
        (ex("BatchNormalization", x(2, 3), w(3), x(3), w(3), w(3)), 13, "computes its parameters"),
        (ex("BatchNormalization", x(2, 3), w(3), w(3), w(3), w(3), training_mode=1), 15, "is in training mode"),
        (ex("Dropout", x(2, 3), const(0.5, "float32"), const(True, "bool")), 13, "may be in training mode"),
        (
            ex("LayerNormalization", x(2, 3), w(3), outputs=2, seeded=(0, 1)),
            17,
            "has a gradient at another output than its first",
        ),
        (ex("ReduceSum", x(2, 3), live([1])), 13, "its axes are computed"),
        (ex("Einsum", x(3, 3), equation="ii->i"), 13, "repeats an index in one operand"),
        (ex("Einsum", x(2, 3), x(4), equation="ij,k->ik"), 13, "sums over an index of one operand"),
        (ex("Einsum", x(2, 3), x(1, 4), equation="ij,ik->jk"), 13, "broadcasts an index"),
        (ex("Einsum", x(2, 3), x(3, 4), equation="...j,jk->...k"), 13, "has '...' in some operands only"),
        (ex("MaxPool", x(1, 2, 5), kernel_shape=[3]), 9, "pools in windows that overlap, in an opset before 10"),
        (
            ex("MaxPool", x(1, 2, 4), kernel_shape=[2], strides=[2]),
            10,
            "pools values of type float64, in an opset before 11",
        ),
        (ex("Slice", x(5), const([1]), const([3])), 10, "takes a part, in an opset before 11"),
        (ex("Slice", x(5), const([1]), const([3]), live([0])), 13, "computes its axes"),
        (ex("GatherElements", x(3), live([1])), 13, "gathers elements, in an opset before 16"),
        (ex("GatherND", x(3), live([[1]])), 13, "gathers slices, in an opset before 16 or with batch dimensions"),
        (
            ex("GatherND", x(2, 3), live([[1], [2]]), batch_dims=1),
            16,
            "gathers slices, in an opset before 16 or with batch dimensions",
        ),
        (ex("ScatterND", x(3), live([[1]]), x(1), reduction="mul"), 16, "scatters with reduction 'mul'"),
        (ex("TopK", x(3), const([2]), outputs=2), 10, "chooses by size, in an opset before 11"),
        (ex("Pad", x(3), const([1, 1]), live(0.0, "float64", wanted=True)), 13, "computes its padding value"),
        (ex("Pad", x(3), live([1, 1]), mode="edge"), 13, "computes its padding"),
        (
            ex(
                "Resize",
                x(1, 1, 4),
                const([0, 0, 0, 1, 1, 1], "float32"),
                const([1, 1, 2], "float32"),
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
            13,
            "crops",
        ),
        (
            ex("Resize", x(1, 1, 4), None, None, const([1, 2, 8]), keep_aspect_ratio_policy="not_larger"),
            18,
            "keeps the aspect ratio",
        ),
        (ex("BiasGelu", x(2, 3), x(3), domain="com.microsoft"), 13, "computes its bias"),
        (
            ex("SkipLayerNormalization", x(2, 3), x(2, 3), w(3), outputs=2, seeded=(1,), domain="com.microsoft"),
            13,
            "has a gradient at its statistics",
        ),
        (
            ex("SkipLayerNormalization", x(2, 3), x(2, 3), x(3), domain="com.microsoft"),
            13,
            "computes its parameters",
        ),
        (
            ex("EmbedLayerNormalization", *EMBEDDED, x(7, 4), w(3, 4), None, w(4), w(4), outputs=2, domain="com.microsoft"),
            13,
            "computes its tables",
        ),
        (ex("Relu", x(3)), 8, "is of opset 8: reverse-mode rules begin with 9"),
    ],
    ids=lambda v: str(v) if isinstance(v, Example) else "",
)
def test_rules_say_why_they_refuse(example: Example, opset: int, reason: str):
    dtype = np.float64 if "float64" in reason else np.float32
    model = model_of(example, opset, dtype)
    tensors, seeds = [f"t{i}" for i in example.wanted], [f"o{k}" for k in example.seeded]
    gradients = attach(model, seeds, tensors, dtype, shapes=shapes_of(example, opset))
    assert {refusal.reason for refusal in gradients.refused.values()} == {reason}


@pytest.mark.parametrize(
    ("shapes", "opset", "reason"),
    [
        ({}, 18, "has an operand of unknown shape"),
        ({"t0": (None, 3), "t1": (None, 3), "o0": (None, 3)}, 12, "broadcasts operands of unknown size"),
    ],
)
def test_unknown_shapes_are_a_reason(shapes: dict[str, Any], opset: int, reason: str):
    model = model_of(ex("Mul", x(2, 3), x(1, 3)), opset, np.float32)
    assert {r.reason for r in attach(model, ["o0"], ["t0", "t1"], shapes=shapes).refused.values()} == {reason}


def test_equal_symbols_are_equal_sizes():
    example = ex("Mul", x(2, 3), x(2, 3))
    Checker(example).check(12, shapes=dict.fromkeys(("t0", "t1", "o0"), ("batch", 3)))


def test_several_seeds_share_what_does_not_depend_on_them():
    nodes = [node("Gemm", "x w", "p"), node("Gelu", "p", "q"), node("Relu", "q", "h"), node("Gemm", "h w", "y")]
    counts = []
    for seeds in (1, 2):
        model = graph_of(nodes, {"x": [None, 3]}, w=np.eye(3, dtype=np.float32))
        model.graph.opset_imports[""] = 20
        build, shapes = Builder(model.graph, 20), infer_shapes(model, {"x": (2, 3)})
        for k in range(seeds):
            differentiate(model.graph, build, {"y": ir.Value(name=f"v{k}")}, ["p", "h"], shapes=shapes)
        made = [n.op_type for n in model.graph if n.name.startswith(build.prefix)]
        counts.append({op: made.count(op) for op in set(made)})
    one, two = counts
    assert two["Gemm"] == 2 * one["Gemm"]
    assert two["Erf"] == one["Erf"] == 1
    assert two["HardSigmoid"] == one["HardSigmoid"] == 1
    assert two["Mul"] == one["Mul"] + 2  # the gradient times the slope of Relu, and of Gelu


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_linear_in_a_row_becomes_one_product(fused: bool):
    """Behind a layer normalisation: two projections, one of them read twice, and a product of the results."""
    rng = np.random.default_rng(0)
    u, w, x, seed = (rng.standard_normal(size) for size in ((4, 5), (4, 5), (2, 3, 4), (2, 3, 3)))
    scale, shift = rng.standard_normal((2, 4))
    nodes = [
        node("Identity", "x", "a"),
        node("LayerNormalization", "a scale shift", "n"),
        node("MatMul", "n u", "p"),
        node("MatMul", "n u", "p2"),
        node("MatMul", "n w", "q"),
        node("Add", "p p2", "s"),
        node("Transpose", "q", "t", perm=[0, 2, 1]),
        node("MatMul", "s t", "y"),
    ]
    stored = {name: array.astype(np.float32) for name, array in {"u": u, "w": w, "scale": scale, "shift": shift}.items()}
    model = graph_of(nodes, {"x": [None, 3, 4]}, **stored)
    attach(model, ["y"], ["a"], shapes=infer_shapes(model, {"x": x.shape}), fused=fused)
    (found,) = session(model).run(["g:a"], {"x": x.astype(np.float32), "v:y": seed.astype(np.float32)})
    factor = 1.0 / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    normal = (x - x.mean(axis=-1, keepdims=True)) * factor
    n = normal * scale + shift
    g = scale * (2.0 * seed @ (n @ w) @ u.T + seed.transpose(0, 2, 1) @ (2.0 * n @ u) @ w.T)
    expected = factor * (g - g.mean(axis=-1, keepdims=True) - normal * (g * normal).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    left = [
        n for n in model.graph if n.name.startswith("mscompile.") and any(v.uses() or v.name == "g:a" for v in n.outputs)
    ]
    assert sum(n.op_type == "Concat" for n in left) == 2  # the gradients side by side, the matrices stacked
    assert sum(n.op_type == "FusedMatMul" for n in left) == (2 if fused else 0)


def test_gradients_have_one_type_where_a_model_mixes_them():
    nodes = [
        node("Sigmoid", "x", "a"),
        node("Cast", "a", "b", to=10),
        node("Mul", "b w", "c"),
        node("Tanh", "c", "d"),
        node("Cast", "d", "y", to=1),
    ]
    model = graph_of(nodes, {"x": [2, 3]}, w=np.array([0.5, 1.0, 2.0], dtype=np.float16))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    attach(model, ["y"], ["a", "c"], shapes=infer_shapes(model))
    values, seed = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    (found,) = session(model).run(["g:a"], {"x": values, "v:y": seed})
    factor = np.array([0.5, 1.0, 2.0])
    expected = seed * (1 - np.tanh(factor / (1 + np.exp(-values))) ** 2) * factor
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_shapes_of_a_sample_are_found_by_running_where_inference_ends():
    nodes = [
        node("Relu", "x", "a"),
        node("NonZero", "a", "places"),
        node("Gather", "a first", "picked", axis=0),
        node("Unique", "picked", "u"),
        node("Relu", "u", "y"),
    ]
    model = graph_of(nodes, {"x": [None, 3]}, first=np.array([0]))
    shapes = sample_shapes(model, {"x": np.array([[1, 2, 2], [0, 0, 1]], dtype=np.float32)})
    assert (shapes["a"], shapes["places"], shapes["u"], shapes["y"]) == ((2, 3), (2, 4), (2,), (2,))


# --- whole networks ---------------------------------------------------------------------------------------------------


def torch_gradients(model: ir.Model, feed: Mapping[str, Array], vector: Array) -> dict[str, Array]:
    """Gradients at all tensors by torch's automatic differentiation, in float64."""
    import torch
    from torch.nn import functional

    def given(node: ir.Node, name: str, default: Any = None) -> Any:
        return node.attributes[name].value if name in node.attributes else default

    def ints(tensor: Any) -> list[int]:
        return [int(n) for n in tensor.ravel()]

    def gemm(n: ir.Node, a: Any, b: Any, c: Any) -> Any:
        assert given(n, "alpha", 1.0) == given(n, "beta", 1.0) == 1.0
        return (a.T if given(n, "transA", 0) else a) @ (b.T if given(n, "transB", 0) else b) + c

    def conv(n: ir.Node, a: Any, w: Any, b: Any = None) -> Any:
        pads = given(n, "pads", (0,) * 4)
        assert pads[:2] == pads[2:]
        return functional.conv2d(a, w, b, stride=given(n, "strides"), padding=pads[:2], groups=given(n, "group", 1))

    def norm(n: ir.Node, a: Any, w: Any, b: Any) -> Any:
        return functional.layer_norm(a, w.shape, w, b, given(n, "epsilon", 1e-5))

    operators: dict[str, Callable[..., Any]] = {
        "Add": lambda _, a, b: a + b,
        "Mul": lambda _, a, b: a * b,
        "MatMul": lambda _, a, b: a @ b,
        "Gemm": gemm,
        "Conv": conv,
        "Relu": lambda _, a: a.relu(),
        "Gelu": lambda n, a: functional.gelu(a, approximate=given(n, "approximate", "none")),
        "Softmax": lambda n, a: a.softmax(given(n, "axis", -1)),
        "LayerNormalization": norm,
        "BatchNormalization": lambda n, a, s, b, m, v: functional.batch_norm(a, m, v, s, b, False, 0.0, given(n, "epsilon")),
        "MaxPool": lambda n, a: functional.max_pool2d(a, given(n, "kernel_shape"), given(n, "strides")),
        "ReduceMean": lambda n, a, axes: a.mean(tuple(ints(axes)), bool(given(n, "keepdims", 1))),
        "Transpose": lambda n, a: a.permute(*given(n, "perm")),
        "Reshape": lambda _, a, shape: a.reshape([a.shape[i] if d == 0 else d for i, d in enumerate(ints(shape))]),
        "Gather": lambda n, a, i: a[i] if given(n, "axis", 0) == 0 else None,
    }

    def tensor(array: Array) -> Any:
        return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array.copy())

    values = {v.name: tensor(v.const_value.numpy()) for v in model.graph.initializers.values()}
    values |= {name: tensor(array) for name, array in feed.items()}
    for n in model.graph:
        result = operators[n.op_type](n, *(values[v.name] for v in n.inputs))
        result = result if result.requires_grad else result.requires_grad_()
        result.retain_grad()
        values[n.outputs[0].name] = result
    (values[model.graph.outputs[0].name] * tensor(vector)).sum().backward()
    return {v.name: values[v.name].grad.numpy() for n in model.graph for v in n.outputs}


@pytest.mark.torch
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "vit", "decoder"])
def test_networks_agree_with_torch(name: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from mscompile.models.architectures import ARCHITECTURES, Decoder, VisionTransformer
    from mscompile.models.export import export, input_name

    torch.manual_seed(0)
    small = {
        "vit": lambda: VisionTransformer(size=28, patch=14, width=16, heads=2, depth=2),
        "decoder": lambda: Decoder(vocabulary=11, length=6, width=16, heads=2, depth=2),
    }
    network = small.get(name, ARCHITECTURES[name].build)()
    rng = np.random.default_rng(0)
    if name == "decoder":
        data = rng.integers(0, 11, (5, 6))
    else:
        data = rng.standard_normal((5, 784) if name == "mlp" else (5, 1, 28, 28)).astype(np.float32)
    with torch.no_grad():
        network(torch.from_numpy(data))  # batch normalisation takes statistics worth keeping
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    export(network, data, tmp_path / "network.onnx")
    dense = ir.load(tmp_path / "network.onnx")
    tensors = [v.name for n in dense.graph for v in n.outputs]
    model, feed = dense.clone(), {input_name(network): data}
    output = dense.graph.outputs[0].name
    gradients = attach(model, [output], tensors, shapes=sample_shapes(dense, feed), declared=infer_shapes(dense))
    assert not gradients.refused
    assert set(gradients.values) == set(tensors)
    run = session(model)
    for batch in (5, 3, 1):  # the sample's size and others
        part = {key: array[:batch] for key, array in feed.items()}
        shape = (batch, 6, 11) if name == "decoder" else (batch, 10)
        vector = rng.standard_normal(shape).astype(np.float32)
        expected = torch_gradients(dense, part, vector)
        found = run.run([f"g:{t}" for t in tensors], {**part, f"v:{output}": vector})
        for tensor, gradient in zip(tensors, found, strict=True):
            assert gradient.shape == expected[tensor].shape
            error = np.abs(gradient - expected[tensor]).max() / np.abs(expected[tensor]).max()
            assert error < 1e-4, tensor
