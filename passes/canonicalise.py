"""Canonical form: what exporters write in many ways is brought into one, without changing a single output bit.

Functions are inlined; weights in Constant nodes become initializers; Identity nodes vanish; what is computed from parameters
or from declared shapes alone is computed at once; before heads are split, packed projections are parted and biases of heads
added; Splits state their sizes; unused nodes and initializers are dropped; nodes are sorted. The one exception: projections
inside onnxruntime's own Attention are written out, which rounds otherwise (see `mscompile.passes.attention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.files import LISTED
from mscompile.network.scm import captured, infer_shapes
from mscompile.operators import Dim, Shape, is_parameter
from mscompile.passes.attention import SpellOutAttention, StateScales
from mscompile.passes.budget import affordable, evaluate
from mscompile.passes.heads import ApplyBeforeHeads
from mscompile.passes.movement import ShortenMovement
from mscompile.passes.readers import add_parameter, array_of, name_outputs
from mscompile.passes.shapes import FoldShapes


@dataclass(frozen=True)
class RemoveIdentities(ir.passes.InPlacePass):
    """Users of an Identity use its input. Where it makes a model output, that name goes to its input, if it is free to.

    onnx-ir's own pass of this kind takes away the name of an output that is passed on as another one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            source = node.inputs[0] if node.op_type == "Identity" and node.domain in ("", "ai.onnx") else None
            if source is None or node.graph is None:
                continue
            target, producer = node.outputs[0], source.producer()
            if target.is_graph_output():
                if source.is_graph_output() or producer is None or producer.graph is not node.graph:
                    continue
                source.name, source.shape, source.type = target.name, target.shape or source.shape, target.type
            ir.convenience.replace_all_uses_with(target, source, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class FoldParameters(ir.passes.InPlacePass):
    """What is computed from parameters alone is computed once, by onnxruntime, and stored.

    Readers want their weights at hand. Left to be computed at run time is what would make the file larger: casts and
    dequantised weights, repeated values, and weights that other nodes use as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        graph = model.graph
        fixed: dict[ir.Value, ir.Node] = {}
        for node in graph:
            inputs = [v for v in node.inputs if v is not None]
            plain = node.domain in ("", "ai.onnx") and node.op_type not in IMPURE and not any(captured(node))
            if inputs and plain and all(v in fixed or is_parameter(v) for v in inputs):
                fixed.update(dict.fromkeys(node.outputs, node))
        fixed = affordable(model, fixed)
        wanted = [v for v in fixed if not v.is_graph_output() and any(use.node not in fixed.values() for use in v.uses())]
        if not wanted:
            return ir.passes.PassResult(model, False)
        values = evaluate(model, wanted)
        modified = False
        for value in (v for v in wanted if v.name in values):
            array, sources = values[value.name or ""], _sources(value, fixed)
            dtype = value.dtype or ir.DataType.from_numpy(array.dtype)
            saved = sum(_bytes(source) for source in sources if len(list(source.uses())) == 1)
            if array.nbytes > saved + SLACK:
                continue
            name, value.name = value.name, None
            tensor = ir.tensor(array, dtype=dtype, name=name)
            stored = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
            graph.register_initializer(stored)
            value.replace_all_uses_with(stored)
            value.name = f"{name}.computed"
            modified = True
        return ir.passes.PassResult(model, modified)


_RANDOM = "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout"
_OTHER = "DequantizeLinear QuantizeLinear If Loop Scan Optional SequenceConstruct SequenceEmpty SplitToSequence"
IMPURE = frozenset([*_RANDOM.split(), *_OTHER.split()])
"""Operators that are left to run time: random, stateful or quantised ones, and those on other things than tensors."""
SLACK = 1 << 16
"""Bytes that storing a computed parameter may add to the file.

An embedding that is transposed to be read by the outputs as well is stored twice up to here, though nothing need be cut: as
long as it is computed the tensor that it reads cannot be, and what is folded into a reader makes it another weight than
what is looked up. A larger one stays tied, and what it reads whole.
"""


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)


def _sources(value: ir.Value, fixed: Mapping[ir.Value, ir.Node]) -> set[ir.Value]:
    """Stored parameters that a computed one comes from."""
    waiting, found = [value], set[ir.Value]()
    while waiting:
        node = fixed.get(waiting.pop())
        for source in () if node is None else node.inputs:
            if source is not None and source in fixed:
                waiting.append(source)
            elif source is not None:
                found.add(source)
    return found


@dataclass(frozen=True)
class SpellOutSplits(ir.passes.InPlacePass):
    """A Split into equal parts states its sizes, so that these can come to differ."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        opset, modified = model.graph.opset_imports.get("", 1), False
        shapes: Mapping[str, Shape] | None = None
        for node in model.graph:
            if node.op_type != "Split" or node.domain not in ("", "ai.onnx") or "split" in node.attributes:
                continue
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                continue
            shapes = infer_shapes(model) if shapes is None else shapes
            parts = [shapes.get(value.name or "") for value in node.outputs]
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            sizes = [None if part is None else part[axis] for part in parts]
            if not all(isinstance(size, int) for size in sizes):
                continue
            if opset >= 13:
                node.resize_inputs(2)
                node.replace_input_with(1, add_parameter(model.graph, f"{node.outputs[0].name}.split", np.array(sizes)))
                node.attributes.pop("num_outputs", None)
            else:
                node.attributes.add(ir.AttrInt64s("split", sizes))  # type: ignore[arg-type]
            modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class PartBeforeHeads(ir.passes.InPlacePass):
    """A packed projection of queries, keys and values is parted before its heads are split.

    ``x[..., 3·H·D] -> Reshape [..., 3, H, D] -> Transpose -> one of the three`` becomes ``Split(x)`` with a Reshape and a
    Transpose for each part: the same elements in the same places, but each part has an axis of its own.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        candidates = [n for n in model.graph if n.op_type == "Reshape" and n.domain in ("", "ai.onnx")]
        if not candidates:
            return ir.passes.PassResult(model, False)
        shapes = infer_shapes(model)
        modified = [_part(model, node, shapes) for node in candidates]
        return ir.passes.PassResult(model, any(modified))


def _part(model: ir.Model, node: ir.Node, shapes: Mapping[str, Shape]) -> bool:
    source, target = node.inputs
    shape = None if source is None else shapes.get(source.name or "")
    if target is None or not shape or not is_parameter(target) or node.outputs[0].is_graph_output():
        return False
    if not node.outputs[0].uses():
        return False
    entries = array_of(target).ravel().tolist()
    rank, size = len(shape), shape[-1]
    # The last axis, and it alone, is split, into parts first.
    if not isinstance(size, int) or len(entries) < rank + 1 or 0 in entries[rank - 1 :] or -1 in entries[rank - 1 :]:
        return False
    if int(np.prod(entries[rank - 1 :])) != size or not 2 <= entries[rank - 1] <= PARTS:
        return False
    count, value, perm = entries[rank - 1], node.outputs[0], list(range(len(entries)))
    (use, *more) = value.uses()
    if use.node.op_type == "Transpose" and not more and "perm" in use.node.attributes:
        value, perm = use.node.outputs[0], list(use.node.attributes["perm"].as_ints())
    axis = perm.index(rank - 1)
    picks = [_picked(user.node, axis, count, len(perm)) for user in value.uses()]
    if value.is_graph_output() or not all(picks) or not picks:
        return False
    graph, tape = model.graph, ir.tape.Tape()
    sizes = np.full(count, size // count, dtype=np.int64)
    if model.graph.opset_imports.get("", 1) >= 13:
        parts = tape.op_multi_out(
            "Split",
            [source, add_parameter(graph, f"{node.outputs[0].name}.parts", sizes)],
            {"axis": rank - 1},
            num_outputs=count,
        )
    else:
        parts = tape.op_multi_out("Split", [source], {"axis": rank - 1, "split": sizes.tolist()}, num_outputs=count)
    heads = add_parameter(graph, f"{node.outputs[0].name}.heads", np.array(entries[: rank - 1] + entries[rank:]))
    order = [p - (p > rank - 1) for p in perm if p != rank - 1]
    picked = list(itertools.chain.from_iterable(picks))
    whole = order == sorted(order) and _alike([*shape[:-1], size // count], entries[: rank - 1] + entries[rank:])
    replaced: list[tuple[ir.Value, ir.Value]] = []
    for index, old in picked:
        if whole and not old.is_graph_output() and sum(index == other for other, _ in picked) == 1:
            parts[index].shape, parts[index].type = old.shape, old.type
            replaced.append((old, parts[index]))
            continue
        new = tape.op("Reshape", [parts[index], heads])
        if order != sorted(order):
            new = tape.op("Transpose", [new], {"perm": order})
        new.shape, new.type = old.shape, old.type
        replaced.append((old, new))
    name_outputs(graph, tape.nodes, node.outputs[0].name or "heads")
    graph.insert_before(node, tape.nodes)
    for old, new in replaced:
        name, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = name
    return True


def _alike(shape: Sequence[Dim], target: Sequence[int]) -> bool:
    """Whether a Reshape to the target leaves the shape as it is."""
    differing = [entry for size, entry in zip(shape, target, strict=False) if entry not in (0, size)]
    return len(shape) == len(target) and differing in ([], [-1])


def _picked(node: ir.Node, axis: int, count: int, rank: int) -> list[tuple[int, ir.Value]]:
    """Indices of an axis that a node takes, the axis then gone, and the values it gives; none if it does anything else."""
    if node.op_type == "Split" and node.attributes.get("axis", ir.AttrInt64("axis", 0)).as_int() % rank == axis:
        squeezed = [_squeezed(value, axis, rank) for value in node.outputs]
        whole = len(squeezed) == count and all(value is not None for value in squeezed)
        return [(index, value) for index, value in enumerate(squeezed) if value is not None] if whole else []
    if node.op_type == "Gather" and node.inputs[1] is not None and is_parameter(node.inputs[1]):
        index = array_of(node.inputs[1])
        along = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return [(int(index) % count, node.outputs[0])] if index.ndim == 0 and along % rank == axis else []
    if node.op_type != "Slice" or len(node.inputs) < 4 or not all(v is None or is_parameter(v) for v in node.inputs[1:]):
        return []
    start, end, axes, *step = (array_of(v).tolist() for v in node.inputs[1:])
    if [a % rank for a in axes] != [axis] or step not in ([], [[1]]):
        return []
    taken, left = list(range(count))[start[0] : end[0]], _squeezed(node.outputs[0], axis, rank)
    return [(taken[0], left)] if len(taken) == 1 and left is not None else []


def _squeezed(value: ir.Value, axis: int, rank: int) -> ir.Value | None:
    """What becomes of a value whose axis of size 1 is taken away; None if anything else happens to it."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Squeeze" or value.is_graph_output():
        return None
    squeeze = uses[0].node
    given = squeeze.attributes["axes"].as_ints() if "axes" in squeeze.attributes else None
    if given is None and len(squeeze.inputs) > 1 and squeeze.inputs[1] is not None and is_parameter(squeeze.inputs[1]):
        given = array_of(squeeze.inputs[1]).tolist()
    return squeeze.outputs[0] if given is not None and [a % rank for a in given] == [axis] else None


PARTS = 8
"""Parts into which a projection is packed at most: queries, keys and values are three."""


@dataclass(frozen=True)
class FixInitializers(ir.passes.InPlacePass):
    """In old files initializers are listed as inputs only because the format asked for it: they are fixed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        if (model.ir_version or LISTED) >= LISTED:
            return ir.passes.PassResult(model, False)
        return common.RemoveInitializersFromInputsPass()(model)


@dataclass(frozen=True)
class InlineFunctions(ir.passes.InPlacePass):
    """Functions that the file defines are written out where they are called."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        return common.InlinePass()(model) if model.functions else ir.passes.PassResult(model, False)


CANONICALISE = ir.passes.Sequential(
    InlineFunctions(),
    FixInitializers(),
    common.TopologicalSortPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    RemoveIdentities(),
    FoldParameters(),
    FoldShapes(),
    FoldParameters(),
    common.RemoveUnusedNodesPass(),  # what is left of computing shapes would count as use
    SpellOutSplits(),
    SpellOutAttention(),
    StateScales(),
    PartBeforeHeads(),
    ShortenMovement(),
    PartBeforeHeads(),  # shorter chains show more
    ApplyBeforeHeads(),
    ShortenMovement(),
    common.RemoveUnusedNodesPass(),
)
