"""The machine that this runs on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

WIDE = 2048
"""Channels from which a matrix is worth several threads: on smaller ones they gain little, and wait for one another, and for
onnxruntime's, many times as long as the work takes wherever there are fewer free cores than threads."""
GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take."""
QUOTAS = (
    (str(GROUP / "cpu.max"),),
    (str(GROUP / "cpu/cpu.cfs_quota_us"), str(GROUP / "cpu/cpu.cfs_period_us")),
)
"""Where Linux says how many microseconds of processor time a container has in how many, by version of its control groups."""


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


def free_memory() -> int:
    """Bytes that the machine, or the container that this runs in, has to give."""
    import psutil

    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):
        most, used = (int((GROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
        known = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, most - used + int(known["inactive_file"]))
    return max(int(free), 0)


@cache
def cores() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for place in QUOTAS:
        with suppress(OSError, ValueError):
            quota, period = (int(number) for file in place for number in Path(file).read_text(encoding="ascii").split())
            if quota > 0:
                count = min(count, -(-quota // period))
    return count


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
    return controller, min(cores(), max((library["num_threads"] for library in controller.info()), default=1))
