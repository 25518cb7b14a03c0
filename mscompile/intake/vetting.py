"""What is checked of a model before any library looks into it: its versions, its tensors, and the files they lie in.

Libraries trust sizes, offsets and paths that a file states, and differ in what they refuse. Here every tensor, wherever it
is kept, must have exactly the bytes that its shape says, and external data must lie in regular files in the model's folder.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir

from mscompile.errors import ModelError, ResourceError, UnsupportedError

OLDEST_OPSET = 7
"""Opset from which operators broadcast like numpy; before it, axis signatures would be wrong."""
SHARING, SHARED_FROM = 8, 1 << 28
"""External tensors on the same bytes may take this many times the file once read, from this many bytes on."""
EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
"""What the ONNX format lets an external tensor say."""
NO_PATH = ("\0", "\\", "_ORT_MEM_ADDR_")
"""What no location contains; by the last one onnxruntime takes the offset for an address in its memory."""
HUB_BLOBS = re.compile(r".*/models--[^/]+/blobs", re.DOTALL)
"""Where the cache of the Hugging Face hub keeps what its snapshots link to."""


def rejected(where: Path, why: str, hint: str = "export it again") -> ModelError:
    """The refusal of a model file."""
    return ModelError("the model was rejected", where=str(where), why=why, hint=hint)


def too_large(where: Path, why: str, hint: str) -> ResourceError:
    """The refusal of a model that would take too much memory or time."""
    return ResourceError("the model is too large", where=str(where), why=why, hint=hint)


def quoted(name: str) -> str:
    """A name of the model's as it may be printed."""
    return repr(name if len(name) <= 80 else f"{name[:79]}…")


# --- counts and versions ----------------------------------------------------------------------------------------------


def check_versions(proto: onnx.ModelProto, where: Path) -> None:
    """Refuse versions of the format and of the operators that the installed onnx does not know."""
    newest, newest_ir = onnx.defs.onnx_opset_version(), int(onnx.IR_VERSION)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", newest))
    upgrade = f"upgrade onnx, of which {onnx.__version__} is installed, or export for an older version"
    if proto.ir_version > newest_ir:
        why = f"it has IR version {proto.ir_version}; supported are up to {newest_ir}"
        raise UnsupportedError("the model's format is not supported", where=str(where), why=why, hint=upgrade)
    if not OLDEST_OPSET <= opset <= newest:
        raise UnsupportedError(
            "the model's opset is not supported",
            where=str(where),
            why=f"it imports opset {opset}; supported are {OLDEST_OPSET} to {newest}",
            hint=upgrade if opset > newest else "convert it with onnx.version_converter, or export it again",
        )


_RANDOM = frozenset(["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"])
STATED_TRAINING = 14
"""Opset from which BatchNormalization says whether it trains; before, it does so where it has more than one output."""


def check_operators(proto: onnx.ModelProto, where: Path) -> None:
    """Refuse operators that load what other runtimes compiled, and those that give something else each time they are run.

    Raises
    ------
    ModelError
        There are some of the first kind, which name files.
    UnsupportedError
        There are some that are random or in training: nothing could be measured.
    """
    nodes = [*all_nodes(proto.graph.node), *(node for function in proto.functions for node in all_nodes(function.node))]
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)
    off = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.BOOL and not any(_entries_of(t))}
    for node in nodes:
        if node.op_type == "Constant" and node.attribute and not any(_entries_of(node.attribute[0].t)):
            off.update(node.output)
    found = []
    for node in nodes:
        if node.op_type == "EPContext" and node.domain == "com.microsoft":
            why = f"EPContext {quoted(node.name)} holds what a runtime has compiled for one device"
            raise rejected(where, why, "give the model that it was made from")
        random = node.op_type in _RANDOM
        if node.op_type == "Dropout" and len(node.input) > 2:
            random = bool(node.input[2]) and node.input[2] not in off
        if node.op_type == "BatchNormalization":
            stated = any(a.name == "training_mode" and a.i for a in node.attribute)
            random = stated or (opset < STATED_TRAINING and any(node.output[1:]))
        if random and node.domain in ("", "ai.onnx"):
            found.append(f"{node.op_type} {quoted(node.name or ''.join(node.output[:1]))}")
    if found:
        listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UnsupportedError(
            "the model does not give the same result each time",
            where=str(where),
            why=f"{listed}: random, or in training mode",
            hint="export the network in evaluation mode",
        )


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes with those of the graphs within them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from all_nodes(graph.node)


def _entries_of(tensor: onnx.TensorProto) -> Iterable[int]:
    return tensor.raw_data or tensor.int32_data


