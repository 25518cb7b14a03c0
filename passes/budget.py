"""Computing parameters from parameters, within a bound on memory that holds before anything is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from mscompile.errors import ResourceError, UnsupportedError
from mscompile.network.scm import infer_shapes
from mscompile.operators import Shape
from mscompile.runtime import Arrays, Session

FOLDED, GROWTH = 1 << 28, 8
"""Bytes that all computed parameters may take together: so many, or so many times the weights (float32 from four bits)."""
SMALL = 1 << 16
"""Bytes up to which a parameter is computed first, to see how large it makes others."""
SELECTING = frozenset({"Compress", "NonZero", "Unique"})
"""Operators whose output is as large as their input says at most, by values and indices of eight bytes."""


def affordable(model: ir.Model, fixed: Mapping[ir.Value, ir.Node]) -> dict[ir.Value, ir.Node]:
    """Those of `fixed`, values computed from parameters alone, that can be computed within the bound.

    Sizes come from shape inference that trusts no shape the file declares. Where a size depends on values, as that of an
    Expand, these are computed first if they are small; values whose size stays unknown are left out.

    Parameters
    ----------
    model
        Left as it is.
    fixed
        Node by value, in the order of computation.

    Raises
    ------
    ResourceError
        They take more.
    """
    if not fixed:
        return {}
    bound = max(FOLDED, GROWTH * sum(_stored(v) for v in model.graph.initializers.values()))
    known: Arrays = {}
    while True:
        shapes = infer_shapes(_given(model, list(fixed), known), {})
        kept: dict[ir.Value, ir.Node] = {}
        deciding: list[ir.Value] = []
        total = 0
        for value, node in fixed.items():
            inputs = [v for v in node.inputs if v is not None]
            if any(v in fixed and v not in kept for v in inputs):
                continue
            size = _bytes_of(value, shapes.get(value.name or ""))
            if size is None and node.op_type in SELECTING:
                sizes = [_bytes_of(v, shapes.get(v.name or "")) for v in inputs]
                size = None if None in sizes else 8 * sum(s for s in sizes if s is not None) * max(1, len(inputs))
            if size is None:
                deciding += [v for v in inputs if v in kept and (v.name or "") not in known]
                continue
            total += size
            if total > bound:
                raise ResourceError(
                    "the model is too large",
                    where=f"{node.op_type} {node.name!r}",
                    why=f"with {value.name!r}, {total:,} bytes are computed from parameters; at most {bound:,} are taken",
                    hint="export the network without constants that are so much larger than its weights",
                )
            kept[value] = node
        small = [v for v in deciding if (_bytes_of(v, shapes.get(v.name or "")) or 0) <= SMALL]
        found = evaluate(model, list(dict.fromkeys(small))) if small else {}
        if not found:
            return kept
        known.update(found)


def _given(model: ir.Model, values: Sequence[ir.Value], known: Arrays) -> ir.Model:
    """The graph that computes `values`, in which those `known` are stored."""
    graph = ir.convenience.extract(model.graph, [], list(values))
    for value in [v for node in graph for v in node.outputs if v.name in known]:
        name, value.name = value.name or "", f"{value.name}.computed"
        tensor = ir.tensor(known[name], name=name)
        stored = ir.Value(name=name, shape=ir.Shape(known[name].shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(stored)
        ir.convenience.replace_all_uses_with(value, stored, replace_graph_outputs=True)
    return ir.Model(graph, ir_version=model.ir_version)


def _stored(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)


def _bytes_of(value: ir.Value, shape: Shape | None) -> int | None:
    """Bytes of a value; eight per element where its type is not known. None where its shape is not."""
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    width = 8 if value.dtype is None or value.dtype == ir.DataType.STRING else value.dtype.itemsize
    return math.ceil(math.prod(int(d) for d in shape if isinstance(d, int)) * max(width, 1))


def evaluate(model: ir.Model, wanted: Sequence[ir.Value]) -> Arrays:
    """Values of parameters computed from others, by onnxruntime as it would at run time; those it can compute."""
    graph = ir.convenience.extract(model.graph, [], list(wanted))
    try:
        return Session(ir.Model(graph, ir_version=model.ir_version), optimise=False).run({})
    except UnsupportedError:
        alone = wanted if len(wanted) > 1 else ()
        return {name: array for value in alone for name, array in evaluate(model, [value]).items()}
