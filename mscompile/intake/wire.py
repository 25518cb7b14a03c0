"""The bytes of a model's file: what kind of file it is, and how much there is in it, before it is parsed."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from mscompile.errors import ModelError, UsageError
from mscompile.intake.payloads import Content
from mscompile.intake.vetting import identity, rejected, too_large

LARGEST = (1 << 31) - 1
"""Bytes at which protobuf ends."""
READ = 1 << 24
"""Bytes of a file that are read; larger ones are mapped, so that weights are in memory once."""
MOST_FIELDS = 2_000_000
"""Fields of a file, payloads of tensors not counted, at most: parsed, each takes some hundred bytes."""

_LOOKALIKES = tuple(
    (re.compile(pattern, re.DOTALL), kind, hint)
    for pattern, kind, hint in (
        (rb"version https://git-lfs", "a Git LFS pointer", "fetch the real file with `git lfs pull`"),
        (rb"(\xef\xbb\xbf)?\s*<", "HTML or XML text", "the download may have failed: fetch the file again"),
        (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON text", "export the network to a binary .onnx file"),
        (rb"PK\x03\x04", "a zip archive (a torch checkpoint, or a packed model)", "export or unpack it to .onnx first"),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "a compressed or tar archive", "unpack it first"),
        (rb"\x80[\x02-\x05]", "a pickle", "export the network to ONNX first"),
        (rb".{4}ORTM", "a model in onnxruntime's own ORT format", "give the .onnx file that it was made from"),
        (rb".{4}TFL3", "a TensorFlow Lite model", "convert it to ONNX first"),
        (rb"\x89HDF", "an HDF5 file", "convert it to ONNX first"),
        (rb".{8}\{\"", "a safetensors file: weights without a graph", "give the exported .onnx file"),
    )
)


def check_regular(path: Path) -> int:
    """Size of a model's file; refuses what is not there, and what is no regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError("there is no such model file", where=str(path), why=why, hint="check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise rejected(path, "it is not a regular file", "give the path of an .onnx file")
    return status.st_size


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Content]:
    """Bytes of a file that may be an ONNX model, mapped where there are many; it must not change while they are read."""
    size = check_regular(path)
    if size == 0:
        raise rejected(path, "the file is empty", "export or download it again")
    if size > LARGEST:
        why = f"it has {size} bytes; protobuf ends at {LARGEST}"
        raise rejected(path, why, "export it again with its weights in an external file")
    try:
        with path.open("rb") as file:
            known = identity(os.fstat(file.fileno()))
            small = size <= READ
            yield file.read(size) if small else memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
            if identity(os.fstat(file.fileno())) != known:
                raise rejected(path, "the file changed while it was read", "run again when nothing writes to it")
    except OSError as error:
        raise rejected(path, error.strerror or str(error), "check the permissions of the file") from error


def check_count(content: Content, path: Path) -> None:
    """Refuse a file of too many fields."""
    if count_fields(content) > MOST_FIELDS:
        why = f"it has more than {MOST_FIELDS:,} fields"
        raise too_large(path, why, "export the network in parts, with weights as raw data")


def parse(content: bytes, path: Path) -> onnx.ModelProto:
    """The ModelProto of a file."""
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception as error:
        raise _no_model(path, content, "it cannot be parsed as protobuf", "it may be truncated: export it again") from error
    if not proto.HasField("graph") or not proto.graph.node or not proto.opset_import:
        raise _no_model(path, content, "it holds no graph with nodes and an opset", "export it again")
    return proto


def _no_model(path: Path, content: bytes, why: str, hint: str) -> ModelError:
    """The refusal of bytes that are no model, saying what they look like instead."""
    for pattern, kind, advice in _LOOKALIKES:
        if pattern.match(content):
            return rejected(path, f"the file is {kind}", advice)
    return rejected(path, why, hint)


Layout = dict[int, "Layout"]


def _layout(descriptor: Any, known: dict[str, Layout]) -> Layout:
    """Numbers of the fields of a message that are messages, with theirs."""
    if descriptor.full_name not in known:
        known[descriptor.full_name] = layout = {}
        for entry in descriptor.fields:
            if entry.message_type is not None:
                layout[entry.number] = _layout(entry.message_type, known)
    return known[descriptor.full_name]


def count_fields(content: Content) -> int:
    """Fields of a serialised ModelProto and of the messages in it, up to just above `MOST_FIELDS`; 0 if those cannot be.

    Nothing is parsed: fields are stepped over. Where the bytes are no protobuf, the count ends.
    """
    count, limit = 0, MOST_FIELDS
    if len(content) < 2 * limit:  # a field takes a tag and a value
        return 0
    waiting = [(0, len(content), _layout(onnx.ModelProto.DESCRIPTOR, {}))]

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7

    try:
        while waiting and count <= limit:
            at, end, layout = waiting.pop()
            while at < end and count <= limit:
                count += 1
                tag = content[at]
                at += 1
                if tag > 127:
                    tag, at = varint(at - 1)
                kind = tag & 7
                if kind == 2:
                    size = content[at]
                    at += 1
                    if size > 127:
                        size, at = varint(at - 1)
                    if size and tag >> 3 in layout:
                        waiting.append((at, at + size, layout[tag >> 3]))
                    at += size
                elif kind == 0:
                    _, at = varint(at)
                else:
                    at += 8 if kind == 1 else 4
    except IndexError:
        return count
    return count
