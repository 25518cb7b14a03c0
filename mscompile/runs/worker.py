"""A worker: takes a task, then its shards, as bytes, and answers with what is found on each, or with what went wrong.

As a program it talks over its standard input and output, and ends with whoever started it::

    python -m mscompile.runs.worker THREADS
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

from mscompile import errors
from mscompile.errors import MscompileError, ResourceError, UnsupportedError
from mscompile.machine import blas_threads
from mscompile.providers import choose
from mscompile.runs.parcel import Parcel
from mscompile.runs.work import versions

TASKS = {
    "summation": ("mscompile.calibration.summation", "Summation"),
    "interchanges": ("mscompile.verification.trials", "Interchanges"),
}
"""By kind. What audits are made with is loaded apart from what compiles."""
PIPE_BYTES = 1 << 20
"""That a pipe holds."""
MACHINE = ("processor",)
"""What versions say of the machine, which may differ: float32 sums then differ in their last bits."""


class Desk:
    """Answers one message after the other."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._work: Callable[[Parcel], Parcel] | None = None
        self._refusal: Parcel | None = None

    def answer(self, content: bytes) -> bytes:
        """The answer to a message: a task, to get ready for, or a shard."""
        return self.reply(content).pack()

    def reply(self, content: bytes | memoryview) -> Parcel:
        """The same, before it is packed."""
        try:
            parcel = Parcel.unpack(content)
            if "kind" in parcel.header:
                self._work = self._refusal = None
                self._work = _opened(parcel, self._threads)
                return Parcel({}, {})
            if self._work is None:
                return self._refusal or _failure(ValueError("a shard came before its task"))
            return self._work(parcel)
        except Exception as error:
            answer = _failure(error)
            if self._work is None:
                self._refusal = answer
            return answer


def _opened(parcel: Parcel, threads: int | None) -> Callable[[Parcel], Parcel]:
    choose(parcel.header["versions"]["provider"])
    there, here = ({k: v for k, v in found.items() if k not in MACHINE} for found in (parcel.header["versions"], versions()))
    if there != here:
        raise UnsupportedError(
            "a worker has other versions installed",
            where=platform.node() or "a worker",
            why=", ".join(f"{name} {here.get(name)}, not {there[name]}" for name in there if there[name] != here.get(name)),
            hint="install the same mscompile, onnxruntime and numpy wherever workers run",
        )
    module, name = TASKS[parcel.header["kind"]]
    work = getattr(importlib.import_module(module), name).unpack(parcel).open(threads)
    return lambda shard: work(shard, lambda _: None)


def _failure(error: Exception) -> Parcel:
    """An error as an answer."""
    if isinstance(error, MemoryError):
        hint = "use fewer workers, a smaller --batch-size, or machines with more memory"
        error = ResourceError("memory ran out", where="a worker", why=str(error) or "MemoryError", hint=hint)
    if isinstance(error, MscompileError):
        parts = {part: getattr(error, part) for part in ("what", "where", "why", "hint")}
        return Parcel({"error": type(error).__name__, **parts}, {})
    return Parcel({"bug": "".join(traceback.format_exception(error))}, {})


def found_in(content: bytes | memoryview) -> Parcel:
    """What an answer holds.

    Raises
    ------
    MscompileError
        The error that the worker met.
    """
    parcel = Parcel.unpack(content)
    if "bug" in parcel.header:
        raise RuntimeError(f"a worker failed:\n{parcel.header['bug']}")
    if "error" in parcel.header:
        kind = getattr(errors, parcel.header["error"])
        raise kind(parcel.header["what"], **{part: parcel.header[part] for part in ("where", "why", "hint")})
    return parcel


def send(stream: IO[bytes], parts: Sequence[bytes | memoryview]) -> None:
    """Write a message, behind its length."""
    stream.write(sum(map(len, parts)).to_bytes(8, "little"))
    for part in parts:
        stream.write(part)
    stream.flush()


def widen(stream: IO[bytes]) -> None:
    """Let a pipe take more at once, where the system can."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def receive(stream: io.BufferedReader) -> memoryview:
    """Read a message.

    Raises
    ------
    EOFError
        The other side is gone.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    content = np.empty(int.from_bytes(head, "little"), np.uint8).data
    done = 0
    while done < len(content):
        done += (count := stream.readinto(content[done:]))
        if not count:
            raise EOFError
    return content


def main() -> None:
    """Answer until the other side is gone; then end at once, whatever is being done.

    The next message is read, and the last answer written, while one is answered.
    """
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    assert isinstance(source, io.BufferedReader)
    os.dup2(2, 1)  # what libraries print is no answer
    messages: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    written = ThreadPoolExecutor(1)
    last: Future[None] = written.submit(lambda: None)

    def listen() -> None:
        try:
            while True:
                messages.put(receive(source))
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    desk = Desk(int(sys.argv[1]))
    with blas_threads():
        while True:
            reply = desk.reply(messages.get())
            last.result()  # of answers, one waits at most
            last = written.submit(send, answers, reply.parts())


if __name__ == "__main__":
    main()
