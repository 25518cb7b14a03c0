"""Kill compiles and audits in the midst of what they do: there is the old output or the new, and who goes on gives the same.

    python tests/benchmarks/kills.py --kills 100

A run is watched from outside: what is in its work folder and beside its output tells what it is at. For each kill one of
these stages is drawn, and a moment in it, from how long it takes in a run that is left alone. Prints one line per kill that
breaks a promise, how many fell in which stage, and a summary.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import mlp, samples

SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 300.0
"""Longest that a run may take."""
ORPHAN_SECONDS = 20.0
"""Time in which whatever a run has started ends after it, on a busy machine."""
LOOK_SECONDS = 0.001
"""Between looks at what a run is at."""
START = "start-up"


@dataclass(frozen=True)
class Subject:
    """What is killed.

    Attributes
    ----------
    outputs
        What must be the same bytes, and is the old or the new at any time; a report holds times.
    more
        What else is there in the end.
    stages
        What a run is at, by what is seen first then; the last that is seen counts.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    more: frozenset[str]
    stages: dict[str, str]


DRAFT = ".out.*.????????"
WORK = ("--batch-size", "2", "-q", "--force", "--work", "w")
COMPILE = ("m.onnx", "--keep", "0.5", "-o", "out.onnx", *WORK)
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "compile",
            COMPILE,
            ("out.onnx", "out.plan.json"),
            frozenset({"out.report.json"}),
            {"reading": "w/run-*", "calibrating": "w/calibrate-*", "searching": "w/search-*", "writing": DRAFT},
        ),
        Subject(
            "workers",
            (*COMPILE, "--workers", "2"),
            ("out.onnx", "out.plan.json"),
            frozenset({"out.report.json"}),
            {"reading": "w/run-*", "working": "w/calibrate-*"},
        ),
        Subject(
            "audit",
            ("audit", "m.onnx", "s.onnx", "--data", "a.npz", "--table", "32", "-o", "out.audit.json", *WORK),
            ("out.audit.json", "out.audit.counterexample"),
            frozenset(),
            {
                "preparing": "w/run-*",
                "trying": "w/interchange-*",
                "explaining": "w/calibrate-*",
                "writing": ".out.*.????????",
            },
        ),
    )
}


@dataclass
class Found:
    """What became of the kills."""

    codes: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    corrupted: int = 0
    odd: int = 0
    locked: int = 0
    different: int = 0
    left: int = 0
    orphans: int = 0
    resumed: int = 0

    @property
    def bad(self) -> int:
        """Kills that broke a promise."""
        return self.corrupted + self.odd + self.locked + self.different + self.left + self.orphans


def start(subject: Subject, folder: Path) -> subprocess.Popen[str]:
    """Start a run."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    # In the background a shell may have told us to ignore interrupts, which a child would inherit.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom mscompile.cli import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", heard, *subject.command]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def digest(path: Path) -> str | None:
    """Sha256 of a file, or of all that is in a folder; None where there is neither."""
    if path.is_dir():
        return "".join(f"{file.name} {digest(file)}\n" for file in sorted(path.iterdir()))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def digests(subject: Subject, folder: Path) -> dict[str, str | None]:
    """Of each output."""
    return {name: digest(folder / name) for name in subject.outputs}


def prepare(subject: Subject, folder: Path, given: Path | None) -> None:
    """Models, data, and an old output of another size; `given` is where a compiled model is."""
    onnx.save(mlp(), folder / "m.onnx")
    np.savez(folder / "m.calib.npz", x=np.concatenate([samples(seed=i) for i in range(4)]))
    np.savez(folder / "a.npz", x=np.concatenate([samples(seed=i) for i in range(10, 16)]))
    if given is not None:
        shutil.copy(given / "out.onnx", folder / "s.onnx")
    for name in subject.outputs:
        if name.endswith("counterexample"):
            (folder / name).mkdir()
            (folder / name / "replay.py").write_bytes(b"old")
        else:
            (folder / name).write_bytes(b"old")


def stage_of(subject: Subject, folder: Path) -> str:
    """What a run is at, as far as can be seen."""
    at = START
    for stage, pattern in subject.stages.items():
        at = stage if any(True for _ in folder.glob(pattern)) else at
    return at


def watched(subject: Subject, folder: Path) -> dict[str, float]:
    """Seconds of each stage of a run that is left alone."""
    process, seconds, last = start(subject, folder), Counter[str](), time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        seconds[stage_of(subject, folder)] += now - last  # type: ignore[assignment]
        last = now
        time.sleep(LOOK_SECONDS)
    assert process.returncode in (0, 5, 6), process.communicate()[1]
    process.communicate()
    return dict(seconds)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that a run has started; none where it is gone."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ends(process: psutil.Process) -> bool:
    """Whether a process ends by itself."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        pass
    return True


