"""Parcels: arrays with a header, as bytes, to be kept in files and sent to workers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 known to numpy by name
import numpy as np
import numpy.typing as npt

ALIGNED = 64
"""Bytes that the arrays begin at a multiple of."""


@dataclass(frozen=True)
class Parcel:
    """Arrays by name, and a header of JSON values."""

    header: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]

    def parts(self) -> list[bytes | memoryview]:
        """As bytes in pieces, the same for the same content; arrays are not copied.

        A safetensors file, in which arrays are plain bytes, as safetensors lacks some of numpy's types; those of large items
        come first, so that all are aligned.
        """
        arrays = sorted(self.arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        kinds = {name: [array.dtype.name, list(array.shape)] for name, array in arrays}
        head: dict[str, Any] = {"__metadata__": {"parcel": json.dumps({"header": self.header, "arrays": kinds})}}
        end, pieces = 0, list[bytes | memoryview]()
        for name, array in arrays:
            head[name] = {"dtype": "U8", "shape": [array.nbytes], "data_offsets": [end, end + array.nbytes]}
            end += array.nbytes
            pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        text = json.dumps(head).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        return [len(text).to_bytes(8, "little") + text, *pieces]

    def pack(self) -> bytes:
        """As bytes."""
        return b"".join(self.parts())

    @classmethod
    def unpack(cls, content: bytes | memoryview) -> Parcel:
        """The reverse of `pack`; the arrays lie where the content does.

        Raises
        ------
        ValueError
            It is no parcel.
        """
        try:
            start = 8 + int.from_bytes(content[:8], "little")
            head = json.loads(bytes(content[8:start]))
            text = json.loads(head["__metadata__"]["parcel"])
            arrays = {}
            for name, (kind, shape) in text["arrays"].items():
                if not kind.isidentifier():  # numpy would read others as it reads its own language
                    raise ValueError(f"{kind!r} names no type")
                dtype, (first, end) = np.dtype(kind), head[name]["data_offsets"]
                count = math.prod(shape)
                if dtype.hasobject or first < 0 or min(shape, default=0) < 0 or end - first != dtype.itemsize * count:
                    raise ValueError(f"{name!r} does not have the bytes of {kind} {shape}")
                arrays[name] = np.frombuffer(content[start + first : start + end], np.uint8).view(dtype).reshape(shape)
            return cls(text["header"], arrays)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a parcel: {error}") from error
