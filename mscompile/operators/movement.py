"""Operators that keep values and change places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mscompile.operators.axes import OUT, Move, NodeView, Operator, Port, Shape, Signature, Size


def transpose(node: NodeView) -> Signature | str:
    """Permutes the axes."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    perm = node.attribute("perm", tuple(reversed(range(rank))))
    return Signature(tuple(((0, p), (OUT, a)) for a, p in enumerate(perm)), moving=True)


def regroup(node: NodeView) -> Signature | str:
    """Flatten, Squeeze, Unsqueeze, Reshape: axes that stay are linked, axes merged into one are moved.

    Shapes are matched from the right, block by block: the smallest trailing blocks of equal static volume correspond.
    """
    source, target = node.shape(0), node.shape(OUT)
    if source is None or target is None:
        return "its shapes are not known"
    links: list[tuple[Port, ...]] = []
    moves: list[Move] = []
    for ins, outs in _blocks(source, target):
        wide_in = [a for a in ins if source[a] != 1] or ins[-1:]
        wide_out = [a for a in outs if target[a] != 1] or outs[-1:]
        if len(wide_in) == len(wide_out) == 1:
            links.append(((0, wide_in[0]), (OUT, wide_out[0])))
        elif len(wide_out) == 1:
            places = np.indices([source[a] for a in wide_in], dtype=np.int64)  # type: ignore[arg-type, misc]
            moves += [Move((0, a), (OUT, wide_out[0]), places[i].ravel()) for i, a in enumerate(wide_in)]
    return Signature(tuple(links), tuple(moves), moving=True, mixes="reshapes this axis")


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
    return replace(base, sizes=tuple(Size(1, axis, axis) for axis, entry in enumerate(entries) if entry > 0))


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


ROWS = (
    Operator("Transpose", transpose),
    Operator("Reshape", reshape),
    Operator("Squeeze", squeeze),
    *(Operator(name, regroup) for name in ("Flatten", "Unsqueeze")),
)
