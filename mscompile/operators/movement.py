"""Operators that keep values and change places, or repeat them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mscompile.operators.axes import OUT, Move, NodeView, Operator, Port, Regroup, Shape, Signature, Size
from mscompile.operators.backward import Backward


def transpose(node: NodeView) -> Signature | str:
    """Permutes the axes."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    perm = node.attribute("perm", tuple(reversed(range(rank))))
    return Signature(tuple(((0, p), (OUT, a)) for a, p in enumerate(perm)), moving=True)


def regroup(node: NodeView) -> Signature | str:
    """Flatten, Squeeze, Unsqueeze, Reshape: axes that stay are linked, others are split or merged block by block.

    Shapes are matched from the right: the smallest trailing blocks of equal static volume correspond.
    """
    source, target = node.shape(0), node.shape(OUT)
    if source is None or target is None:
        return "its shapes are not known"
    links: list[tuple[Port, ...]] = []
    blocks: list[Regroup] = []
    for ins, outs in _blocks(source, target):
        wide_in = [a for a in ins if source[a] != 1] or ins[-1:]
        wide_out = [a for a in outs if target[a] != 1] or outs[-1:]
        if len(wide_in) == len(wide_out) == 1:
            links.append(((0, wide_in[0]), (OUT, wide_out[0])))
        else:
            sizes = tuple(source[a] for a in wide_in), tuple(target[a] for a in wide_out)
            blocks.append(Regroup(tuple(wide_in), tuple(wide_out), *sizes))  # type: ignore[arg-type]
    return Signature(tuple(links), regroups=tuple(blocks), moving=True, mixes="reshapes this axis")


def squeeze(node: NodeView) -> Signature | str:
    """Drops the axes it names; one that names none drops whatever narrows to a single channel."""
    if node.attribute("axes", None) is None and node.value(1) is None:
        return "squeezes every axis of size 1, whichever these are"
    return regroup(node)


def reshape(node: NodeView) -> Signature | str:
    """Regroups axes to a target shape, whose positive entries follow when a width changes."""
    target = node.constant(1)
    if target is None:
        return "computes its target shape"
    base = regroup(node)
    if isinstance(base, str):
        return base
    entries = target.ravel().astype(np.int64).tolist()
    # 0 stands for the size of the input's axis of that number, whichever axis the units come from.
    said = [a for a, entry in enumerate(entries) if entry > 0 or (entry == 0 and ((0, a), (OUT, a)) not in base.links)]
    return replace(base, sizes=tuple(Size(1, axis, (OUT, axis)) for axis in said))


def expand(node: NodeView) -> Signature | str:
    """Repeats axes of size 1; the others pass, but where a computed size would have to follow their width."""
    source, target = node.shape(0), node.shape(OUT)
    if source is None or target is None:
        return "its shapes are not known"
    entries, links, sizes = node.entries(1), [], []
    for axis, dim in enumerate(source, start=len(target) - len(source)):
        place = axis - len(target) + (0 if entries is None else len(entries))
        entry = None if entries is None else entries[place] if place >= 0 else 1
        if dim is None or dim != target[axis] or (dim == 1 and (entry is None or 0 not in node.live)):
            continue
        if entry is None and isinstance(dim, int):
            return "computes the shape it expands to"
        links.append(((0, axis - len(target) + len(source)), (OUT, axis)))
        if entry not in (None, 1):
            sizes.append(Size(1, place, (OUT, axis)))
    if sizes and node.constant(1) is None:
        return "computes a part of the shape it expands to"
    return Signature(tuple(links), sizes=tuple(sizes), copies=True, mixes="repeats this axis")


def tile(node: NodeView) -> Signature | str:
    """Repeats axes whole; those that are not repeated pass."""
    source, repeats = node.shape(0), node.constant(1)
    if source is None or repeats is None or repeats.size != len(source):
        return "its shape or its repeats are not known"
    links: list[tuple[Port, ...]] = []
    moves: list[Move] = []
    for axis, (dim, count) in enumerate(zip(source, repeats.astype(np.int64).tolist(), strict=True)):
        if count == 1:
            links.append(((0, axis), (OUT, axis)))
        elif isinstance(dim, int):
            moves.append(Move((0, axis), (OUT, axis), np.tile(np.arange(dim, dtype=np.int64), count)))
    return Signature(tuple(links), tuple(moves), copies=True, mixes="repeats this axis")


