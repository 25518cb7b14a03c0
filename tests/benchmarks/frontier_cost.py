"""What the candidates of the frontier cost beside the calibration they all come from.

    python tests/benchmarks/frontier_cost.py MODEL.onnx … [--runs 5]
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tests/benchmarks/frontier_cost.py --bare MODEL.onnx … [--runs 5]

First as the command says, `mscompile MODEL --params 0.5` in processes and folders of their own: `calibrate` and `search` of
the report's timings. The search is all from the risks measured to the last candidate's interchange-intervention accuracy;
what the candidates' latency takes to foretell, a fifth of a second for the dense network's own and more once per machine for
its operators', is `measure` there and not counted, nor is the order of elimination, which is `plan`.

With `--bare` the same parts in turn within one process that is warm: `calibrate` the pass over the samples alone, without
what the command does besides (batches that fit in memory, scores, checks of what was found); seconds of the processor and by
the clock. Medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics as middle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from candidates import beside, samples_of, table

from mscompile.calibration.calibration import calibrate
from mscompile.clock import Clock
from mscompile.network.dense import DenseModel, open_dense
from mscompile.options import Options
from mscompile.planning.preparation import eliminate, split, what_to_measure
from mscompile.planning.scores import score
from mscompile.runtime import no_progress
from mscompile.search.candidates import Workshop
from mscompile.search.frontier import Frontier

Seconds = tuple[float, float]
"""Of the processor, and by the clock."""


def elapsed(start: Seconds) -> Seconds:
    """Since `start`, a reading of both clocks."""
    return time.process_time() - start[0], time.perf_counter() - start[1]


def now() -> Seconds:
    """A reading of both clocks."""
    return time.process_time(), time.perf_counter()


def run(dense: DenseModel, path: Path) -> tuple[Seconds, Seconds, Seconds, int]:
    """Calibration, elimination, frontier, and the number of candidates."""
    options = Options()
    parts = split(dense, samples_of(dense, beside(path, "calib")), options)
    start = now()
    statistics = calibrate(
        dense.scm,
        dense.sites,
        parts["calibrate"],
        batch_size=options.batch,
        measure=what_to_measure(dense, options),
    )
    calibration = elapsed(start)
    scores = score(dense.scm, dense.sites, statistics, options.objective)
    start = now()
    eliminations = eliminate(dense, statistics, scores, options)
    elimination = elapsed(start)
    frontier = Frontier(Workshop(dense, statistics, scores, eliminations, parts, options, Clock(), no_progress))
    clock, start = frontier.workshop.clock, now()
    tried = frontier.tried()
    taken = elapsed(start)
    timed = clock.seconds["measure"]
    return calibration, elimination, (taken[0] - timed, taken[1] - timed), len(tried)


def reported(path: Path) -> tuple[float, float, int]:
    """Seconds of calibration and search, and candidates, in the report of a command that found nothing done."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compiled.onnx"
        options = ["--calib", str(beside(path, "calib")), "--params", "0.5", "--work", str(Path(folder) / "work")]
        command = [sys.executable, "-m", "mscompile", str(path), *options, "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        report = json.loads(out.with_suffix(".report.json").read_text())
    return report["timings"]["calibrate"], report["timings"]["search"], len(report["candidates"])


def by_report(path: Path, count: int) -> list[object]:
    """A row: medians, and the range of the share."""
    runs = [reported(path) for _ in range(count)]
    shares = [search / calibration for calibration, search, _ in runs]
    calibration, search = (middle.median(run[part] for run in runs) for part in (0, 1))
    share = f"{middle.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
    return [path.stem, f"{calibration:.3f}", f"{search:.3f}", share, runs[0][2]]


def bare(path: Path, count: int) -> list[object]:
    """A row: medians of CPU and clock."""
    dense = open_dense(path)
    runs = [run(dense, path) for _ in range(count)]
    times = [[middle.median(r[part][clock] for r in runs) for clock in (0, 1)] for part in range(3)]
    shares = [times[2][clock] / times[0][clock] for clock in (0, 1)]
    return [path.stem, *(f"{cpu:.2f} / {wall:.2f}" for cpu, wall in times), "{:.2f} / {:.2f}".format(*shares), runs[0][3]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bare", action="store_true")
    arguments = parser.parse_args()
    if arguments.bare:
        head = ["seconds, CPU / clock", "calibrate", "eliminate", "frontier", "its share", "candidates"]
    else:
        head = ["seconds by the clock", "calibrate", "search", "its share", "candidates"]
    row = bare if arguments.bare else by_report
    print(table(head, [row(path, arguments.runs) for path in arguments.models]))


if __name__ == "__main__":
    main()
