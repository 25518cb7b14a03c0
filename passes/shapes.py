"""Shape arithmetic: what exporters compute at run time though the file already says it.

Sizes are followed through Shape, Gather, Slice, Concat and integer arithmetic as numbers or names. Whatever comes out as
numbers alone becomes an initializer, and a Reshape or Expand whose target is a mix of numbers and of sizes of its own input
gets a stored target with 0, −1 or 1 in their place. An Expand by sizes of another tensor, as of a class token by how many
samples there are, gets a target that is computed at those places alone. No output bit changes; the shapes that the file
declares are believed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import infer_shapes
from mscompile.operators import Dim, NodeView, Shape, is_parameter
from mscompile.passes.readers import add_parameter, name_outputs

LARGEST = 64
"""Entries up to which an integer tensor is followed: shapes, places and sizes are short."""
STANDARD = ("", "ai.onnx")
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Known:
    """What is known of an integer or boolean tensor: its entries, whether it is a scalar, and its type."""

    entries: tuple[Dim, ...]
    scalar: bool = False
    kind: ir.DataType = ir.DataType.INT64

    def array(self) -> np.ndarray | None:
        """The value, where every entry is a number."""
        if not all(isinstance(entry, int) for entry in self.entries):
            return None
        array = np.array(self.entries, dtype=self.kind.numpy())
        return array.reshape(()) if self.scalar else array


@dataclass(frozen=True)
class FoldShapes(ir.passes.InPlacePass):
    """Compute at once what shape arithmetic would compute at run time."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        graph = model.graph
        if not any(node.op_type in ("Shape", "Size") and node.domain in STANDARD for node in graph):
            return ir.passes.PassResult(model, False)
        modified = False
        while _fold(graph, infer_shapes(model)):  # what is known now may tell more
            modified = True
        return ir.passes.PassResult(model, modified)


def _fold(graph: ir.Graph, shapes: Mapping[str, Shape]) -> bool:
    known, modified = dict[ir.Value, Known](), False
    for node in list(graph):
        rule = RULES.get(node.op_type) if node.domain in STANDARD else None
        found = None if rule is None else rule(node, [_known(v, known) for v in node.inputs], shapes)
        if found is None or len(found.entries) > LARGEST:
            modified |= _spell_out(graph, node, known, shapes)
            continue
        array, output = found.array(), node.outputs[0]
        known[output] = found
        if array is not None and output.uses():
            stored = add_parameter(graph, f"{output.name}.value", array)
            for use, operand in list(output.uses()):
                use.replace_input_with(operand, stored)
            known[stored] = found
            modified = True
    return modified


def _known(value: ir.Value | None, known: Mapping[ir.Value, Known]) -> Known | None:
    if value is None or value in known:
        return None if value is None else known[value]
    if not is_parameter(value):
        return None
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype not in (*INTEGERS, ir.DataType.BOOL) or tensor.size > LARGEST or len(tensor.shape) > 1:
        return None
    return Known(tuple(int(n) for n in tensor.numpy().ravel()), len(tensor.shape) == 0, tensor.dtype)


def _spell_out(graph: ir.Graph, node: ir.Node, known: Mapping[ir.Value, Known], shapes: Mapping[str, Shape]) -> bool:
    """Give a Reshape or Expand a stored target, where it is known well enough."""
    if node.op_type not in ("Reshape", "Expand") or node.domain not in STANDARD or len(node.inputs) < 2:
        return False
    source, target = node.inputs
    found = None if target is None else _known(target, known)
    shape = None if source is None else shapes.get(source.name or "")
    if target is None or found is None or shape is None or found.scalar:
        return False
    entries: list[int] | None
    if is_parameter(target):
        entries = _own_size(node, found.entries, shape, shapes.get(node.outputs[0].name or ""))
    elif node.op_type == "Reshape":
        entries = _reshape_target(found.entries, shape, zero=_zero_copies(node))
    else:
        partly = _expand_target(found.entries, shape)
        entries = [entry for entry in partly if entry is not None]
        if len(entries) < len(partly):
            there = NodeView(node, shapes, graph.opset_imports.get("", 1)).entries(1)
            return there != tuple(partly) and _spell_out_rest(graph, node, target, partly)
    if entries is None:
        return False
    node.replace_input_with(1, add_parameter(graph, f"{node.outputs[0].name}.shape", np.array(entries, dtype=np.int64)))
    return True


def _zero_copies(node: ir.Node) -> bool:
    """Whether 0 in the target of a Reshape stands for the size of the input at the same place."""
    return not _attribute(node, "allowzero", 0)


