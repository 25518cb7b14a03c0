"""Operators that mix positions, or normalise: pooling, reductions, normalisations."""

from __future__ import annotations

from mscompile.operators.axes import OUT, NodeView, Operator, Signature


def batch_normalisation(node: NodeView) -> Signature | str:
    """An affine map per channel of axis 1."""
    rank = node.rank(0)
    if rank is None or rank < 2:
        return "its input has no channel axis"
    if node.attribute("training_mode", 0):
        return "is in training mode"
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a != 1)
    return Signature((*links, ((0, 1), (1, 0), (2, 0), (3, 0), (4, 0), (OUT, 1))))


def instance_normalisation(node: NodeView) -> Signature | str:
    """Normalises each channel of each sample over its positions."""
    if node.rank(0) is None:
        return "its input has no known rank"
    links = (((0, 0), (OUT, 0)), ((0, 1), (1, 0), (2, 0), (OUT, 1)))
    return Signature(links, mixes="normalises across this axis")


def pooling(node: NodeView) -> Signature | str:
    """Mixes positions within a channel. Zeros that padding counts in make a constant uneven at the border."""
    if node.rank(0) is None:
        return "its input has no known rank"
    padded = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    uneven = padded and bool(node.attribute("count_include_pad", 0))
    ceil = bool(node.attribute("ceil_mode", 0)) and bool(node.attribute("count_include_pad", 0))
    return Signature((((0, 0), (OUT, 0)), ((0, 1), (OUT, 1))), steady=not (uneven or ceil), mixes="pools over this axis")


def reduction(node: NodeView) -> Signature | str:
    """Reduces some axes and keeps the others (mean over positions)."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    axes = node.attribute("axes", None)
    if axes is None:
        given = node.constant(1)
        if given is None and node.value(1) is not None:
            return "its axes are computed"
        axes = given.tolist() if given is not None else []
    if not axes and not node.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    reduced = {int(a) % rank for a in axes}
    keepdims = bool(node.attribute("keepdims", 1))
    kept = [a for a in range(rank) if a not in reduced]
    targets = kept if keepdims else range(len(kept))
    return Signature(tuple(((0, a), (OUT, t)) for a, t in zip(kept, targets, strict=True)), mixes="reduces over this axis")


def softmax(node: NodeView) -> Signature | str:
    """Normalises over `axis`; before opset 13 over every axis behind it as well, with another default."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1) % rank
    over = (axis,) if node.opset >= 13 else range(axis, rank)
    links = tuple(((0, a), (OUT, a)) for a in range(rank) if a not in over)
    return Signature(links, mixes="normalises across this axis")


def layer_normalisation(node: NodeView) -> Signature | str:
    """Normalises over `axis` and every axis behind it; the axes before it pass, with those of scale and bias, if any."""
    rank = node.rank(0)
    if rank is None:
        return "its input has no known rank"
    shapes = {operand: node.shape(operand) for operand in (1, 2) if node.value(operand) is not None}
    links = []
    for axis in range(node.attribute("axis", -1) % rank):
        aligned = {operand: axis - rank + len(shape) for operand, shape in shapes.items() if shape is not None}
        vary = ((o, a) for o, a in aligned.items() if a >= 0 and shapes[o][a] != 1)  # type: ignore[index]
        links.append(((0, axis), *vary, (OUT, axis)))
    return Signature(tuple(links), mixes="normalises across this axis")


_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp"


ROWS = (
    *(Operator(name, reduction) for name in _REDUCTIONS.split()),
    *(Operator(name, pooling) for name in ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")),
    Operator("BatchNormalization", batch_normalisation),
    Operator("InstanceNormalization", instance_normalisation),
    *(Operator(name, softmax) for name in ("Softmax", "LogSoftmax")),
    *(Operator(name, layer_normalisation) for name in ("LayerNormalization", "RMSNormalization")),
)
