"""What the candidates of the frontier cost beside the calibration they all come from.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tests/benchmarks/frontier_cost.py MODEL.onnx … [--runs 3]

Calibration is what `mscompile MODEL` measures by default; the frontier is all that follows until every candidate has its
interchange-intervention accuracy: opening the graphs, measuring risks, planning and trying. Both in turn, `--runs` times;
seconds of the processor and by the clock, medians. What the candidates' latency takes to foretell, a fifth of a second for
the dense network's own and more once per machine for its operators', is not counted.
"""

from __future__ import annotations

import argparse
import statistics as middle
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.models:
        dense = open_dense(path)
        runs = [run(dense, path) for _ in range(arguments.runs)]
        times = [[middle.median(r[part][clock] for r in runs) for clock in (0, 1)] for part in range(3)]
        shares = [times[2][clock] / times[0][clock] for clock in (0, 1)]
        rows.append(
            [path.stem, *(f"{cpu:.2f} / {wall:.2f}" for cpu, wall in times), "{:.2f} / {:.2f}".format(*shares), runs[0][3]]
        )
    print(table(["seconds, CPU / clock", "calibrate", "eliminate", "frontier", "its share", "candidates"], rows))


if __name__ == "__main__":
    main()