def _own_size(node: ir.Node, entries: tuple[Dim, ...], source: Shape, target: Shape | None) -> list[int] | None:
    """0 for the −1 of a stored target that is the size of the input at its place, where shape inference does not see it."""
    if node.op_type != "Reshape" or not _zero_copies(node) or entries.count(-1) != 1 or 0 in entries:
        return None
    place = entries.index(-1)
    if place >= len(source) or isinstance(source[place], int) or source[place] is None or target is None:
        return None
    others = [dim for axis, dim in enumerate(source) if axis != place]
    if target[place] == source[place] or not all(isinstance(dim, int) for dim in others):
        return None
    if np.prod(others, dtype=np.int64) != -np.prod(entries, dtype=np.int64):  # type: ignore[arg-type]
        return None
    return [0 if entry == -1 else int(entry) for entry in entries]  # type: ignore[arg-type]


def _spell_out_rest(graph: ir.Graph, node: ir.Node, target: ir.Value, partly: Sequence[int | None]) -> bool:
    """Compute the target of an Expand at the places alone that are not known."""
    if all(entry is None for entry in partly):
        return False
    parts: list[ir.Value] = []
    tape, name = ir.tape.Tape(), node.outputs[0].name
    for unknown, group in itertools.groupby(enumerate(partly), key=lambda pair: pair[1] is None):
        places, entries = zip(*group, strict=True)
        stored = add_parameter(graph, f"{name}.{'places' if unknown else 'sizes'}", np.array(places if unknown else entries))
        parts.append(tape.op("Gather", [target, stored]) if unknown else stored)
    node.replace_input_with(1, tape.op("Concat", parts, {"axis": 0}))
    name_outputs(graph, tape.nodes, f"{name}.shape")
    graph.insert_before(node, tape.nodes)
    return True


def _reshape_target(entries: tuple[Dim, ...], shape: Shape, *, zero: bool) -> list[int] | None:
    """0 for a size of the input at the same place, −1 for one that is not known; None for more than one of these."""
    target: list[int | None] = []
    for place, entry in enumerate(entries):
        same = place < len(shape) and isinstance(entry, str) and entry == shape[place]
        target.append(entry if isinstance(entry, int) else 0 if same and zero else None)
    if target.count(None) > 1 or (None in target and -1 in target) or (0 in entries):
        return None
    return [-1 if entry is None else entry for entry in target]


def _expand_target(entries: tuple[Dim, ...], shape: Shape) -> list[int | None]:
    """1 for a size of the input at the same place, None for what is not known."""
    shift = len(entries) - len(shape)
    own = [shape[place - shift] if place >= shift else None for place in range(len(entries))]
    return [
        1 if entry is not None and entry == size else entry if isinstance(entry, int) else None
        for entry, size in zip(entries, own, strict=True)
    ]


# -- rules: (node, what is known of its inputs, shapes) -> what is known of its output --

Rule = Callable[[ir.Node, list[Known | None], Mapping[str, Shape]], Known | None]


def _attribute(node: ir.Node, name: str, default: int | None) -> int | None:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _shape_of(node: ir.Node, shapes: Mapping[str, Shape]) -> Shape | None:
    source = node.inputs[0]
    shape = None if source is None else shapes.get(source.name or "")
    if shape is None or source is None:
        return None
    # A size without a name is told apart by where it was read.
    return tuple(f"{source.name}@{axis}" if dim is None else dim for axis, dim in enumerate(shape))