def kill(subject: Subject, kills: int, seed: int, folder: Path, *, given: Path | None = None, jobs: int = 1) -> Found:
    """Run unbroken once, then kill again and again, and go on after each."""
    found, fresh = Found(), folder / f"{subject.name}-fresh"
    fresh.mkdir()
    prepare(subject, fresh, given)
    began = time.monotonic()
    seconds = watched(subject, fresh)
    print(
        f"{subject.name}: {time.monotonic() - began:.1f} s unbroken, of which "
        + ", ".join(f"{stage} {length * 1e3:.0f} ms" for stage, length in seconds.items())
    )
    wanted = digests(subject, fresh)
    with ThreadPoolExecutor(jobs) as turns:
        for _ in turns.map(lambda n: _kill(subject, n, seed, folder, given, seconds, wanted, found), range(kills)):
            pass
    return found


def _kill(
    subject: Subject,
    number: int,
    seed: int,
    folder: Path,
    given: Path | None,
    seconds: dict[str, float],
    wanted: dict[str, str | None],
    found: Found,
) -> None:
    rng = random.Random(f"{subject.name} {seed} {number}")
    place = folder / f"{subject.name}-{number}"
    place.mkdir()
    prepare(subject, place, given)
    old = digests(subject, place)
    chosen = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    # A tenth of all falls before anything is kept; the others are for each stage alike, however short.
    stages = [stage for stage in seconds if stage != START] or [START]
    aimed = START if rng.random() < 0.1 else stages[number % len(stages)]
    moment = rng.uniform(0.0, seconds[aimed])
    process, started = start(subject, place), []
    order = [START, *subject.stages]
    while process.poll() is None and order.index(stage_of(subject, place)) < order.index(aimed):
        time.sleep(LOOK_SECONDS)
    try:
        process.wait(moment)
        at = "ended before"
    except subprocess.TimeoutExpired:
        at = stage_of(subject, place)
        started = descendants(process)
        process.send_signal(chosen)
    if orphans := [other for other in started if not ends(other)]:
        found.orphans += 1
        print(f"{subject.name} {number}, {at}: {chosen.name} leaves {orphans}")
        for other in orphans:
            other.kill()
    _, err = process.communicate(timeout=SECONDS)
    found.stages[at] += 1
    found.codes[f"{chosen.name} {process.returncode}"] += 1
    now = digests(subject, place)
    half = [name for name in subject.outputs if now[name] not in (old[name], wanted[name])]
    half = [name for name in half if now[name] is not None or not name.endswith("counterexample")]
    # Before our handlers are there, signals end Python itself.
    odd = process.returncode not in (0, 5, 6, CODES[chosen], -chosen)
    found.corrupted, found.odd = found.corrupted + bool(half), found.odd + odd
    if half or odd:
        print(f"{subject.name} {number}, {at}: {chosen.name} {process.returncode} {half} {err[-400:]}")
    process = start(subject, place)
    out, err = process.communicate(timeout=SECONDS)
    found.locked += "another run" in err
    if process.returncode not in (0, 5, 6) or digests(subject, place) != wanted:
        found.different += 1
        print(f"{subject.name} {number}, {at}: resumed to {process.returncode} {digests(subject, place)} {out} {err[-400:]}")
    known = {"m.onnx", "m.calib.npz", "a.npz", "s.onnx", "w", "cache", *subject.outputs, *subject.more}
    if left := {path.name for path in place.iterdir()} - known:
        found.left += 1
        print(f"{subject.name} {number}, {at}: {sorted(left)} are left")
    report = place / "out.report.json"
    found.resumed += report.exists() and '"reused": []' not in report.read_text(encoding="utf-8")
    shutil.rmtree(place)


def main() -> None:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="in all, two of three of compiles, every fourth of them with workers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        audits, workers = options.kills // 3, options.kills // 6
        shares = {"compile": options.kills - audits - workers, "workers": workers, "audit": audits}
        for name, kills in shares.items():
            given = folder / "compile-fresh" if name == "audit" else None
            found = kill(SUBJECTS[name], kills, options.seed, folder, given=given, jobs=options.jobs)
            bad += found.bad
            print("  killed when " + ", ".join(f"{stage}: {count}" for stage, count in found.stages.most_common()))
            print("  signal, exit code: " + ", ".join(f"{code}: {count}" for code, count in sorted(found.codes.items())))
            print(
                f"  {kills} kills: {found.corrupted} corrupted outputs, {found.odd} unexpected exit codes, {found.locked} "
                f"stale locks, {found.different} resumed runs with other bytes, {found.left} with files left behind, "
                f"{found.orphans} with processes left behind"
                + ("" if name == "audit" else f"; {found.resumed} went on from what was kept")
            )
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
