"""Model files read: vetted, then taken in by onnx and onnx-ir; weights are not copied."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.errors import UnsupportedError
from mscompile.intake.mapped import map_file
from mscompile.intake.payloads import PLAIN, Buffer, Bytes, Content, joined, split
from mscompile.intake.topology import check_expansion, name_nodes, sort_nodes
from mscompile.intake.trial import attempt
from mscompile.intake.vetting import (
    SIZE,
    Stored,
    check_operators,
    check_tensors,
    check_text,
    check_versions,
    identity,
    rejected,
    without_weights,
)
from mscompile.intake.wire import check_count, opened, parse
from mscompile.verification.skeletons import apart, parted

NOTES = "mscompile.notes"
"""Key of an `ir.Model.meta` entry: sentences on what was changed in reading the file, or will be lost."""
STORED = "mscompile.stored"
"""Key of an `ir.Model.meta` entry: the external files, see `vetting.Stored`."""


def load_model(path: str | Path, *, hashed: bool = True, trusted: bool = False) -> tuple[ir.Model, str]:
    """Load an ONNX file.

    Parameters
    ----------
    hashed
        Whether to find the sha256; else it is empty.
    trusted
        Whether to do without a trial in another process, see `mscompile.intake.trial`, where these are on.

    Returns
    -------
    tuple
        The model and the sha256 of the file followed by that of its external files. Larger weights are in memory once;
        those in external files are mapped, and read where they are used.

    Raises
    ------
    UsageError
        There is no such file.
    ModelError
        It is not a valid ONNX model.
    UnsupportedError
        Its opset is too old or unknown to the installed onnx.
    """
    path = Path(path)
    with opened(path) as content:
        check_count(content, path)
        skeleton, payloads = split(content)
        model = from_proto(parse(skeleton, path), path, payloads, trusted=trusted)
        return model, _digest(content, model) if hashed else ""


def read_proto(proto: onnx.ModelProto) -> tuple[ir.Model, str]:
    """Read a ModelProto, which stays as it is; with its sha256 as a file."""
    skeleton, payloads = parted(proto)
    return from_proto(skeleton, payloads=payloads), _sha256(joined(skeleton.SerializeToString(deterministic=True), payloads))


def read_model(model: ir.Model) -> tuple[ir.Model, str]:
    """Read an onnx-ir model, which stays as it is; with its sha256 as a file."""
    copy = model.clone()
    _replace_external(copy, lambda tensor: tensor.numpy())
    skeleton, payloads = apart(copy)
    return from_proto(skeleton, payloads=payloads), _sha256(joined(skeleton.SerializeToString(deterministic=True), payloads))


def from_proto(
    proto: onnx.ModelProto,
    path: Path | None = None,
    payloads: Mapping[int, Buffer] | None = None,
    *,
    trusted: bool = False,
) -> ir.Model:
    """Read a ModelProto, vetted and then accepted by onnx's own checker; nodes are sorted and named where they are not.

    The checker is given the model without its weights, and without names of files.

    Parameters
    ----------
    payloads
        Raw data of initializers, by their numbers, that the message does not hold; copied unless they are arrays.
    """
    try:
        return _taken_in(proto, path, payloads or {}, trusted=trusted)
    except (UnicodeDecodeError, TypeError) as error:
        # Protobuf gives text that is no UTF-8 as bytes, which fit nowhere.
        if isinstance(error, TypeError) and "bytes" not in str(error):
            raise
        raise rejected(path or Path("model"), "a name or text in it is not UTF-8", "export it again") from error


def _taken_in(proto: onnx.ModelProto, path: Path | None, payloads: Mapping[int, Buffer], *, trusted: bool) -> ir.Model:
    where = path if path is not None else Path(str(proto.graph.name)[:80] or "model")
    check_text(proto, where)
    check_versions(proto, where)
    if not proto.graph.output:
        raise rejected(where, "its graph has no outputs", "export it again")
    check_expansion(proto, where)
    stored = check_tensors(proto, path, where, {number: len(data) for number, data in payloads.items()})
    check_operators(proto, where)
    if proto.graph.sparse_initializer:
        raise UnsupportedError(
            "the model has sparse weights",
            where=str(where),
            why=f"{len(proto.graph.sparse_initializer)} initializers are stored as sparse tensors",
            hint="export it with dense weights",
        )
    skeleton = without_weights(proto)
    unsorted = sort_nodes(skeleton, where)
    if path is not None and not trusted:
        attempt(path, path.stat().st_size + sum(status[SIZE] for status in stored.files.values()))
    try:
        onnx.checker.check_model(skeleton)
        model = ir.from_proto(proto)
        if unsorted:
            common.TopologicalSortPass()(model)
    except Exception as error:
        reason = " ".join(str(_cause(error)).split())[:400]
        if "No Op registered" in reason or "No opset import" in reason:
            raise UnsupportedError(
                "the model uses an operator unknown to onnx", where=str(where), why=reason, hint="export without it"
            ) from error
        raise rejected(where, reason, "export it again, or repair what the checker names") from error
    notes = ["nodes were sorted: the file has some before what they read"] if unsorted else []
    notes += name_nodes(model)
    for kind, found in (
        ("training information", proto.training_info),
        ("quantization annotations", proto.graph.quantization_annotation),
    ):
        if found:
            notes.append(f"{kind} in the model will not be in the compiled one")
    model.meta[NOTES], model.meta[STORED] = notes, stored
    for number, data in payloads.items():
        tensor = proto.graph.initializer[number]
        array = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8).copy()
        value = model.graph.initializers[tensor.name]
        assert value.const_value is not None
        value.const_value = _tensor(value.const_value, array)
    if stored.files:
        _map_weights(model, stored)
    return model


def _tensor(like: ir.TensorProtocol, content: npt.NDArray[np.uint8]) -> ir.TensorProtocol:
    """A tensor of that shape, type and name, with other content."""
    array = content.view(like.dtype.numpy()).reshape(like.shape.numpy())
    found = ir.Tensor(array, like.dtype, shape=ir.Shape(like.shape.numpy()), name=like.name, doc_string=like.doc_string)
    found.metadata_props.update(like.metadata_props)
    return found


def _map_weights(model: ir.Model, stored: Stored) -> None:
    """Map the external files, in place; each must be the one that was vetted."""
    assert stored.folder is not None
    contents: dict[Path, Bytes] = {}
    for path, known in stored.files.items():
        with unchanged(path, known) as file:
            contents[path] = map_file(file.fileno(), known[SIZE], path)

    def mapped(tensor: ir.ExternalTensor) -> npt.NDArray[Any]:
        if tensor.dtype.value not in PLAIN:  # several values to a byte
            tensor.base_dir = str(stored.folder)
            return tensor.numpy()
        start = tensor.offset or 0
        path = Path(os.path.normpath(stored.folder / tensor.location))  # type: ignore[operator]
        content = contents[path][start : start + tensor.nbytes]
        return content if start % tensor.dtype.itemsize == 0 else content.copy()

    _replace_external(model, mapped)


def _replace_external(model: ir.Model, read: Callable[[ir.ExternalTensor], npt.NDArray[Any]]) -> None:
    """Put arrays in the place of all tensors that lie in other files, in graphs, functions and attributes."""

    def replaced(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        array = read(tensor)
        if tensor.dtype.value in PLAIN:
            return _tensor(tensor, array.reshape(-1).view(np.uint8))
        found = ir.Tensor(array, tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
        found.metadata_props.update(tensor.metadata_props)
        return found

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for inner in (graph, *graph.subgraphs()):
            for value in inner.initializers.values():
                value.const_value = replaced(value.const_value)
        for node in graph.all_nodes():
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, replaced(attribute.value))  # type: ignore[arg-type]
                elif attribute.type == ir.AttributeType.TENSORS and attribute.value:
                    node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSORS, [replaced(t) for t in attribute.value])


def _cause(error: BaseException) -> BaseException:
    """The innermost reason of an error: libraries wrap it in the whole graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def unchanged(path: Path, known: tuple[int, ...]) -> Iterator[BufferedReader]:
    """An external file, which must be the one that was vetted, and still be when it is closed."""
    changed = rejected(path, "the file changed while it was read", "run again when nothing writes to it")
    try:
        with path.open("rb") as file:
            if identity(os.fstat(file.fileno())) != known:
                raise changed
            yield file
            if identity(os.fstat(file.fileno())) != known:
                raise changed
    except OSError as error:
        raise changed from error


def check_unchanged(model: ir.Model) -> None:
    """Refuse a model whose external files are no longer what they were when it was loaded.

    Raises
    ------
    ModelError
        One of them is not.
    """
    for path, known in model.meta.get(STORED, Stored(None)).files.items():
        with unchanged(path, known):
            pass


def external_files(model: ir.Model) -> list[Path]:
    """Files beside the model's own that its tensors lie in, sorted."""
    return sorted(model.meta.get(STORED, Stored(None)).files)


def _digest(content: Content, model: ir.Model) -> str:
    """Sha256 over the file's bytes and, in order of their names, its external files."""
    total = hashlib.sha256(content)
    for path, known in sorted(model.meta[STORED].files.items()):
        with unchanged(path, known) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _sha256(parts: Iterable[Content]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()
