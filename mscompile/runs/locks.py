"""Locks between processes: held on an open file, so that the system lets go of them however a process ends."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mscompile.errors import ResourceError, UsageError

try:
    import fcntl
except ImportError:  # a system without flock: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]

HELD = ".lock"
"""What names of lock files end in."""


def acquire(path: Path) -> IO[str] | None:
    """Lock a file, made if need be; None where another process holds it. Closing the file lets go.

    Raises
    ------
    OSError
        It cannot be made.
    """
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")  # noqa: PTH123, SIM115
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                return file
        file.close()  # whoever held it has removed it since it was opened here


def holder(path: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        return f"process {int(path.read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another process"


@contextlib.contextmanager
def claimed(*targets: Path | None) -> Iterator[None]:
    """Keep other runs from writing the same outputs, None aside; files beside them, gone in the end, hold the locks.

    What a run that was killed has left there unfinished is removed.

    Raises
    ------
    UsageError
        Another run is writing one, or it names no file.
    ResourceError
        Nothing may be written in its folder.
    """
    with contextlib.ExitStack() as held:
        for target in {os.path.realpath(path): path for path in targets if path is not None}.values():
            held.enter_context(_claimed(target))
        yield


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[None]:
    if not target.name:
        hint = "name a file with -o"
        raise UsageError("the output cannot be written", where=str(target), why="it names no file", hint=hint)
    lock = target.with_name(f".{target.name[:200]}{HELD}")
    try:
        file = acquire(lock)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # before anything is computed, not after
            raise ResourceError(
                "the output cannot be written",
                where=str(target),
                why=error.strerror or str(error),
                hint="check permissions, or name another output with -o",
            ) from error
        yield  # where no lock can be written no output can: checking or writing it says why
        return
    if file is None:
        raise UsageError(
            "another run writes this output",
            where=str(target),
            why=f"{holder(lock)} holds {lock.name} beside it",
            hint="wait for it to end, or name another output with -o",
        )
    try:
        _remove_drafts(target)
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _remove_drafts(target: Path) -> None:
    """Remove what `files.staged` has left behind in a process that was killed."""
    for folder in target.parent.glob(f".{glob.escape(target.name[:40])}.????????"):
        own = folder.is_dir() and not folder.is_symlink()
        if own and all(path.name.startswith(target.name) for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
