"""Compile a trained ONNX network into a smaller one that is a verified causal abstraction of it.

>>> import mscompile
>>> result = mscompile.compile_model("model.onnx", "model.calib.npz", "model.ms.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mscompile.errors import MscompileError

# onnxruntime from 1.29 on reports to its maker, from when it is first loaded, unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from mscompile.options import Options
    from mscompile.pipeline import Compilation, compile_model, inspect
    from mscompile.version import __version__

__all__ = ["Compilation", "MscompileError", "Options", "__version__", "compile_model", "inspect"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: onnx and onnxruntime take longer to import than `--help` may take.
    if name == "__version__":
        from mscompile.version import __version__

        return __version__
    if name in __all__:
        from mscompile import options, pipeline

        return getattr(options if name == "Options" else pipeline, name)
    raise AttributeError(f"module 'mscompile' has no attribute {name!r}")
