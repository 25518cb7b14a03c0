"""Interventions on ONNX models by graph surgery.

The graphs made here are thrown away after they have run. They are edited with onnx-graphsurgeon on plain ModelProtos and
share no code with the passes, so that what is checked here is checked independently of how it was compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from mscompile.network.layout import ROWS, Layout
from mscompile.verification.skeletons import HEAVY, Skeleton, Weights, stub

MASK = "mscompile.mask:"
SOURCE = "mscompile.source:"
WEIGHT = "mscompile.weight:"
SHIFT = "mscompile.shift:"
MATRIX = "mscompile.matrix:"


@dataclass(frozen=True)
class Patch:
    """Where to intervene: a tensor, its rank and its channel axis, and where it holds the samples."""

    tensor: str
    rank: int
    axis: int
    layout: Layout = ROWS

    def mask(self, swapped: npt.NDArray[np.bool_], size: int = 1) -> npt.NDArray[np.bool_]:
        """[samples, channels] selection as a tensor that broadcasts over positions.

        One sample stands for all. `size` is that of the axis of the samples, where positions count on it, too.
        """
        rows = swapped if len(swapped) == 1 else self.layout.rows(swapped, size)
        shape = [1] * self.rank
        shape[self.layout.axis], shape[self.axis] = rows.shape
        return (rows if self.layout.axis < self.axis else rows.T).reshape(shape)


def probe(model: Skeleton, tensors: Iterable[str]) -> Skeleton:
    """Copy of a model that also returns the named tensors."""
    graph = gs.import_onnx(model.proto)
    tensors_by_name = graph.tensors()
    present = {output.name for output in graph.outputs}
    graph.outputs += [_typed(tensors_by_name[name], model) for name in tensors if name not in present]
    return _export(graph, model)


def patched(model: Skeleton, patches: Iterable[Patch]) -> Skeleton:
    """Copy of a model in which each patched tensor becomes ``Where(mask, source, tensor)``.

    New inputs per patch: ``MASK + tensor``, bool, [samples, …, channels, …] with ones elsewhere; ``SOURCE + tensor``, like
    the tensor. Everything downstream is recomputed.
    """
    graph = gs.import_onnx(model.proto)
    tensors = graph.tensors()
    for patch in patches:
        tensor = _typed(tensors[patch.tensor], model)
        mask = gs.Variable(MASK + patch.tensor, dtype=np.bool_, shape=[None] * patch.rank)
        source = gs.Variable(SOURCE + patch.tensor, dtype=tensor.dtype, shape=[None] * patch.rank)
        graph.inputs += [mask, source]
        _divert(graph, tensor, lambda inner, mask=mask, source=source: ("Where", [mask, source, inner], {}))
    graph.toposort()
    return _export(graph, model)


@dataclass(frozen=True)
class Reweighted:
    """New weights of one reader of a tensor; fields as in `WindowPlan`."""

    reader: str
    places: npt.NDArray[np.int64] | None
    columns: npt.NDArray[np.float32]
    response: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Do:
    """Mechanism replacement at one tensor: ``a_P := constants + matrix · a_K`` on its channel axis.

    Attributes
    ----------
    kept, constants, matrix
        Retained channels; [replaced] values; [replaced, retained] coefficients or None.
    readers
        Readers that take new weights over the retained channels instead.
    """

    patch: Patch
    kept: npt.NDArray[np.int64]
    constants: npt.NDArray[np.float32]
    matrix: npt.NDArray[np.float32] | None
    readers: tuple[Reweighted, ...] = ()


def replaced(model: Skeleton, interventions: Iterable[Do]) -> Skeleton:
    """Copy of a model under mechanism replacement, nothing folded: every use of a tensor sees the replaced channels."""
    graph = gs.import_onnx(model.proto)
    tensors = graph.tensors()
    new: dict[str, npt.NDArray[np.generic]] = {}
    for do in interventions:
        tensor, patch = _typed(tensors[do.patch.tensor], model), do.patch
        last = [a for a in range(patch.rank) if a != patch.axis] + [patch.axis]
        back = [int(a) for a in np.argsort(last)]
        dtype = tensor.dtype
        size = len(do.kept) + len(do.constants)
        away = np.setdiff1d(np.arange(size), do.kept)
        places = np.argsort(np.concatenate([do.kept, away]))
        prefix = f"mscompile.do:{patch.tensor}:"

        def step(name: str, op: str, inputs: list[gs.Tensor], prefix: str = prefix, **attrs: object) -> gs.Variable:
            out = gs.Variable(prefix + name)
            graph.nodes.append(gs.Node(op, name=prefix + name, inputs=inputs, outputs=[out], attrs=attrs))
            return out

        def constant(name: str, array: npt.NDArray[np.generic], prefix: str = prefix) -> gs.Constant:
            return _constant(prefix + name, array, new)

        final = gs.Variable(prefix + "value", dtype=dtype)
        consumers = list(tensor.outputs)
        rows = step("rows", "Transpose", [tensor], perm=last)
        kept = step("kept", "Gather", [rows, constant("kept.index", do.kept)], axis=patch.rank - 1)
        source, matrix = kept, do.matrix
        if matrix is None:  # of one channel, and zero: for all that are retained it would be as large as the weights
            source = step("first", "Gather", [kept, constant("zero", np.zeros(1, np.int64))], axis=patch.rank - 1)
            matrix = np.zeros((len(do.constants), 1), dtype=np.float32)
        mapped = step("mapped", "MatMul", [source, constant("matrix", matrix.T.astype(dtype))])
        shifted = step("shifted", "Add", [mapped, constant("constants", do.constants.astype(dtype))])
        joined = step("joined", "Concat", [kept, shifted], axis=patch.rank - 1)
        ordered = step("ordered", "Gather", [joined, constant("places", places)], axis=patch.rank - 1)
        graph.nodes.append(
            gs.Node("Transpose", name=prefix + "value", inputs=[ordered], outputs=[final], attrs={"perm": back})
        )
        _redirect(tensor, final, consumers)
        for reader in do.readers:
            _reweight(graph, tensor, do, reader, new)
    graph.toposort()
    return _export(graph, model, new)


def _constant(name: str, array: npt.NDArray[np.generic], weights: dict[str, npt.NDArray[np.generic]]) -> gs.Constant:
    """A constant, of which the graph does not hold a heavy one's data: it is put among the weights."""
    array = np.ascontiguousarray(array)
    if array.nbytes < HEAVY or array.dtype.kind != "f":
        return gs.Constant(name, array)
    weights[name] = array
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = stub(name, kind, array.shape, array)
    return gs.Constant(name, LazyValues(tensor))