def check_text(proto: onnx.ModelProto, where: Path) -> None:
    """Refuse names that are not UTF-8: protobuf gives them as bytes, and libraries differ in what becomes of them."""
    if any(isinstance(text, bytes) for text in _texts(proto)):
        raise rejected(where, "a name or text in it is not UTF-8")


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    yield from (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string, proto.graph.name)
    for prop in proto.metadata_props:
        yield from (prop.key, prop.value)
    graph = proto.graph
    yield from (tensor.name for tensor in graph.initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for body in proto.functions:
        yield from (body.name, body.domain, *body.input, *body.output, *body.attribute)
    for nodes in (graph.node, *(body.node for body in proto.functions)):
        for node in all_nodes(nodes):
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of a model with what it is: initializers, dense or sparse, and attributes, in graphs and functions."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto, f"function {quoted(function.name)}")
    for training in proto.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)


def _of_graph(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((f"initializer {quoted(tensor.name)}", tensor) for tensor in graph.initializer)
    for sparse in graph.sparse_initializer:
        yield from _of_sparse(sparse, f"sparse initializer {quoted(sparse.values.name)}")
    yield from _of_nodes(graph.node)


def _of_sparse(sparse: onnx.SparseTensorProto, name: str) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield f"values of {name}", sparse.values
    yield f"indices of {name}", sparse.indices


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        if node.attribute:
            yield from _of_attributes(node.attribute, f"{node.op_type} {quoted(node.name or ''.join(node.output[:1]))}")


def _of_attributes(attributes: Iterable[onnx.AttributeProto], owner: str) -> Iterator[tuple[str, onnx.TensorProto]]:
    for attribute in attributes:
        name = f"attribute {quoted(attribute.name)} of {owner}"
        for entry, value in attribute.ListFields():
            if entry.name in ("t", "tensors"):
                yield from ((name, tensor) for tensor in ([value] if entry.name == "t" else value))
            elif entry.name in ("g", "graphs"):
                for graph in [value] if entry.name == "g" else value:
                    yield from _of_graph(graph)
            elif entry.name in ("sparse_tensor", "sparse_tensors"):
                for sparse in [value] if entry.name == "sparse_tensor" else value:
                    yield from _of_sparse(sparse, name)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data lies in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


@dataclass(frozen=True)
class Stored:
    """The external files of a model.

    Attributes
    ----------
    folder
        Where locations are looked for; None where the model has no file.
    files
        Identity of each file that is used, as `identity` gives it.
    """

    folder: Path | None
    files: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)


def check_tensors(proto: onnx.ModelProto, path: Path | None, where: Path, payloads: Mapping[int, int]) -> Stored:
    """Refuse tensors that do not have the bytes their shapes say, and external data out of place.

    In the cache of the Hugging Face hub, whose files are links, locations are rewritten to what they lead to.

    Raises
    ------
    ModelError
        A tensor is malformed, or lies where it must not.
    ResourceError
        Tensors that share bytes would take far more than the files have.
    """
    ranges: dict[Path, dict[tuple[int, int], str]] = {}
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    folder = None if path is None else Path(os.path.realpath(path.parent))
    target = None if path is None else Path(os.path.realpath(path)).parent
    hub = target if target is not None and target != folder and HUB_BLOBS.fullmatch(str(target)) else None
    logical = 0
    for number, (name, tensor) in enumerate(tensors(proto)):  # initializers first
        size = _size_of(name, tensor, where)
        if not is_external(tensor):
            _check_inline(name, tensor, size, where, payloads.get(number))
            continue
        if folder is None:
            why = f"{name} lies in an external file, and a ModelProto does not say in which folder"
            raise rejected(where, why, "give the path of the file, or load the weights with onnx.load")
        location, offset, length = _entries(name, tensor, where)
        if location not in found:
            found[location] = _locate(name, location, folder, hub, where)
        file, status = found[location]
        if offset + size > status[SIZE] or length not in (None, size):
            stated = "" if length is None else f", stated are {length}"
            why = f"{name} takes {size} bytes at {offset}{stated}, and {quoted(location)} has {status[SIZE]}"
            raise rejected(where, why, "the file may be truncated: fetch or export it again")
        if size:
            ranges.setdefault(file, {})[offset, offset + size] = name
        logical += size
        if hub is not None:
            next(entry for entry in tensor.external_data if entry.key == "location").value = file.name
    _check_ranges(ranges, where)
    physical = sum(end - start for taken in ranges.values() for start, end in taken)
    if logical > max(SHARED_FROM, SHARING * physical):
        why = f"its external tensors take {logical:,} bytes once read, of {physical:,} in the files: they share them"
        raise too_large(where, why, "let nodes share one initializer instead")
    linked = hub is not None and bool(found)
    return Stored(hub if linked else folder, dict(found.values()))


def _check_ranges(ranges: Mapping[Path, Mapping[tuple[int, int], str]], where: Path) -> None:
    """Tensors may lie on the same bytes, but not on parts of each other's."""
    for taken in ranges.values():
        end, last = 0, ""
        for (start, stop), name in sorted(taken.items()):
            if start < end:
                raise rejected(where, f"the external data of {last} and of {name} overlap in part")
            end, last = stop, name


