"""Digests in a compiled file's metadata, by which anyone can see whether it still is what `mscompile` wrote.

They cover the content of the model and not its bytes: external or inline weights, documentation, names of nodes and entries
of others in the metadata may change. They show change, not forgery: nothing is signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

METADATA = "pkg.mscompile."
"""Prefix of the entries of metadata that `mscompile` writes."""
PARTS = ("weights", "graph", "metadata")


def seal(model: ir.Model) -> None:
    """Write the digest of each part into the metadata, over what was there."""
    for part, digest in digests(model).items():
        model.metadata_props[_key(part)] = digest


def changed_parts(model: ir.Model) -> tuple[str, ...] | None:
    """Parts that no longer have the digest in the metadata; None where the file does not say that `mscompile` made it."""
    stored = model.metadata_props
    if not any(key.startswith(METADATA) for key in stored):
        return None
    return tuple(part for part, digest in digests(model).items() if stored.get(_key(part)) != digest)


def digests(model: ir.Model) -> dict[str, str]:
    """Sha256 of each of `PARTS`: tensors; nodes, names and types; what else `mscompile` wrote into the metadata."""
    weights, graph, metadata = (hashlib.sha256() for _ in PARTS)
    bodies = (model.graph, *(f.graph for _, f in sorted(model.functions.items())))
    for body in bodies:
        for entry in _content(body):
            if isinstance(entry, bytes | memoryview):
                weights.update(entry)
            else:
                graph.update(repr(entry).encode("utf-8", "surrogatepass"))
    graph.update(repr(sorted(model.graph.opset_imports.items())).encode())
    own = {_key(part) for part in PARTS}
    for key, value in sorted(model.metadata_props.items()):
        if key.startswith(METADATA) and key not in own:
            metadata.update(repr((key, value)).encode("utf-8", "surrogatepass"))
    return {part: total.hexdigest() for part, total in zip(PARTS, (weights, graph, metadata), strict=True)}


def _key(part: str) -> str:
    return f"{METADATA}{part}_sha256"


def _content(graph: ir.Graph) -> Iterator[Any]:
    """All of a graph in order: the bytes of its tensors, and descriptions of everything else."""
    yield "inputs", [(v.name, str(v.dtype)) for v in graph.inputs if not v.is_initializer()]
    yield "outputs", [(v.name, str(v.dtype)) for v in graph.outputs]
    for name, value in sorted(graph.initializers.items()):
        yield "weight", name
        if value.const_value is not None:
            yield from _tensor(value.const_value)
    for node in graph:
        yield node.domain, node.op_type, node.overload, [v and v.name for v in node.inputs], [v.name for v in node.outputs]
        for name, attribute in sorted(node.attributes.items()):
            yield name, str(attribute.type)
            yield from _attribute(attribute)


def _attribute(attribute: ir.Attr) -> Iterator[Any]:
    kind, value = attribute.type, attribute.value
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        for body in (value,) if kind == ir.AttributeType.GRAPH else value:
            yield from _content(body)
    elif kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        for tensor in (value,) if kind == ir.AttributeType.TENSOR else value:
            yield from _tensor(tensor)
    elif kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):  # kept in files with the digits of float32
        yield np.asarray(value, dtype=np.float32).ravel().tolist()
    elif kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        yield list(value)
    elif kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        yield value


def _tensor(tensor: ir.TensorProtocol) -> Iterator[Any]:
    yield str(tensor.dtype), tuple(map(str, tensor.shape))
    if tensor.dtype == ir.DataType.STRING:
        yield tensor.numpy().ravel().tolist()
    else:
        yield np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data  # mapped weights are not copied
