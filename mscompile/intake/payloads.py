"""The weights in a model's file, apart from its graph: taken out before protobuf copies them, and put back in writing.

Fields are stepped over as in `mscompile.intake.wire`. What is not plainly as expected is left where it is, for protobuf to
judge.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx

LEAST = 1 << 10
"""Bytes from which a tensor's data is taken out."""

GRAPH, INITIALIZER = 7, 5
"""Numbers of fields: of a model, and of a graph."""
DATA_TYPE, RAW_DATA = 2, 9
"""Numbers of fields of a tensor."""
_OTHER_DATA, _LOCATION = frozenset({3, 4, 5, 6, 7, 10, 11, 13}), 14
"""Further fields of a tensor that hold its data, or say that it is elsewhere (the last one where it is not 0)."""

_NAMES = "FLOAT FLOAT16 BFLOAT16 DOUBLE INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64"
PLAIN = frozenset(getattr(onnx.TensorProto, name) for name in _NAMES.split())
"""Element types whose raw data is an array as numpy has it."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | memoryview | Bytes
Content = bytes | memoryview
Entry = tuple[int, int, int, int, int]
"""A field: number, kind, where it begins, where its value begins (of a number: the number), where it ends."""


class _UnexpectedError(Exception):
    """The bytes are not what protobuf writes."""


def _varint(content: Content, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _UnexpectedError


def _fields(content: Content, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        start = at
        tag, at = _varint(content, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(content, at, end)
        elif kind == _BYTES:
            size, value = _varint(content, at, end)
            at = value + size
        elif kind in (_FIXED64, _FIXED32):
            value = at
            at += 8 if kind == _FIXED64 else 4
        else:
            raise _UnexpectedError
        if at > end or not number:
            raise _UnexpectedError
        yield number, kind, start, value, at


def _initializers(content: Content) -> Iterator[tuple[Entry, Entry]]:
    """Each tensor among a model's initializers, with the graph that it is in."""
    for graph in _fields(content, 0, len(content)):
        if graph[0] == GRAPH and graph[1] == _BYTES:
            for entry in _fields(content, graph[3], graph[4]):
                if entry[0] == INITIALIZER and entry[1] == _BYTES:
                    yield graph, entry


def split(content: Content) -> tuple[bytes, dict[int, Content]]:
    """A serialised ModelProto without the raw data of its larger initializers, and these by their numbers, not copied.

    Where the content cannot be followed, it comes back as a whole.
    """
    content = memoryview(content)
    found: dict[int, Content] = {}
    cuts: list[tuple[Entry, Entry, int, int]] = []
    try:
        for number, (graph, entry) in enumerate(_initializers(content)):
            if entry[4] - entry[3] < LEAST:
                continue
            fields = list(_fields(content, entry[3], entry[4]))
            raw = [field for field in fields if field[0] == RAW_DATA]
            kinds = [value for at, kind, _, value, _ in fields if at == DATA_TYPE and kind == _VARINT]
            if len(raw) != 1 or raw[0][1] != _BYTES or raw[0][4] - raw[0][3] < LEAST:
                continue
            elsewhere = any(at in _OTHER_DATA or (at == _LOCATION and value) for at, _, _, value, _ in fields)
            if kinds[-1:] and kinds[-1] in PLAIN and not elsewhere:
                cuts.append((graph, entry, raw[0][2], raw[0][4]))
                found[number] = content[raw[0][3] : raw[0][4]]
    except _UnexpectedError:
        return bytes(content), {}
    return (b"".join(_without(content, cuts)), found) if cuts else (bytes(content), {})


def _without(content: memoryview, cuts: list[tuple[Entry, Entry, int, int]]) -> Iterator[Content]:
    """The content without the ranges that `cuts` names last, with the lengths of tensors and graphs as they are then."""
    written = 0
    for graph, group in itertools.groupby(cuts, key=operator.itemgetter(0)):
        inner: list[Content] = []
        at = graph[3]
        for _, entry, start, end in group:
            inner += [content[at : entry[2]], _head(INITIALIZER, entry[4] - entry[3] - (end - start))]
            inner += [content[entry[3] : start], content[end : entry[4]]]
            at = entry[4]
        inner.append(content[at : graph[4]])
        yield content[written : graph[2]]
        yield _head(GRAPH, sum(map(len, inner)))
        yield from inner
        written = graph[4]
    yield content[written:]


def joined(skeleton: bytes, payloads: Mapping[int, Buffer]) -> Iterator[Content]:
    """A serialised ModelProto, in parts, whose initializers of those numbers, which have no data, are given theirs.

    What comes out is what protobuf would have written, byte for byte.
    """
    content = memoryview(skeleton)
    entries = dict(enumerate(_initializers(content)))
    graph = next(graph for graph, _ in entries.values()) if payloads else None
    if graph is None:
        yield skeleton
        return
    inner: list[Content] = []
    at = graph[3]
    for number, data in sorted(payloads.items()):
        _, entry = entries[number]
        behind = (start for field, _, start, _, _ in _fields(content, entry[3], entry[4]) if field > RAW_DATA)
        place, head = next(behind, entry[4]), _head(RAW_DATA, len(data))
        inner += [content[at : entry[2]], _head(INITIALIZER, entry[4] - entry[3] + len(head) + len(data))]
        inner += [
            content[entry[3] : place],
            head,
            data.data if isinstance(data, np.ndarray) else data,
            content[place : entry[4]],
        ]
        at = entry[4]
    inner.append(content[at : graph[4]])
    yield content[: graph[2]]
    yield _head(GRAPH, sum(map(len, inner)))
    yield from inner
    yield content[graph[4] :]


def _head(number: int, size: int) -> bytes:
    """Tag and length of a field of bytes."""
    parts = []
    for value in (number << 3 | _BYTES, size):
        left = value
        while left > 127:
            parts.append(left & 127 | 128)
            left >>= 7
        parts.append(left)
    return bytes(parts)
