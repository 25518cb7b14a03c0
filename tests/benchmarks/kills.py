"""Kill a compile at random points: the output is the old one or the new one, and the run that goes on gives the same bytes.

    python tests/benchmarks/kills.py --kills 100

Prints one line per kill that fails, and a summary.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import mlp, samples

COMMAND = ("m.onnx", "--keep", "0.5", "--batch-size", "2", "-q", "--force", "-o", "out.onnx", "--work", "w")
OUTPUTS = ("out.onnx", "out.plan.json")
"""What must be the same bytes; a report holds times."""
SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 300.0
"""Longest that a run may take."""


@dataclass
class Found:
    """What became of the kills."""

    codes: Counter[str]
    corrupted: int = 0
    odd: int = 0
    locked: int = 0
    different: int = 0
    left: int = 0
    resumed: int = 0

    @property
    def bad(self) -> int:
        """Kills that broke a promise."""
        return self.corrupted + self.odd + self.locked + self.different + self.left


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the compile."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mscompile", *COMMAND]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In the background a shell may have told us to ignore interrupts, which a child would inherit.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)  # type: ignore[call-overload]
    signal.signal(signal.SIGINT, previous)
    return process


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of each output that is there."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OUTPUTS if (folder / name).exists()}


def prepare(folder: Path) -> None:
    """A model, its data, and an old output of another size."""
    onnx.save(mlp(), folder / "m.onnx")
    np.savez(folder / "m.calib.npz", x=np.concatenate([samples(seed=i) for i in range(4)]))
    for name in OUTPUTS:
        (folder / name).write_bytes(b"old")


def kill(kills: int, seed: int, folder: Path) -> Found:
    """Run unbroken once, then kill again and again, and go on after each."""
    rng, found = random.Random(seed), Found(Counter())
    fresh = folder / "fresh"
    fresh.mkdir()
    prepare(fresh)
    began = time.monotonic()
    process = start(fresh)
    assert process.wait(SECONDS) == 0, process.communicate()[1]
    whole = time.monotonic() - began
    wanted = digests(fresh)
    for number in range(kills):
        place = folder / f"{number}"
        place.mkdir()
        prepare(place)
        old = digests(place)
        process = start(place)
        chosen = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
        if number % 2:  # half of them at any time, half of them once something is kept
            while process.poll() is None and not list(place.glob("w/calibrate-*/journal.jsonl")):
                time.sleep(0.01)
        try:
            process.wait(rng.uniform(0.0, 0.5 if number % 2 else 1.05) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(chosen)
        _, err = process.communicate(timeout=SECONDS)
        found.codes[f"{chosen.name} {process.returncode}"] += 1
        now = digests(place)
        half = [name for name in OUTPUTS if now.get(name) not in (old[name], wanted[name])]
        # Before our handlers are there, signals end Python itself.
        odd = process.returncode not in (0, CODES[chosen], -chosen)
        found.corrupted, found.odd = found.corrupted + bool(half), found.odd + odd
        if half or odd:
            print(f"kill {number}: {chosen.name} {process.returncode} {half} {err[-400:]}")
        process = start(place)
        out, err = process.communicate(timeout=SECONDS)
        found.locked += "another run" in err
        if process.returncode or digests(place) != wanted:
            found.different += 1
            print(f"kill {number}: resumed to {process.returncode} {digests(place)} {out} {err[-400:]}")
        kept = {"m.onnx", "m.calib.npz", "w", "cache", "out.report.json", *OUTPUTS}
        if left := {path.name for path in place.iterdir()} - kept:
            found.left += 1
            print(f"kill {number}: {sorted(left)} are left")
        found.resumed += '"reused": []' not in (place / "out.report.json").read_text(encoding="utf-8")
        shutil.rmtree(place)
    return found


def main() -> None:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(options.kills, options.seed, Path(folder))
    print(", ".join(f"{code}: {count}" for code, count in sorted(found.codes.items())))
    print(
        f"{options.kills} kills: {found.corrupted} corrupted outputs, {found.odd} unexpected exit codes, {found.locked} "
        f"stale locks, {found.different} resumed runs with other bytes, {found.left} with files left behind; "
        f"{found.resumed} went on from what was kept"
    )
    sys.exit(found.bad > 0)


if __name__ == "__main__":
    main()