def _reweight(
    graph: gs.Graph, tensor: gs.Tensor, do: Do, new: Reweighted, weights: dict[str, npt.NDArray[np.generic]]
) -> None:
    """Give one reader its new weights: over retained channels and ones (a convolution) or over all features (a product)."""
    node = next(n for n in graph.nodes if any(o.name == new.reader for o in n.outputs))
    prefix, dtype = f"mscompile.reader:{new.reader}:", tensor.dtype
    retained, taps, outputs = new.columns.shape
    if new.places is None:
        kernel = node.inputs[1].shape[2:]
        kept, first, ones, stacked = (
            gs.Variable(prefix + name, dtype=dtype) for name in ("kept", "first", "ones", "stacked")
        )
        graph.nodes += [
            gs.Node("Gather", inputs=[tensor, gs.Constant(prefix + "index", do.kept)], outputs=[kept], attrs={"axis": 1}),
            gs.Node(
                "Gather",
                inputs=[tensor, gs.Constant(prefix + "zero", np.zeros(1, np.int64))],
                outputs=[first],
                attrs={"axis": 1},
            ),
            gs.Node("Pow", inputs=[first, gs.Constant(prefix + "nought", np.zeros((), dtype))], outputs=[ones]),  # x⁰ = 1
            gs.Node("Concat", inputs=[kept, ones], outputs=[stacked], attrs={"axis": 1}),
        ]
        marks = np.zeros((1, taps, outputs), dtype=np.float32)
        marks[0, : len(new.response)] = new.response if len(new.response) == taps else 0.0
        weight = np.concatenate([new.columns, marks]).transpose(2, 0, 1).reshape(outputs, retained + 1, *kernel)
        node.inputs[0] = stacked
    else:
        across = 1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0
        weight = np.zeros((node.inputs[1].shape[across], outputs), dtype)
        weight[new.places.ravel()] = new.columns.reshape(retained * taps, outputs)
        weight = np.moveaxis(weight, 0, across)
    node.inputs[1] = _constant(prefix + "weight", weight.astype(dtype, copy=False), weights)
    if len(new.response) == 1 and (new.places is not None or taps > 1):
        gain = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
        trailing = (1,) * (do.patch.rank - 2 if new.places is None else 0)
        shift = gs.Constant(prefix + "shift", (gain * new.response[0]).astype(dtype).reshape(-1, *trailing))
        plain = gs.Variable(prefix + "plain", dtype=dtype)
        output = node.outputs[0]
        node.outputs[0] = plain
        graph.nodes.append(gs.Node("Add", name=prefix + "shifted", inputs=[plain, shift], outputs=[output]))


