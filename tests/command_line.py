"""The command line as tests run it, and what they look at then."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mscompile

KEEP = ("--keep", "0.5")
HOSTILE = "evil\x1b[31m[bold]\r\nname\u202e\x07\x7f\x9b2J\N{GRINNING FACE}"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    root = str(Path(mscompile.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, **options.pop("env", {})}
    given = [sys.executable, "-m", "mscompile", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(given, text=True, env=environment, **pipes)


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(ran: Ran, code: int, *words: str) -> None:
    """An error in four parts, on stderr alone."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert re.match(r"mscompile: \S.*\n  where: \S.*\n(  why:   \S.*\n(         .*\n)*)  try:   \S", ran.err), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err, ran.err
