"""Operators that select, join, pad or resample along axes, and those that only speak of shapes and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import OUT, Barrier, Move, NodeView, Operator, Pick, Port, Signature, Size
from mscompile.operators.backward import Backward, nothing

# -- channels: joining and parting --


def concat(node: NodeView) -> Signature | str:
    """Puts operands side by side on one axis; on the others they run in step."""
    shapes = [node.shape(i) for i in range(len(node.node.inputs))]
    if any(shape is None for shape in shapes):
        return "its operands have no known rank"
    rank = len(shapes[0])  # type: ignore[arg-type]
    along = node.attribute("axis", 1) % rank
    links = tuple((*((i, a) for i in range(len(shapes))), (OUT, a)) for a in range(rank) if a != along)
    sizes = [shape[along] for shape in shapes]  # type: ignore[index]
    if not all(isinstance(size, int) for size in sizes):
        return Signature(links, mixes="joins them with a tensor of unknown size")
    ends = np.cumsum([0, *sizes]).tolist()
    moves = tuple(
        Move((i, along), (OUT, along), np.arange(size, dtype=np.int64), np.arange(ends[i], ends[i + 1], dtype=np.int64))  # type: ignore[arg-type]
        for i, size in enumerate(sizes)
    )
    return Signature(links, moves)


def split(node: NodeView) -> Signature | str:
    """Parts an axis; the others pass to every part."""
    shape, parts = node.shape(0), [node.shape(~i) for i in range(len(node.node.outputs))]
    if shape is None:
        return "its input has no known rank"
    along = node.attribute("axis", 0) % len(shape)
    outs = range(len(parts))
    links = tuple(((0, a), *((~i, a) for i in outs)) for a in range(len(shape)) if a != along)
    sizes = [part[along] if part is not None else None for part in parts]
    if (node.value(1) is not None and node.constant(1) is None) or not all(isinstance(n, int) for n in sizes):
        return Signature(links, mixes="parts them in a way that is not spelled out")
    ends = np.cumsum([0, *sizes]).tolist()
    moves = tuple(Move((0, along), (~i, along), np.arange(ends[i], ends[i + 1], dtype=np.int64)) for i in outs)
    holder: int | str = 1 if node.value(1) is not None else "split"
    if holder == 1 or node.attribute("split", None) is not None:
        return Signature(links, moves, sizes=tuple(Size(holder, i, (~i, along)) for i in outs), copies=True)
    if len(set(sizes)) > 1:
        return Signature(links, mixes="parts them unevenly, in a way that is not spelled out")
    return Signature(links, moves, even=(((0, along), len(parts)),), copies=True)


def slices(node: NodeView) -> Signature | str:
    """Takes a part of some axes; the others pass."""
    shape = node.shape(0)
    if shape is None:
        return "its input has no known rank"
    rank = len(shape)
    stated: Sequence[int] | None = node.attribute("starts", None)
    starts: Sequence[int | None]
    ends: Sequence[int | None]
    steps: Sequence[int | None]
    if stated is not None:
        starts, ends = list(stated), list(node.attribute("ends", ()))
        axes, steps = list(node.attribute("axes", range(len(starts)))), [1] * len(starts)
        holders: tuple[int | str, int | str] = ("starts", "ends")
    else:
        given = [node.constant(i) for i in range(1, 5)]
        if node.value(3) is not None and given[2] is None:
            return "computes its axes"
        known = next((len(g) for g in given if g is not None), None)
        if known is None:
            return "computes what it takes"
        axes = list(range(known)) if given[2] is None else given[2].tolist()
        blank: list[int | None] = [None] * known
        starts, ends = (blank if g is None else g.tolist() for g in given[:2])
        steps = [1] * known if node.value(4) is None else blank if given[3] is None else given[3].tolist()
        holders = (1, 2)
    axes = [a % rank for a in axes]
    links: list[tuple[Port, ...]] = [((0, a), (OUT, a)) for a in range(rank) if a not in axes]
    moves, sizes = [], []
    for place, axis in enumerate(axes):
        dim, start, end, step = shape[axis], starts[place], ends[place], steps[place]
        if start == 0 and step == 1 and end is not None and (end >= np.iinfo(np.int32).max or end == dim):
            links.append(((0, axis), (OUT, axis)))
            sizes += [Size(holders[1], place, (0, axis))] if end == dim else []
        elif isinstance(dim, int) and step == 1 and start is not None and end is not None:
            first, last, _ = slice(start, end).indices(dim)
            moves.append(Move((0, axis), (OUT, axis), np.arange(first, max(first, last), dtype=np.int64)))
            sizes += [Size(holders[0], place, (0, axis), "bound"), Size(holders[1], place, (0, axis), "bound")]
    return Signature(tuple(links), tuple(moves), sizes=tuple(sizes), copies=True, mixes="takes a part of them")


def gather(node: NodeView) -> Signature | str:
    """Takes entries of one axis, whose place the axes of the indices take; the others pass."""
    shape, places = node.shape(0), node.shape(1)
    if shape is None or places is None:
        return "its operands have no known rank"
    along, index = node.attribute("axis", 0) % len(shape), node.constant(1)
    shift = len(places) - 1
    links: list[tuple[Port, ...]] = [((0, a), (OUT, a if a < along else a + shift)) for a in range(len(shape)) if a != along]
    links += [((1, a), (OUT, along + a)) for a in range(len(places)) if index is None]
    dim = shape[along]
    if index is None or not isinstance(dim, int) or len(places) > 1:
        return Signature(tuple(links), mixes="takes some of them")
    taken = index.astype(np.int64) % dim
    if len(places) == 0:
        return Signature(tuple(links), picks=(Pick((0, along), int(taken)),), copies=True, mixes="takes one of them")
    moves = (Move((0, along), (OUT, along), taken),)
    return Signature(tuple(links), moves, sizes=(Size(1, None, (0, along), "channels"),), copies=True)


def pad(node: NodeView) -> Signature | str:
    """Pads some axes; those that are not padded pass."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    given, over = node.constant(1), node.constant(3)
    pads: Sequence[int] | None = node.attribute("pads", None)
    if pads is None:
        if given is None or (node.value(3) is not None and over is None):
            return "computes its padding"
        pads = given.tolist()
    axes = list(range(rank)) if over is None else [int(a) % rank for a in over.tolist()]
    ends = {a: (low, high) for a, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True) if low or high}
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a not in ends)
    constant = node.attribute("mode", "constant") == "constant"
    moves = []
    for axis, (low, high) in ends.items():
        size = node.shape(0)[axis]  # type: ignore[index]
        if constant and isinstance(size, int) and min(low, high) >= 0:
            every = np.arange(size, dtype=np.int64)
            moves.append(Move((0, axis), (OUT, axis), every, low + every))
    return Signature(links, tuple(moves), steady=not constant or not ends, mixes="pads this axis")


