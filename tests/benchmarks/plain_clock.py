"""Times of two models by onnxruntime alone: nothing of mscompile is imported here.

    python tests/benchmarks/plain_clock.py DENSE.onnx COMPILED.onnx BATCH.npz SECONDS

Both run the same batch, for about so long together, in rounds. Each has a session of its own in each round, and the process
to itself: idle threads of another session would spin, and take the processor from it. Prints JSON: for each model the
milliseconds of its runs, by the raw clock of the machine, which nothing sets, as minimum, lower quartile and median.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime as ort

ROUNDS, WARM, LEAST = 5, 3, 5
"""Sessions of each model; runs of each that do not count; runs that do, at least."""


def now() -> int:
    """Nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def summary(times: list[int]) -> dict[str, float]:
    """Minimum, lower quartile and median in ms."""
    lower, middle, _ = statistics.quantiles(times, n=4)
    return {"minimum": min(times) / 1e6, "quartile": lower / 1e6, "median": middle / 1e6}


def main() -> None:
    """Measure and print."""
    *models, batch, seconds = sys.argv[1:]
    feed = dict(np.load(batch))
    times: list[list[int]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, taken in zip(models, times, strict=True):
            session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
            for _ in range(WARM):
                session.run(None, feed)
            end, runs = now() + int(float(seconds) * 1e9 / ROUNDS / len(models)), 0
            while now() < end or runs < LEAST:
                start = now()
                session.run(None, feed)
                taken.append(now() - start)
                runs += 1
            del session
    print(json.dumps([summary(taken) for taken in times]))


if __name__ == "__main__":
    main()