def _size_of(name: str, tensor: onnx.TensorProto, where: Path) -> int:
    """Bytes that a tensor takes by its shape and type; entries of text count 0."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise rejected(where, f"{name} has the unknown element type {tensor.data_type}") from error
    if dtype == ir.DataType.UNDEFINED:
        raise rejected(where, f"{name} has no element type")
    if min(tensor.dims, default=0) < 0:
        raise rejected(where, f"{name} has the negative dimension {min(tensor.dims)}")
    return 0 if dtype == ir.DataType.STRING else math.ceil(math.prod(tensor.dims) * dtype.itemsize)


_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_PAIRS = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)


def _check_inline(name: str, tensor: onnx.TensorProto, size: int, where: Path, apart: int | None) -> None:
    """Refuse data that is not as long as the shape says; `apart` is the length of raw data that is not in the message."""
    present = [entry for entry in _TYPED if len(getattr(tensor, entry))]
    expected = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if tensor.HasField("segment") or len(present) + bool(tensor.raw_data) > 1 or not {expected}.issuperset(present):
        raise rejected(where, f"{name} keeps its data in a wrong place: {', '.join([*present, 'raw_data'][:2])}")
    if tensor.raw_data or apart is not None:
        have = len(tensor.raw_data) if apart is None else apart
        if have != size:
            raise rejected(where, f"{name} has {have} bytes, its shape {_shape(tensor)} takes {size}")
        return
    count = math.prod(tensor.dims) * (2 if tensor.data_type in _PAIRS else 1)
    packed = expected == "int32_data" and ir.DataType(tensor.data_type).itemsize < 1
    if len(getattr(tensor, expected)) != (size if packed else count):
        have = len(getattr(tensor, expected))
        raise rejected(where, f"{name} has {have} entries, its shape {_shape(tensor)} takes {count}")


def _shape(tensor: onnx.TensorProto) -> str:
    return f"[{', '.join(map(str, tensor.dims[:8]))}{', …' if len(tensor.dims) > 8 else ''}]"


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a model in which initializers and all external tensors are empty."""
    copy = without_initializers(proto)
    for tensor in proto.graph.initializer:
        copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=[0])
    for _, tensor in tensors(copy):
        if is_external(tensor):
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    return copy


def without_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a model that has none."""
    copy = onnx.ModelProto()
    for entry, value in proto.ListFields():
        if entry.name != "graph":
            take(copy, entry.name, value)
    for entry, value in proto.graph.ListFields():
        if entry.name != "initializer":
            take(copy.graph, entry.name, value)
    return copy


def take(message: Any, name: str, value: Any) -> None:
    """Set a field to a copy of its value in another message."""
    if hasattr(value, "add") or hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


# --- external data ----------------------------------------------------------------------------------------------------

SIZE = 2


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells whether a file is still the same: device, inode, size (at `SIZE`), times of the last changes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entries(name: str, tensor: onnx.TensorProto, where: Path) -> tuple[str, int, int | None]:
    """Location, offset and length that an external tensor states."""
    stated = {entry.key: entry.value for entry in tensor.external_data}
    unknown = sorted(stated.keys() - EXTERNAL_KEYS)
    if unknown or len(stated) < len(tensor.external_data):
        why = f"the unknown key {quoted(unknown[0])}" if unknown else "a key twice"
        raise rejected(where, f"the external data of {name} has {why}")
    if tensor.data_type == onnx.TensorProto.STRING or tensor.raw_data or any(len(getattr(tensor, e)) for e in _TYPED):
        raise rejected(where, f"{name} is external, but holds text or data of its own")
    numbers: list[int | None] = []
    for key in ("offset", "length"):
        if key in stated and not re.fullmatch("[0-9]{1,18}", stated[key]):
            raise rejected(where, f"the external data of {name} has the {key} {quoted(stated[key])}, which is no size")
        numbers.append(int(stated[key]) if key in stated else None)
    return stated.get("location", ""), numbers[0] or 0, numbers[1]


def _locate(name: str, location: str, folder: Path, hub: Path | None, where: Path) -> tuple[Path, tuple[int, ...]]:
    """The file at a location and its identity; it must be a regular one in the folder, of one name only, and no link."""

    def refused(why: str, hint: str = "keep weights in plain files in the model's folder") -> ModelError:
        return rejected(where, f"{name} lies in {quoted(location)}, {why}", hint)

    if not location or any(mark in location for mark in NO_PATH) or PureWindowsPath(location).drive:
        raise refused("which is no path of a file")
    if location.startswith("/") or ".." in location.split("/"):
        raise refused("which is outside the model's folder")
    file = Path(os.path.normpath(folder / location))
    real = Path(os.path.realpath(file))
    if real != file or hub is not None:
        if real.parent != hub:
            raise refused("which is a symbolic link or behind one", "copy the file there in place of the link")
        file = real
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise refused(f"which cannot be opened: {reason}", "keep the file beside the model") from error
    try:
        status = os.fstat(handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(status.st_mode):
        raise refused("which is not a regular file")
    if status.st_nlink > 1:
        raise refused("which is a hard link to a file that has other names", "copy the file there in place of the link")
    return file, identity(status)