def resize(node: NodeView) -> Signature | str:
    """Resamples some axes; those that keep their size pass."""
    source, target = node.shape(0), node.shape(OUT)
    if source is None or target is None or len(source) != len(target):
        return "its shapes are not known"
    operand = 2 if node.opset >= 11 and node.node.op_type == "Resize" else 1
    scales = node.constant(operand)
    stated: Sequence[float] | None = node.attribute("scales", None)
    if scales is None and stated is not None:
        scales = np.array(stated)
    axes = [a % len(source) for a in node.attribute("axes", range(len(source)))]
    same = {a for a in range(len(source)) if a not in axes}
    sizes = []
    if scales is not None and scales.size:
        same |= {a for a, scale in zip(axes, scales.tolist(), strict=True) if scale == 1}
    else:
        lengths = node.constant(3)
        same |= {a for a in axes if source[a] is not None and source[a] == target[a]}
        if lengths is not None:
            sizes = [Size(3, place, (OUT, a)) for place, a in enumerate(axes) if a in same]
        elif any(isinstance(source[a], int) for a in same & set(axes)):
            same = {a for a in same if not isinstance(source[a], int)}
    plain = node.attribute("mode", "nearest") in ("nearest", "linear") and (
        node.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    )
    links = tuple(((0, a), (OUT, a)) for a in sorted(same))
    return Signature(links, steady=plain, sizes=tuple(sizes), mixes="resamples this axis")


