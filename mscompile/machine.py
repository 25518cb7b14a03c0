"""The machine that this runs on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

WIDE = 2048
"""Channels from which a matrix is worth several threads: on smaller ones they gain little, and wait for one another, and for
onnxruntime's, many times as long as the work takes wherever there are fewer free cores than threads."""


def cache_folder() -> Path:
    """The user's cache folder of this program, by the conventions of the operating system."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mscompile"


def processor() -> str:
    """Name of the processor as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


@contextmanager
def blas_threads(size: int = 0) -> Iterator[None]:
    """Linear algebra on matrices of so many channels: in one thread, from `WIDE` on in as many as it has by default.

    As a decorator too. One thread by default also makes sums the same on machines of any number of cores.
    """
    controller, threads = _blas()
    with controller.limit(limits=1 if size < WIDE else threads, user_api="blas"):
        yield


@cache
def _blas() -> tuple[Any, int]:
    import scipy.linalg  # noqa: F401  # it has a library of its own
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController().select(user_api="blas")
    return controller, max((library["num_threads"] for library in controller.info()), default=1)
