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
import safetensors
import safetensors.numpy


@dataclass(frozen=True)
class Parcel:
    """Arrays by name, and a header of JSON values."""

    header: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]

    def pack(self) -> bytes:
        """As bytes, the same for the same content. Arrays travel as plain bytes: safetensors lacks some of numpy's types."""
        kinds = {name: [array.dtype.name, list(array.shape)] for name, array in self.arrays.items()}
        plain = {name: np.ascontiguousarray(a).reshape(-1).view(np.uint8) for name, a in self.arrays.items()}
        text = json.dumps({"header": self.header, "arrays": kinds})
        return bytes(safetensors.numpy.save(plain, metadata={"parcel": text}))

    @classmethod
    def unpack(cls, content: bytes) -> Parcel:
        """The reverse of `pack`.

        Raises
        ------
        ValueError
            It is no parcel.
        """
        try:
            length = int.from_bytes(content[:8], "little")
            text = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["parcel"])
            plain = safetensors.numpy.load(content)
            arrays = {}
            for name, (kind, shape) in text["arrays"].items():
                dtype = np.dtype(kind)
                if dtype.hasobject or plain[name].size != dtype.itemsize * math.prod(shape):
                    raise ValueError(f"{name!r} does not have the bytes of {kind} {shape}")
                arrays[name] = plain[name].view(dtype).reshape(shape)
            return cls(text["header"], arrays)
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a parcel: {error}") from error