def tunable(model: Skeleton, readers: Iterable[str], sites: Iterable[Patch] = ()) -> Skeleton:
    """Copy of a model in which the readers of the named outputs take their weights as inputs, so that many can be tried.

    New inputs per site: ``MATRIX + tensor``, [channels, channels], and ``SHIFT + tensor``, [channels]: every use of the
    tensor sees ``tensor · matrix + shift`` along the channels. Per reader: ``WEIGHT + output``, as it was, and
    ``SHIFT + output``, added to what it gives: of a product [outputs], of a convolution [outputs, 1, …], through which it
    sees a channel that is one inside the map.
    """
    graph = gs.import_onnx(model.proto)
    for patch in sites:
        _mix(graph, _typed(graph.tensors()[patch.tensor], model), patch)
    nodes = {output.name: node for node in graph.nodes for output in node.outputs}
    for name in readers:
        node, weight = nodes[name], nodes[name].inputs[1]
        dtype = weight.dtype
        given = gs.Variable(WEIGHT + name, dtype=dtype, shape=[None] * len(weight.shape))
        graph.inputs.append(given)
        if len(weight.shape) > 2:
            # Of one sample: the others have the same border. A channel more would not fit onnxruntime's blocks of them.
            one, first, ones, seen = (
                gs.Variable(f"mscompile.{part}:{name}", dtype=dtype) for part in ("one", "first", "ones", "seen")
            )
            zero = gs.Constant(f"mscompile.zero:{name}", np.zeros(1, np.int64))
            nought = gs.Constant(f"mscompile.nought:{name}", np.zeros((), dtype))
            marks = gs.Variable(SHIFT + name, dtype=dtype, shape=[None] * len(weight.shape))
            graph.nodes += [
                gs.Node("Gather", inputs=[node.inputs[0], zero], outputs=[one], attrs={"axis": 0}),
                gs.Node("Gather", inputs=[one, zero], outputs=[first], attrs={"axis": 1}),
                gs.Node("Pow", inputs=[first, nought], outputs=[ones]),  # x⁰ = 1
                gs.Node("Conv", inputs=[ones, marks], outputs=[seen], attrs=dict(node.attrs)),
            ]
            graph.inputs.append(marks)
            shift = seen
        else:
            shift = gs.Variable(SHIFT + name, dtype=dtype, shape=[None])
            graph.inputs.append(shift)
        node.inputs[1] = given
        unshifted = gs.Variable(f"mscompile.unshifted:{name}", dtype=dtype)
        output = node.outputs[0]
        node.outputs[0] = unshifted
        graph.nodes.append(gs.Node("Add", inputs=[unshifted, shift], outputs=[output]))
    graph.toposort()
    return _export(graph, model)


def _mix(graph: gs.Graph, tensor: gs.Tensor, patch: Patch) -> None:
    """Put ``tensor · matrix + shift`` between a tensor and all its consumers."""
    matrix = gs.Variable(MATRIX + patch.tensor, dtype=tensor.dtype, shape=[None, None])
    shift = gs.Variable(SHIFT + patch.tensor, dtype=tensor.dtype, shape=[None])
    graph.inputs += [matrix, shift]
    last = [a for a in range(patch.rank) if a != patch.axis] + [patch.axis]
    consumers = list(tensor.outputs)
    names = ("rows", "mapped", "shifted", "mixed")
    rows, mapped, shifted, mixed = (gs.Variable(f"mscompile.{n}:{patch.tensor}", dtype=tensor.dtype) for n in names)
    graph.nodes += [
        gs.Node("Transpose", inputs=[tensor], outputs=[rows], attrs={"perm": last}),
        gs.Node("MatMul", inputs=[rows, matrix], outputs=[mapped]),
        gs.Node("Add", inputs=[mapped, shift], outputs=[shifted]),
        gs.Node("Transpose", inputs=[shifted], outputs=[mixed], attrs={"perm": [int(a) for a in np.argsort(last)]}),
    ]
    _redirect(tensor, mixed, consumers)


def _export(graph: gs.Graph, origin: Skeleton, more: Weights | None = None) -> Skeleton:
    return origin.with_graph(gs.export_onnx(graph, do_type_check=False), more)


def _divert(graph: gs.Graph, tensor: gs.Tensor, make: object) -> None:
    """Put one node between a tensor and all its consumers."""
    consumers = list(tensor.outputs)
    final = gs.Variable(f"mscompile.patched:{tensor.name}", dtype=tensor.dtype)
    op, inputs, attrs = make(tensor)  # type: ignore[operator]
    graph.nodes.append(gs.Node(op, name=final.name, inputs=inputs, outputs=[final], attrs=attrs))
    _redirect(tensor, final, consumers)


def _redirect(tensor: gs.Tensor, final: gs.Tensor, consumers: Iterable[gs.Node]) -> None:
    for node in consumers:
        for position, value in enumerate(node.inputs):
            if value is tensor:
                node.inputs[position] = final


def _typed(tensor: gs.Tensor, model: Skeleton) -> gs.Tensor:
    """A tensor with its element type filled in; by default that of the first float output."""
    if tensor.dtype is None:
        tensor.dtype = float_type(model)
    return tensor


def float_type(model: Skeleton) -> npt.DTypeLike:
    """Element type of the model's first floating-point output."""
    for output in model.proto.graph.output:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type))
        if dtype.kind not in "iub?":
            return dtype
    return np.dtype(np.float32)


def feed(
    patch: Patch, swapped: npt.NDArray[np.bool_], source: npt.NDArray[np.generic]
) -> Mapping[str, npt.NDArray[np.generic]]:
    """Inputs of a patched graph for one patch."""
    return {MASK + patch.tensor: patch.mask(swapped), SOURCE + patch.tensor: source}