def depth_to_space(node: NodeView) -> Signature | str:
    """block² channels become one channel of block² times as many positions, and so live and die together."""
    shape, block = node.shape(0), int(node.attribute("blocksize", 1))
    if shape is None or not isinstance(shape[1], int):
        return "its channels are not known"
    order = np.arange(shape[1], dtype=np.int64)
    crd = node.attribute("mode", "DCR") == "CRD"
    index = order.reshape(-1, block * block).T if crd else order.reshape(block * block, -1)
    moves = (Move((0, 1), (OUT, 1), index),)
    return Signature((((0, 0), (OUT, 0)),), moves, mixes="moves positions along this axis")


def space_to_depth(node: NodeView) -> Signature | str:
    """Positions become channels: block² for each."""
    shape, block = node.shape(0), int(node.attribute("blocksize", 1))
    if shape is None or not isinstance(shape[1], int):
        return "its channels are not known"
    crd = node.attribute("mode", "DCR") == "CRD"
    index = (np.repeat if crd else np.tile)(np.arange(shape[1], dtype=np.int64), block * block)
    return Signature((((0, 0), (OUT, 0)),), (Move((0, 1), (OUT, 1), index),), mixes="moves positions along this axis")


def _blocks(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs of trailing axis blocks with equal volume, from the right, as far as the sizes are known."""
    blocks: list[tuple[list[int], list[int]]] = []
    i, j = len(source), len(target)
    while i > 0 and j > 0:
        ins, outs = [i - 1], [j - 1]
        if source[i - 1] != target[j - 1] or source[i - 1] is None:
            while True:
                a, b = _volume(source, ins), _volume(target, outs)
                if a is None or b is None:
                    return blocks
                if a == b:
                    break
                axes = ins if a < b else outs
                if axes[0] == 0:
                    return blocks
                axes.insert(0, axes[0] - 1)
        blocks.append((ins, outs))
        i, j = ins[0], outs[0]
    return blocks


def _volume(shape: Shape, axes: Sequence[int]) -> int | None:
    dims = [shape[a] for a in axes]
    return math.prod(dims) if all(isinstance(d, int) for d in dims) else None  # type: ignore[arg-type]


# -- reverse --


def transpose_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The inverse permutation; that of reversing all axes is itself."""
    perm: Sequence[int] | None = b.view.attribute("perm", None)
    if perm is None:
        return {0: b.op("Transpose", b.gradient)}
    return {0: b.op("Transpose", b.gradient, perm=np.argsort(perm).tolist())}


def regroup_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """Back to the shape of the input."""
    return {0: b.like(b.gradient, 0)}


def expand_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The sum over what was repeated."""
    return {0: b.unbroadcast(b.gradient, 0)}


def tile_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """The sum over the copies, which come before the elements on each axis."""
    rank = b.rank(0)
    both = b.op("Concat", b.input(1), b.op("Shape", b.input(0)), axis=0)
    pairs = b.op("Transpose", b.op("Reshape", both, b.build.integers([2, rank])), perm=[1, 0])
    parted = b.op("Reshape", b.gradient, b.op("Reshape", pairs, b.build.integers([-1])))
    return {0: b.build.reduce("ReduceSum", parted, range(0, 2 * rank, 2), keepdims=False)}


def depth_to_space_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """SpaceToDepth; where the block comes after the channel, with the channels put in that order."""
    block = int(b.view.attribute("blocksize", 1))
    found = b.op("SpaceToDepth", b.gradient, blocksize=block)
    if b.view.attribute("mode", "DCR") == "CRD":
        (channels,) = b.sizes(0, [1])
        order = np.arange(channels).reshape(block * block, -1).T.ravel()
        found = b.op("Gather", found, b.build.integers(order.tolist()), axis=1)
    return {0: found}


def space_to_depth_reverse(b: Backward) -> Mapping[int, ir.Value]:
    """DepthToSpace."""
    order = {} if b.view.attribute("mode", "DCR") == "DCR" else {"mode": "CRD"}  # an attribute from opset 11 on
    return {0: b.op("DepthToSpace", b.gradient, blocksize=b.view.attribute("blocksize", 1), **order)}


ROWS = (
    Operator("Transpose", transpose, reverse=transpose_reverse),
    Operator("Reshape", reshape, reverse=regroup_reverse),
    Operator("Squeeze", squeeze, reverse=regroup_reverse),
    *(Operator(name, regroup, reverse=regroup_reverse) for name in ("Flatten", "Unsqueeze")),
    Operator("Expand", expand, reverse=expand_reverse),
    Operator("Tile", tile, reverse=tile_reverse),
    Operator("DepthToSpace", depth_to_space, reverse=depth_to_space_reverse),
    Operator("SpaceToDepth", space_to_depth, reverse=space_to_depth_reverse),
)