def shape(node: NodeView) -> Signature | str:
    """Tells the size of some axes and looks at no others: of those that are taken from it with stored numbers."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    first, last = node.attribute("start", 0), node.attribute("end", rank)
    told = list(range(rank))[first:last]
    seen: set[int] = set()
    for user, _ in node.node.outputs[0].uses():
        taken = told
        if user.op_type == "Gather":
            index = NodeView(user, node.shapes, node.opset).constant(1)
            taken = told if index is None else [told[i] for i in index.ravel().tolist()]
        elif user.op_type == "Slice":
            view = NodeView(user, node.shapes, node.opset)
            parts = [view.constant(i) for i in (1, 2, 4) if view.value(i) is not None]
            if parts and all(part is not None for part in parts):
                taken = told[slice(*(int(part[0]) for part in parts))]  # type: ignore[index]
        seen.update(taken)
    if node.node.outputs[0].is_graph_output():
        seen.update(told)
    return Signature(unseen=tuple((0, a) for a in range(rank) if a not in seen), mixes="tells the size of this axis")


# -- reverse: joining and parting --


def concat_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The part that each operand has become."""
    axis, operands = b.view.attribute("axis", 0) % b.rank(OUT), range(len(b.view.node.inputs))
    if len(operands) == 1:
        return {0: b.gradient}
    if b.opset >= 13:
        sizes = b.op("Concat", *(b.build.extents(b.input(i), [axis]) for i in operands), axis=0)
        parts = b.build.ops("Split", b.gradient, sizes, outputs=len(operands), axis=axis)
    else:
        split = [b.sizes(i, [axis])[0] for i in operands]
        parts = b.build.ops("Split", b.gradient, outputs=len(operands), axis=axis, split=split)
    return {i: parts[i] for i in b.wanted}


def split_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The gradients of the parts, zeros where there is none."""
    parts = [b.zeros(b.output(i)) if gradient is None else gradient for i, gradient in enumerate(b.gradients)]
    return {0: b.op("Concat", *parts, axis=b.view.attribute("axis", 0))}


# -- reverse: taking --


def slice_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Zeros around the part; where it was taken in steps or from computed places, between its elements as well."""
    if b.opset < 11:
        return "takes a part, in an opset before 11"
    starts, axes = b.view.constant(1), b.view.constant(3)
    if axes is None and b.view.value(3) is not None:
        return "computes its axes"
    steps = np.ones(1) if b.view.value(4) is None else b.view.constant(4)
    rank = b.rank(0)
    over = list(range(b.sizes(1, [0])[0])) if axes is None else [int(a) % rank for a in axes.tolist()]
    if starts is not None and steps is not None and np.all(steps == 1):
        first = dict(zip(over, starts.tolist(), strict=True))
        return {0: _surround(b, b.gradient, [first.get(axis, 0) for axis in range(rank)])}
    gradient = b.gradient
    for place, axis in enumerate(over):
        numbers = _count_to(b, b.build.extents(b.input(0), [axis]))
        operands = [b.op("Gather", b.input(i), b.build.integers([place]), axis=0) for i in (1, 2, 4) if b.view.value(i)]
        kind = {"to": int(ir.DataType.INT64)}
        start, end, *step = (b.op("Cast", operand, **kind) for operand in operands)
        gradient = _put_back(b, gradient, axis, b.op("Slice", numbers, start, end, b.build.integers([0]), *step))
    return {0: gradient}


