"""Shape arithmetic: what exporters compute at run time though the file already says it.

Sizes are followed through Shape, Gather, Slice, Concat and integer arithmetic as numbers or names. Whatever comes out as
numbers alone becomes an initializer, and a Reshape or Expand whose target is a mix of numbers and of sizes of its own input
gets a stored target with 0, −1 or 1 in their place. No output bit changes; the shapes that the file declares are believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import infer_shapes
from mscompile.operators import Dim, Shape, is_parameter
from mscompile.passes.readers import add_parameter

LARGEST = 64
"""Entries up to which an integer tensor is followed: shapes, places and sizes are short."""
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Known:
    """What is known of an integer tensor: its entries, and whether it is a scalar."""

    entries: tuple[Dim, ...]
    scalar: bool = False

    def array(self) -> np.ndarray | None:
        """The value, where every entry is a number."""
        if not all(isinstance(entry, int) for entry in self.entries):
            return None
        array = np.array(self.entries, dtype=np.int64)
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
            kind = output.dtype or ir.DataType.INT64
            stored = add_parameter(graph, f"{output.name}.value", array.astype(kind.numpy()))
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
    if tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > LARGEST or len(tensor.shape) > 1:
        return None
    return Known(tuple(int(n) for n in tensor.numpy().ravel()), scalar=len(tensor.shape) == 0)


def _spell_out(graph: ir.Graph, node: ir.Node, known: Mapping[ir.Value, Known], shapes: Mapping[str, Shape]) -> bool:
    """Give a Reshape or Expand a stored target, where it is known well enough."""
    if node.op_type not in ("Reshape", "Expand") or node.domain not in STANDARD or len(node.inputs) < 2:
        return False
    source, target = node.inputs
    found = None if target is None else known.get(target)
    shape = None if source is None else shapes.get(source.name or "")
    if found is None or shape is None or found.scalar:
        return False
    if node.op_type == "Reshape":
        entries = _reshape_target(found.entries, shape, zero=not _attribute(node, "allowzero", 0))
    else:
        entries = _expand_target(found.entries, shape)
    if entries is None:
        return False
    node.replace_input_with(1, add_parameter(graph, f"{node.outputs[0].name}.shape", np.array(entries, dtype=np.int64)))
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


def _expand_target(entries: tuple[Dim, ...], shape: Shape) -> list[int] | None:
    """1 for a size of the input at the same place."""
    shift = len(entries) - len(shape)
    target = [
        entry
        if isinstance(entry, int)
        else 1
        if place >= shift and entry is not None and entry == shape[place - shift]
        else None
        for place, entry in enumerate(entries)
    ]
    return None if None in target else [entry for entry in target if entry is not None]


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
    return Known(tuple(data.entries[i] for i in index.entries if isinstance(i, int)), index.scalar)


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
    return Known(data.entries[slice(*numbers)])


def _concat(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    """Parts of known length with entries that are not known are told apart by where they come from."""
    entries: list[Dim] = []
    for value, known in zip(node.inputs, given, strict=True):
        shape = None if value is None else shapes.get(value.name or "")
        if known is not None:
            entries += known.entries
        elif value is not None and shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            entries += [f"{value.name}[{i}]" for i in range(min(shape[0], LARGEST + 1))]
        else:
            return None
    return Known(tuple(entries))


def _same(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return given[0]


def _to_vector(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return None if given[0] is None or not given[0].scalar else Known(given[0].entries)


def _to_scalar(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    return None if given[0] is None or len(given[0].entries) != 1 else Known(given[0].entries, scalar=True)


def _reshape(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    shape = shapes.get(node.outputs[0].name or "")
    if given[0] is None or shape is None or len(shape) > 1:
        return None
    return Known(given[0].entries, scalar=not shape)


def _cast(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    integers = (int(ir.DataType.INT64), int(ir.DataType.INT32))
    return given[0] if _attribute(node, "to", 0) in integers else None


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
        return Known(tuple(entries), left.scalar and right.scalar)

    return rule


def _filled(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del shapes
    shape, value = given[0], node.attributes.get("value")
    length = None if shape is None or shape.scalar or len(shape.entries) != 1 else shape.entries[0]
    if not isinstance(length, int) or length > LARGEST or value is None:
        return None
    filling = value.as_tensor().numpy()
    return Known((int(filling.ravel()[0]),) * length) if filling.dtype.kind in "iu" else None


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
    return Known(tuple(entries), left.scalar)


def _where(node: ir.Node, given: list[Known | None], shapes: Mapping[str, Shape]) -> Known | None:
    del node, shapes
    condition, yes, no = given
    if condition is None or yes is None or no is None or not len(condition.entries) == len(yes.entries) == len(no.entries):
        return None
    entries = [
        (a if c else b) if isinstance(c, int) else None
        for c, a, b in zip(condition.entries, yes.entries, no.entries, strict=True)
    ]
    return Known(tuple(entries), yes.scalar)


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
