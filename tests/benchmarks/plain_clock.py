"""Times of two models by onnxruntime alone: nothing of mscompile is imported here.

    python tests/benchmarks/plain_clock.py DENSE.onnx COMPILED.onnx BATCH.npz SECONDS

Both run the same batch in turn, each as often, for about so long. Prints JSON: for each model the milliseconds of its runs,
by the raw clock of the machine, which nothing sets or slews, as minimum, lower quartile and median.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime as ort


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
    sessions = [ort.InferenceSession(model, providers=["CPUExecutionProvider"]) for model in models]
    times: list[list[int]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feed)
    end = now() + int(float(seconds) * 1e9)
    while now() < end or len(times[0]) < 20:
        for session, taken in zip(sessions, times, strict=True):
            start = now()
            session.run(None, feed)
            taken.append(now() - start)
    print(json.dumps([summary(taken) for taken in times]))


if __name__ == "__main__":
    main()