def gather_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Elements back to where they were taken from, added up where one was taken more than once."""
    rank, gradient = b.rank(0), b.gradient
    axis = b.view.attribute("axis", 0) % rank
    if b.rank(1) != 1:
        before, after = (b.build.extents(b.input(0), part) for part in (range(axis), range(axis + 1, rank)))
        gradient = b.op("Reshape", gradient, b.op("Concat", before, b.build.integers([-1]), after, axis=0))
    given = b.view.constant(1)
    index: list[int] = [] if given is None or b.opset < 11 else given.ravel().tolist()
    if index and index == list(range(index[0], index[-1] + 1)) and (index[0] < 0) == (index[-1] < 0):
        return {0: _surround(b, gradient, [index[0] if a == axis else 0 for a in range(rank)])}
    places = b.op("Reshape", b.op("Cast", b.input(1), to=int(ir.DataType.INT64)), b.build.integers([-1]))
    if index and min(index) >= 0 and len(set(index)) == len(index):
        return {0: _put_back(b, gradient, axis, places)}
    size = b.build.extents(b.input(0), [axis])
    if b.opset < 11:  # where OneHot does not count from the end
        negative = b.op("Less", places, b.build.integers(0))
        places = b.op("Where", negative, b.op("Add", places, size), places)
    hot = b.op("OneHot", places, size, b.build.constant([0.0, 1.0], np.float32), axis=0)
    return {0: b.build.contract(gradient, axis, rank, hot if b.dtype == np.float32 else b.number(hot))}


def _count_to(b: Backward, size: ir.Value) -> ir.Value:
    """0, 1, … below a size, int64 [1]."""
    return b.op("Range", b.build.integers(0), b.build.squeeze(size, [0]), b.build.integers(1))


def _surround(b: Backward, gradient: ir.Value, first: Sequence[int]) -> ir.Value:
    """Zeros around a part of the input that begins at `first` on each axis; negative numbers count from the end."""
    whole = b.op("Shape", b.input(0))
    low = b.build.integers(list(first))
    if min(first) < 0:
        kept = [max(n, -size) if n < 0 else n for n, size in zip(first, b.sizes(0, range(len(first))), strict=True)]
        from_end = b.build.integers([int(n < 0) for n in first])
        low = b.op("Add", b.build.integers(kept), b.op("Mul", whole, from_end))
    high = b.op("Sub", b.op("Sub", whole, b.op("Shape", gradient)), low)
    return b.op("Pad", gradient, b.op("Concat", low, high, axis=0))


def _put_back(b: Backward, gradient: ir.Value, axis: int, taken: ir.Value) -> ir.Value:
    """Elements that were taken from the places `taken`, no place twice, back on an axis of the input, zeros elsewhere.

    Every place gathers its element, or the zero that is put behind the last one.
    """
    count, rank = b.op("Shape", taken), b.rank(0)
    nowhere = b.op("Expand", count, b.build.extents(b.input(0), [axis]))
    source = b.op("ScatterElements", nowhere, taken, _count_to(b, count), axis=0)
    pads = b.build.integers([int(place == rank + axis) for place in range(2 * rank)])
    return b.op("Gather", b.op("Pad", gradient, pads), source, axis=axis)


def gather_elements_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Each element back to where it was taken from, added up."""
    if b.opset < 16:
        return "gathers elements, in an opset before 16"
    axis = b.view.attribute("axis", 0)
    return {0: b.op("ScatterElements", b.zeros(b.input(0)), b.input(1), b.gradient, axis=axis, reduction="add")}


def gather_nd_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The same for slices."""
    if b.opset < 16 or b.view.attribute("batch_dims", 0):
        return "gathers slices, in an opset before 16 or with batch dimensions"
    return {0: b.op("ScatterND", b.zeros(b.input(0)), b.input(1), b.gradient, reduction="add")}


def scatter_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Zeros in the data where updates went; the updates' gradients from there."""
    operator, axis = b.view.node.op_type, b.view.attribute("axis", 0)
    along = {} if operator == "ScatterND" else {"axis": axis}
    reduction = str(b.view.attribute("reduction", "none"))
    if reduction not in ("none", "add"):
        return f"scatters with reduction {reduction!r}"
    found = {}
    if 0 in b.wanted:
        added = reduction == "add"
        found[0] = b.gradient if added else b.op(operator, b.gradient, b.input(1), b.zeros(b.input(2)), **along)
    if 2 in b.wanted:
        found[2] = b.op(operator.replace("Scatter", "Gather"), b.gradient, b.input(1), **along)
    return found


def top_k_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Each element back to its place."""
    if b.opset < 11:
        return "chooses by size, in an opset before 11"
    axis = b.view.attribute("axis", -1)
    return {0: b.op("ScatterElements", b.zeros(b.input(0)), b.output(1), b.gradient, axis=axis)}


def trilu_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The same triangle."""
    diagonal = () if b.view.value(1) is None else (b.input(1),)
    return {0: b.op("Trilu", b.gradient, *diagonal, upper=b.view.attribute("upper", 1))}


