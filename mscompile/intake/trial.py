"""A trial of a model in a child process: what runs compiled code on a file runs there first, within limits.

onnx's checker and shape inference, and onnxruntime, read the whole of a model and compute what its constants say. A crash
of theirs, an endless loop or terabytes of constants end the child, and become a refusal. This is not a sandbox: code that a
file could smuggle into these libraries would run with the rights of the user.

Children are forked by a server that has the libraries loaded and nothing else running; it starts while the command line
loads what it needs itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscompile import errors
from mscompile.errors import ModelError, MscompileError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir

SECONDS, BYTES_PER_SECOND = 60.0, 1 << 25
"""Processor time that a trial may take, and what of a model's files gives it a second more."""
PATIENCE = 10.0
"""Times that by the clock, on a machine that has much else to do: what only sleeps ends then."""
LOOP_SECONDS = 10.0
"""Time in which a model with loops must come to an end on one sample of zeros."""
PROGRAM = "from mscompile.intake.trial import serve; serve()"
MEMORY, TIMES = 2 << 30, 8
"""Memory that a trial may take: so many bytes, and so many times the model's files."""


@dataclass
class Server:
    """The process that forks trials."""

    process: subprocess.Popen[bytes]

    @classmethod
    def started(cls) -> Server:
        """A new one, which loads its libraries in the background."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", PROGRAM]
        return cls(
            subprocess.Popen(  # noqa: S603  # our own program
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """What became of a trial."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline() or b"null") or {"ended": "without an answer"}
        except BaseException:  # interrupted: what comes after would take this answer for its own
            self.stop()
            raise
        return answer

    def stop(self) -> None:
        """End it, and a trial that is under way."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@dataclass
class Trials:
    """Whether models are tried, and where."""

    wanted: bool = False
    server: Server | None = field(default=None, repr=False)

    def begin(self) -> Server:
        """From now on, try models before they are taken in; the server starts at once, where none is running."""
        self.wanted = True
        if self.server is None or self.server.process.poll() is not None:
            self.server = Server.started()
            atexit.register(self.server.stop)
        return self.server

    def end(self) -> None:
        """Take models in as they are; the server stays for the next time."""
        self.wanted = False


TRIALS = Trials()


def attempt(path: Path, size: int) -> None:
    """Try a model whose files have `size` bytes, if models are to be tried.

    Raises
    ------
    ModelError
        A library crashes on it.
    ResourceError
        It takes more memory or time than it may.
    MscompileError
        Whatever a library refuses it for.
    """
    if not TRIALS.wanted:
        return
    server = TRIALS.begin()
    memory, seconds = MEMORY + TIMES * size, SECONDS + size / BYTES_PER_SECOND
    found = server.ask(
        path=os.fspath(path.absolute()), memory=memory, seconds=seconds, wall=PATIENCE * seconds, loops=LOOP_SECONDS
    )
    if "error" in found:
        kind = getattr(errors, found["error"])
        raise kind(found["what"], where=str(path), why=found["why"], hint=found["hint"])
    if "ended" in found:
        late = found["ended"] in ("SIGKILL", "SIGXCPU")
        spent = f"{PATIENCE * seconds:.0f} s, or more memory than there is"
        if found["ended"] == "SIGXCPU":
            spent = f"{seconds:.0f} s of processor time"
        why = f"in a trial of one sample it took more than {spent}"
        hint = "if the file comes from a source that you trust, --trust takes it in without a trial"
        if late:
            raise ResourceError("the model takes too long", where=str(path), why=why, hint=hint)
        why = f"onnx or onnxruntime crashed on it ({found['ended']}), with {memory / 2**30:.1f} GiB of memory to use"
        raise ModelError("the model was rejected", where=str(path), why=why, hint=hint)


# --- in the server ------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests, one per line, until there are no more."""
    from mscompile import runtime  # noqa: F401  # so that children have them
    from mscompile.intake import loading  # noqa: F401  # so that children have them
    from mscompile.network import scm  # noqa: F401  # so that children have them

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_forked(json.loads(line))).encode() + b"\n")
        answers.flush()


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    """What a child says of a model, or what it died of."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(inlet)
            os.write(outlet, json.dumps(_tried(request)).encode())
        except BaseException as error:
            os.write(outlet, json.dumps({"ended": f"{type(error).__name__}: {error}"[:400]}).encode())
        finally:
            os._exit(0)
    os.close(outlet)
    content, deadline = b"", time.monotonic() + request["wall"]
    while select.select([inlet], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        part = os.read(inlet, 1 << 16)
        if not part:
            break
        content += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(inlet)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"ended": signal.Signals(os.WTERMSIG(status)).name}
    answer: dict[str, Any] = json.loads(content or b"null") or {"ended": "an exit without an answer"}
    return answer


def _tried(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: everything once, within limits."""
    from mscompile import runtime
    from mscompile.intake import loading
    from mscompile.network import scm

    status = Path("/proc/self/status")
    size = int(re.search(r"VmSize:\s+(\d+)", status.read_text())[1]) << 10 if status.exists() else 0  # type: ignore[index]
    seconds = math.ceil(request["seconds"])
    for limit, value in (
        (resource.RLIMIT_AS, size + request["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        soft, hard = resource.getrlimit(limit)
        top = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (top if soft == resource.RLIM_INFINITY else min(top, soft), hard))
    try:
        model, _ = loading.load_model(request["path"], hashed=False)
        scm.infer_shapes(model)
        runtime.RUN_SECONDS = request["loops"]
        with contextlib.suppress(errors.UnsupportedError):  # made-up inputs may be wrong, and not all is run that is read
            runtime.Session(model, threads=1).run(dict(_inputs(model)))
    except MscompileError as error:
        return {"error": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint}
    except MemoryError:
        hint = "if the file comes from a source that you trust, --trust takes it in without a trial"
        why = f"in a trial of one sample it took more than {request['memory'] / 2**30:.1f} GiB"
        return {"error": "ResourceError", "what": "the model takes too much memory", "why": why, "hint": hint}
    return {"accepted": True}


def _inputs(model: ir.Model) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """One sample of nothing, of length one where that is free."""
    import numpy as np

    for value in model.graph.inputs:
        if value.is_initializer() or value.dtype is None or value.shape is None:
            continue
        dims = [d if isinstance(d, int) and d > 0 else 1 for d in value.shape]
        yield value.name or "", np.zeros(dims, dtype=value.dtype.numpy())
