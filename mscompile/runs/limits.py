"""Limits of time and memory: a watch beside the run, which stops it where one is exceeded."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil

from mscompile.errors import ResourceError, UsageError
from mscompile.runtime import Progress

LOOK_SECONDS = 0.1
"""Between looks at the clock and the memory."""
HARD = 1.25
"""Times the memory limit beyond which the process ends, whatever it is doing, where it has not stopped by the next look."""
SIZES = {"": 1, **{f"{unit}{end}": size for n, unit in enumerate("kmgt", 1) for end, size in
                   (("", 1000**n), ("b", 1000**n), ("ib", 1024**n))}, "b": 1}  # fmt: skip
TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str, option: str = "--memory-limit") -> int:
    """``2GB``, ``512MiB`` or a number of bytes."""
    return int(_quantity(text, SIZES, option, "2GB or 512MiB"))


def parse_seconds(text: str, option: str = "--time-limit") -> float:
    """``90``, ``15m``, ``2h``."""
    return _quantity(text, TIMES, option, "90s, 15m or 2h")


def _quantity(text: str, units: dict[str, Any], option: str, example: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]) > 0:
        raise UsageError(
            "this limit cannot be read",
            where=f"{option} {text}",
            why="it is no positive number with a unit",
            hint=f"write {example}",
        )
    return float(match[1]) * float(units[match[2]])


class Stopped(BaseException):
    """A limit stopped the run. Not an Exception, so that nothing on the way mistakes it for an error of its own."""

    def __init__(self, error: ResourceError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Put off what would stop the run until files that belong together are all written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    late: dict[int, None] = {}
    held = [n for n in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGALRM", None)) if n is not None]
    previous = {number: signal.signal(number, lambda seen, _: late.setdefault(seen)) for number in held}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for number in late:
        signal.raise_signal(number)


class Limits:
    """A watch over a run.

    In the main thread of a process the run is stopped by a signal, wherever it is; elsewhere where it shows its progress.

    Parameters
    ----------
    seconds, memory
        Of this process and those that it started; None for no limit.
    """

    def __init__(self, seconds: float | None = None, memory: int | None = None) -> None:
        self.seconds, self.memory = seconds, memory
        self.exceeded: ResourceError | None = None
        self._end = threading.Event()
        self._watcher: threading.Thread | None = None
        self._signal: bool = False
        self._previous: Any = None

    def __enter__(self) -> Limits:
        if self.seconds is not None or self.memory is not None:
            if threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill"):
                self._previous, self._signal = signal.signal(signal.SIGALRM, self._raise), True
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._watcher is not None:
            self._watcher.join()  # a signal that it sends after the handler is gone would end the process
        if self._signal:
            signal.signal(signal.SIGALRM, self._previous)

    def progress(self, shown: Progress) -> Progress:
        """Progress that looks at the limits on its way."""

        def watched(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
            for item in shown(items, description, total):
                self._raise()
                yield item

        return watched

    def _raise(self, *_: object) -> None:
        if self.exceeded is not None and not self._end.is_set():
            self._end.set()
            raise Stopped(self.exceeded)

    def _watch(self) -> None:
        start, main = time.monotonic(), threading.main_thread().ident
        while not self._end.wait(self._pause(time.monotonic() - start)):
            used = _resident() if self.memory is not None else 0
            told = self.exceeded is not None
            if self.exceeded is None:
                self.exceeded = self._found(time.monotonic() - start, used)
            if self.exceeded is not None and self._signal and main is not None:
                signal.pthread_kill(main, signal.SIGALRM)
            if self.memory is not None and used > HARD * self.memory and told:
                with contextlib.suppress(OSError):
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"mscompile: {self.exceeded}\n".encode())
                os._exit(ResourceError.exit_code)

    def _pause(self, seconds: float) -> float:
        """Until the next look."""
        left = LOOK_SECONDS if self.seconds is None or self.exceeded is not None else max(self.seconds - seconds, 0.001)
        return min(LOOK_SECONDS, left)

    def _found(self, seconds: float, used: int) -> ResourceError | None:
        if self.seconds is not None and seconds > self.seconds:
            return ResourceError(
                "the time limit is reached",
                where=f"--time-limit {self.seconds:g}s",
                why="the run takes longer",
                hint="give it more time",
            )
        if self.memory is not None and used > self.memory:
            return ResourceError(
                "the memory limit is reached",
                where=f"--memory-limit {gigabytes(self.memory)}",
                why=f"{gigabytes(used)} are in use",
                hint="raise it, or use a smaller --batch-size or fewer --workers",
            )
        return None


def _resident() -> int:
    """Bytes of this process and all that it started, without pages of mapped files where the system tells them apart."""
    own, total = psutil.Process(), 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used = process.memory_info()
            total += used.rss - getattr(used, "shared", 0)
    return total


def gigabytes(size: float) -> str:
    """A size in words, of three digits where it is small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"
