"""Blocks: sums of outer products over maps that are too large to be laid out as rows at once.

Laid out for a product, a map takes as much memory again, what a reader sees of it many times as much. A loop inside the
graph goes through the positions, some rows of them after the other, and holds of one block what would be held of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mscompile.operators.backward import Builder

WHOLE_BYTES = 1 << 29
"""Bytes up to which rows are laid out at once: cutting costs a little time, and rounds otherwise."""
BLOCK_BYTES = 1 << 24
"""Bytes of a block: allocations of this size are used again, those much larger given back to the system each time."""
HELD = 6
"""Times those bytes that a block takes: cut out, laid out, turned, of other samples, and what all that is made from."""
OLDEST = 11
"""Opset from which slices and loops are what they are here."""


@dataclass(frozen=True)
class Blocks:
    """How an axis of positions is cut.

    Attributes
    ----------
    axis
        Of the tensor.
    size
        Positions along it per block.
    step, reach
        Entries of the tensor from one position to the next, and behind the first one that a position sees.
    """

    axis: int
    size: int
    step: int = 1
    reach: int = 0

    def count(self, build: Builder, value: ir.Value) -> ir.Value:
        """[1] int64: blocks of a tensor, the last of which may be smaller."""
        first = build.op("Sub", build.extents(value, [self.axis]), build.integers([self.reach + 1]))
        more = build.op("Div", first, build.integers([self.step]))  # positions but the first
        return build.op("Div", build.op("Add", more, build.integers([self.size])), build.integers([self.size]))

    def cut(self, build: Builder, value: ir.Value, number: ir.Value) -> ir.Value:
        """A block of a tensor by its number."""
        start = build.op("Mul", number, build.integers([self.size * self.step]))
        end = build.op("Add", start, build.integers([(self.size - 1) * self.step + self.reach + 1]))
        return build.op("Slice", value, start, end, build.integers([self.axis]))


def blocks_of(size: int, extent: int, opset: int, axis: int, step: int = 1, reach: int = 0) -> Blocks | None:
    """Cut an axis of `extent` positions where rows take `size` bytes in all; None where they are laid out at once."""
    if size <= WHOLE_BYTES or opset < OLDEST:
        return None
    return Blocks(axis, max(1, BLOCK_BYTES * extent // size), step, reach)


def loop(
    build: Builder,
    sums: Mapping[str, ir.Value],
    blocks: ir.Value,
    piece: Callable[[Builder, ir.Value], Sequence[ir.Value]],
) -> ir.Node:
    """A node that adds to each of `sums`, by name of its output, what `piece` finds in each of so many blocks."""
    name = next(iter(sums))
    number, going = (
        ir.Value(name=f"{name}:{what}", shape=ir.Shape([]), type=ir.TensorType(kind))
        for what, kind in (("number", ir.DataType.INT64), ("going", ir.DataType.BOOL))
    )
    so_far = [ir.Value(name=f"{key}:so-far", shape=value.shape, type=value.type) for key, value in sums.items()]
    body = ir.Graph([number, going, *so_far], [], nodes=[], opset_imports=dict(build.graph.opset_imports), name=name)
    inner = Builder(body, build.opset, prefix=f"{name}:", fused=build.fused)
    parts = piece(inner, inner.op("Reshape", number, inner.integers([1])))
    after = [inner.op("Add", value, part) for value, part in zip(so_far, parts, strict=True)]
    on = inner.op("Identity", going)
    for value, like in zip([on, *after], [going, *so_far], strict=True):
        value.shape, value.type = like.shape, like.type
    body.outputs.extend([on, *after])
    outputs = [ir.Value(name=key, shape=value.shape, type=value.type) for key, value in sums.items()]
    return ir.node("Loop", [blocks, None, *sums.values()], {"body": body}, outputs=outputs, name=name)
