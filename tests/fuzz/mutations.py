"""Changes to the bytes of files, and to what JSON documents say."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), 1 << 31, 1 << 63,
    -(1 << 64), 10**400, "", "x", "\0", "\ud800", "../x", "<b>", "é" * 99, [], {}, [[]], [0], [0, 0], [1, 0], {"": 0},
)  # fmt: skip
"""What may stand in the place of anything."""
BIG = 1e290
"""Numbers below it can be calculated with."""
DEEP = 3000
"""Brackets in one another, more than Python reads."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = rng.randbytes(size)
        elif kind == 3:
            changed[at : at + 1] = rng.choice((b"\0", b"\xff", b"\x7f", b"-", b"9", b'"', b"[", b"null", b"1e999"))
        else:
            there = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[there : there + size]
    return bytes(changed)


def rewritten(content: bytes, rng: random.Random) -> bytes | None:
    """A JSON document that says something else in a few places; None where the bytes are none.

    The seal of a certificate, if there is one, is mostly made anew, so that what the changed certificate says is read.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if rng.random() < 0.01:
        return b"[" * DEEP + content
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        document = _changed(document, rng)
    if isinstance(document, dict) and "digest" in document and rng.random() < 0.95:
        document["digest"] = seal(document)
    try:
        return written(document).encode()
    except UnicodeEncodeError:
        return None


def written(document: Any) -> str:
    """As certificates are written."""
    return json.dumps(document, indent=1) + "\n"


def seal(document: dict[str, Any]) -> str:
    """The digest of a certificate of everything else in it."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("utf-8", "replace")).hexdigest()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with each of its keys."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def _changed(document: Any, rng: random.Random) -> Any:
    """The document with one place changed: something odd, something from elsewhere in it, twice, more, or nothing."""
    places = list(_places(document))
    if not places or rng.random() < 0.005:
        return copy.deepcopy(rng.choice(ODD))
    holder, key = rng.choice(places)
    there, other = rng.choice(places)
    kind, value = rng.randrange(7), holder[key]
    if kind == 0:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 1:
        holder[key] = copy.deepcopy(there[other])
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice([str(other), str(key) + "x", "", "\0", "digest"])] = copy.deepcopy(value)
    elif isinstance(value, bool | None):
        holder[key] = not value
    elif isinstance(value, int | float) and abs(value) < BIG:
        holder[key] = rng.choice([-value, value + 1, value - 1, value * 2, float(value), 1 - value, value / 3])
    elif isinstance(value, str):
        other_bytes = mutated(value.encode("utf-8", "surrogatepass"), rng).decode("latin1")
        holder[key] = rng.choice([value[1:], value * 2, value[::-1], value.upper(), other_bytes])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return document
