"""Memory that samples may take."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from mscompile.errors import ResourceError

MAP_ABOVE = 1 << 28  # .npy files of more bytes are memory-mapped; smaller ones cannot change under us once read


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the container's limit; unlimited where that is not known."""
    free, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError, IndexError):
        room = int(free.read_text().split("MemAvailable:")[1].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            room = min(room, int(limit.read_text()))
        return room
    return sys.maxsize


def check_room(size: int, where: str) -> None:
    """Refuse what needs more bytes than there are.

    Raises
    ------
    ResourceError
        It does.
    """
    if size > MAP_ABOVE and size > (room := available_memory()):
        raise too_large(size, room, where)


def too_large(size: int, room: int, where: str) -> ResourceError:
    """Return the error for `size` bytes where there is room for `room`."""
    why = f"{size / 2**30:.1f} GiB are needed, {room / 2**30:.1f} GiB are available"
    return ResourceError("the samples do not fit into memory", where=where, why=why, hint="supply fewer samples")
