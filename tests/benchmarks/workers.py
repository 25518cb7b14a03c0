"""What calibration on many workers takes: measured per shard, and foretold from that.

    python tests/benchmarks/workers.py MODEL.onnx                 cost of a shard, and a table for 1 to 256 workers
    python tests/benchmarks/workers.py MODEL.onnx --workers 1     and what a process of this machine takes beyond none
    python tests/benchmarks/workers.py MODEL.onnx --workers ray   the same of a worker on Ray

A shard costs its worker the forward and reverse passes over its samples (*sum*), and whoever hands it out the packing of
its data and the unpacking and merging of what is found (*hand*). With W workers that do not share a processor, S shards take
about max(⌈S / W⌉ · sum, S · hand) + open.

One worker is compared with none, both on one thread, by turns, on samples repeated until none takes `--seconds`. Getting it
ready (starting its process or Ray, loading libraries and model) is told apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Instrument
from mscompile.calibration.summation import MOST_SHARDS, Shards, Summation
from mscompile.calibration.survey import survey
from mscompile.network.dense import find_data, open_dense
from mscompile.options import Options
from mscompile.planning.preparation import what_to_measure
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Cut, Run, Task, Tick
from mscompile.runs.work import versions
from mscompile.runs.workers import Crew, Process, crew_of

WORKERS = (1, 4, 16, 64, 256)
TOKENS = (10**8, 10**9, 10**10)
REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """Median time."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--workers", help="1 (a process), ray or ray://HOST:PORT: compare one such worker with none")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pairs", type=int, default=REPEATS)
    given = parser.parse_args()
    options = Options(samples=given.samples, batch_size=given.batch_size)
    dense = open_dense(given.model)
    samples = find_data(dense, None, options)
    assert samples is not None
    measure = what_to_measure(dense, options)
    first = survey(dense.scm, dense.sites, next(samples.batches(given.batch_size)), given.batch_size, measure.outputs)
    task = Instrument(dense.scm, dense.sites, first, measure, len(samples)).summation
    shards = Shards(samples, given.batch_size)

    start = time.perf_counter()
    packed = task.pack().pack()
    work = Summation.unpack(Parcel.unpack(packed)).open(1)
    opened = time.perf_counter() - start
    shard, totals = shards.cut(0), dict[str, np.ndarray]()
    summed = seconds(lambda: work(shard, lambda _: None))
    found = work(shard, lambda _: None).pack()
    handed = seconds(lambda: (shards.cut(0).pack(), task.add(totals, Parcel.unpack(found).arrays)))
    count = next(shards.counts())
    tokens = count * math.prod(next(iter(samples.inputs.values())).shape[1:2])
    print(
        f"shard: {count} samples, {tokens:,} tokens; sum {summed:.2f} s on one processor, hand {handed * 1e3:.1f} ms, "
        f"{len(found) / 1e6:.1f} MB back; open {opened:.1f} s, {len(packed) / 1e6:.1f} MB there"
    )
    print(f"{'workers':>8}" + "".join(f"{n / 1e9:>14g} G" for n in TOKENS))
    for workers in WORKERS:
        cells = []
        for total in TOKENS:
            wide = math.ceil(total / tokens / MOST_SHARDS)  # so many times as large, or there would be too many
            number = math.ceil(total / tokens / wide)
            least = max(math.ceil(number / workers) * wide * summed, number * handed) + opened
            cells.append(f"{least / 3600:>8.2f} h {number * wide * summed / workers / least:>4.0%}")
        print(f"{workers:>8}  " + "  ".join(cells))
    if given.workers:

        def calibrated(run: Run, number: int) -> float:
            taken = samples.take(np.arange(number * count) % len(samples))
            start = time.perf_counter()
            calibrate(dense.scm, dense.sites, taken, batch_size=given.batch_size, measure=measure, run=run)
            return time.perf_counter() - start

        compare(given.workers, task, calibrated, given.seconds, given.pairs)


class Single(Run):
    """No worker, on one thread, as a worker is."""

    def map(
        self, task: Task, numbers: Sequence[int], cut: Cut, tick: Tick, batches: Sequence[int]
    ) -> Generator[tuple[int, Parcel], None, None]:
        """See `Run`."""
        del batches
        work = task.open(1)
        for number in numbers:
            yield number, work(cut(number), tick)


def compare(kind: str, task: Task, work: Callable[[Run, int], float], least: float, pairs: int) -> None:
    """Time of one worker, once it is ready, over that of none, by turns; on shards that take `least` seconds."""
    start = time.perf_counter()
    crew = Crew(1, lambda: Process(1)) if kind.isdecimal() else crew_of(kind)
    assert crew is not None
    crew.size = 1
    worker, parcel = crew._hire(), task.pack()
    worker.send(Parcel({**parcel.header, "versions": versions()}, parcel.arrays).pack()).result()
    ready = time.perf_counter() - start
    crew._idle.append(worker)
    few = work(Single(), 2)
    number = 2 + math.ceil((least - few) / ((work(Single(), 6) - few) / 4))
    found = [(work(Single(), number), work(Run(crew=crew), number)) for _ in range(pairs)]
    crew.close()
    print(f"one worker, ready after {ready:.1f} s; {number} shards: " + ", ".join(f"{b:.2f} / {a:.2f} s" for a, b in found))
    print(f"{statistics.median(b / a for a, b in found) - 1:+.1%} over none")


if __name__ == "__main__":
    main()