def cum_sum_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The sum from the other side."""
    exclusive, reverse = (b.view.attribute(name, 0) for name in ("exclusive", "reverse"))
    return {0: b.op("CumSum", b.gradient, b.input(1), exclusive=exclusive, reverse=1 - reverse)}


# -- reverse: padding and resampling, linear along each axis: the matrix there is what becomes of the identity --


def pad_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """Padding by the negative; with copies of elements, the transposed matrices."""
    if b.wanted != {0}:
        return "computes its padding value"
    mode = str(b.view.attribute("mode", "constant"))
    stated: Sequence[int] | None = b.view.attribute("pads", None)  # an operand from opset 11 on
    if mode == "constant":
        if stated is not None:
            return {0: b.op("Pad", b.gradient, pads=[-n for n in stated])}
        some = () if b.view.value(3) is None else (None, b.input(3))
        return {0: b.op("Pad", b.gradient, b.op("Neg", b.input(1)), *some)}
    given, over = b.view.constant(1), b.view.constant(3)
    pads = given.tolist() if stated is None and given is not None else stated
    if pads is None or (over is None and b.view.value(3) is not None):
        return "computes its padding"
    gradient, rank = b.gradient, b.rank(0)
    axes = list(range(rank)) if over is None else [int(a) % rank for a in over.tolist()]
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if low or high:
            unit, around = b.identity(0, axis), [0, low, 0, high]
            if stated is not None:
                response = b.op("Pad", unit, pads=around, mode=mode)
            else:
                response = b.op("Pad", unit, b.build.integers(around), mode=mode)
            gradient = b.build.contract(gradient, axis, rank, response)
    return {0: gradient}


def resize_reverse(b: Backward) -> Mapping[int, ir.Value] | str:
    """The transposed matrix of each axis that is resized."""
    if b.wanted != {0}:
        return "computes how it resizes"
    attributes = {name: a.value for name, a in b.view.node.attributes.items() if name != "axes"}
    if attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "crops"
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keeps the aspect ratio"
    rank, gradient = b.rank(0), b.gradient
    operand = 2 if b.opset >= 11 else 1
    scales = b.view.constant(operand)
    sized = scales.size == 0 if scales is not None else b.view.value(operand) is None
    axes: Sequence[int] = b.view.attribute("axes", range(rank))
    for place, axis in enumerate(a % rank for a in axes):
        if not sized and scales is not None and scales[place] == 1:
            continue
        if (sized or (scales is None and axis < 2)) and b.shape(0)[axis] == b.shape(OUT)[axis]:
            continue
        unit = b.build.unsqueeze(b.identity(0, axis), [0, 1])
        ones = b.build.constant([1.0, 1.0, 1.0], np.float32)
        none = b.build.constant([], np.float32)
        if sized:
            ends = [b.build.extents(value, [axis]) for value in (b.input(0), b.output())]
            how = [none, none, b.op("Concat", b.build.integers([1, 1]), *ends, axis=0)]
        else:
            scale = b.op("Gather", b.input(operand), b.build.integers([place]), axis=0)
            how = [none] * (operand - 1) + [b.op("Concat", ones, scale, axis=0)]
        found = b.op(b.view.node.op_type, unit, *how, **attributes)
        gradient = b.build.contract(gradient, axis, rank, b.build.squeeze(found, [0, 1]))
    return {0: gradient}


_SHAPES = "Size NonZero Range ConstantOfShape EyeLike OneHot"

ROWS = (
    *(Operator(name, Barrier("speaks of shapes and places"), reverse=nothing) for name in _SHAPES.split()),
    Operator("Shape", shape, reverse=nothing),
    Operator("Concat", concat, reverse=concat_reverse),
    Operator("Split", split, reverse=split_reverse),
    Operator("Slice", slices, reverse=slice_reverse),
    Operator("Gather", gather, reverse=gather_reverse),
    Operator("GatherElements", Barrier("takes some of them"), reverse=gather_elements_reverse),
    Operator("GatherND", Barrier("takes some of them"), reverse=gather_nd_reverse),
    Operator("ScatterElements", Barrier("overwrites some of them"), reverse=scatter_reverse),
    Operator("ScatterND", Barrier("overwrites some of them"), reverse=scatter_reverse),
    Operator("TopK", Barrier("chooses by size"), reverse=top_k_reverse),
    Operator("Trilu", Barrier("overwrites some of them"), reverse=trilu_reverse),
    Operator("CumSum", Barrier("sums along an axis"), reverse=cum_sum_reverse),
    Operator("Pad", pad, reverse=pad_reverse),
    Operator("Resize", resize, reverse=resize_reverse),
    Operator("Upsample", resize, reverse=resize_reverse),
)