def _shape(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del given
    shape = _shape_of(node, shapes)
    return None if shape is None else Known(shape[_attribute(node, "start", None) : _attribute(node, "end", None)])


def _size(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del given
    shape = _shape_of(node, shapes)
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return Known((int(np.prod(shape, dtype=np.int64)),), scalar=True)  # type: ignore[arg-type]


def _gather(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    data, index = given[:2]
    if data is None or index is None or data.scalar or _attribute(node, "axis", 0) != 0:
        return None
    if not all(isinstance(i, int) and -len(data.entries) <= i < len(data.entries) for i in index.entries):
        return None
    return Known(tuple(data.entries[i] for i in index.entries if isinstance(i, int)), index.scalar, data.kind)


def _slice(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    data = given[0]
    if data is None or data.scalar:
        return None
    if "starts" in node.attributes:
        numbers: list[int | None] = [node.attributes[name].as_ints()[0] for name in ("starts", "ends")]
    else:
        parts = [given[i] if i < len(given) else None for i in (1, 2, 4)]
        absent = [i >= len(node.inputs) or node.inputs[i] is None for i in (1, 2, 4)]
        if any(part is None and not gone for part, gone in zip(parts, absent, strict=True)):
            return None
        numbers = [None if part is None else part.entries[0] for part in parts]  # type: ignore[misc]
    if any(isinstance(n, str) for n in numbers):
        return None
    return replace(data, entries=data.entries[slice(*numbers)])


def _concat(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    """Parts of known length with entries that are not known are told apart by where they come from."""
    entries: list[Dim] = []
    kinds = {known.kind for known in given if known is not None}
    if len(kinds) > 1:
        return None
    for value, known in zip(node.inputs, given, strict=True):
        shape = None if value is None else shapes.get(value.name or "")
        if known is not None:
            entries += known.entries
        elif value is not None and shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            entries += [f"{value.name}[{i}]" for i in range(min(shape[0], LARGEST + 1))]
        else:
            return None
    return Known(tuple(entries), kind=kinds.pop() if kinds else ir.DataType.INT64)


def _same(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return given[0]


def _to_vector(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return None if given[0] is None or not given[0].scalar else replace(given[0], scalar=False)


def _to_scalar(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return None if given[0] is None or len(given[0].entries) != 1 else replace(given[0], scalar=True)


def _reshape(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    shape = shapes.get(node.outputs[0].name or "")
    if given[0] is None or shape is None or len(shape) > 1:
        return None
    return replace(given[0], scalar=not shape)


def _cast(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    kind = ir.DataType(_attribute(node, "to", 0) or 0)
    return replace(given[0], kind=kind) if given[0] and kind in INTEGERS else None


def _arithmetic(compute: Callable[[int, int], int | None]) -> Rule:
    def rule(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
        del shapes
        left, right = given
        if (
            left is None
            or right is None
            or 1 not in (len(left.entries), len(right.entries), len(left.entries) // len(right.entries))
        ):
            return None
        count = max(len(left.entries), len(right.entries))
        one, other = (k.entries * (count if len(k.entries) == 1 else 1) for k in (left, right))
        if len(one) != len(other):
            return None
        neutral = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}[node.op_type]
        entries: list[Dim] = []
        for a, b in zip(one, other, strict=True):
            if isinstance(a, int) and isinstance(b, int):
                entries.append(compute(a, b))
            elif b == neutral:
                entries.append(a)
            elif a == neutral and node.op_type in ("Mul", "Add"):
                entries.append(b)
            else:
                entries.append(None)
        return Known(tuple(entries), left.scalar and right.scalar, left.kind)

    return rule


def _filled(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    shape, value = given[0], node.attributes.get("value")
    length = None if shape is None or shape.scalar or len(shape.entries) != 1 else shape.entries[0]
    if not isinstance(length, int) or length > LARGEST or value is None:
        return None
    filling = value.as_tensor()
    if filling.dtype not in INTEGERS:
        return None
    return Known((int(filling.numpy().ravel()[0]),) * length, kind=filling.dtype)


def _equal(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    """1 and 0 for true and false; a size is never negative."""
    del node, shapes
    left, right = given
    if left is None or right is None or len(left.entries) != len(right.entries):
        return None
    entries: list[Dim] = []
    for a, b in zip(left.entries, right.entries, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            entries.append(int(a == b))
        elif isinstance(a, str) and isinstance(b, str) and a == b:
            entries.append(1)
        else:
            negative = any(isinstance(n, int) and n < 0 for n in (a, b)) and any(isinstance(n, str) for n in (a, b))
            entries.append(0 if negative else None)
    return Known(tuple(entries), left.scalar, ir.DataType.BOOL)


def _where(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    condition, yes, no = given
    if condition is None or yes is None or no is None or not len(condition.entries) == len(yes.entries) == len(no.entries):
        return None
    entries = [
        (a if c else b) if isinstance(c, int) else None
        for c, a, b in zip(condition.entries, yes.entries, no.entries, strict=True)
    ]
    return replace(yes, entries=tuple(entries))


RULES: Mapping[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _same,
    "Cast": _cast,
    "Unsqueeze": _to_vector,
    "Squeeze": _to_scalar,
    "Reshape": _reshape,
    "ConstantOfShape": _filled,
    "Equal": _equal,
    "Where": _where,
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    # Integer division rounds towards zero; a divisor of zero fails at run time, as it should.
    "Div": _arithmetic(lambda a, b: None if b == 0 else int(a / b) if abs(a) < 2**53 else None),
}
