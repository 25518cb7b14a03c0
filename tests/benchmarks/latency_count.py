"""Measured latency against onnxruntime's own profiler, before and after compiling.

    python tests/benchmarks/latency_count.py MODEL.onnx... [--keep 0.5]

Every MODEL.onnx needs its data MODEL.calib.npz beside it. Each network is compiled; its dense and its compiled file are
then timed as `mscompile` does (`mscompile.sizes.measure_latency`), and run by a session of onnxruntime alone whose profiler
writes down when each run and each of its operators began and ended. Columns: milliseconds per batch, lower quartile, by
`mscompile`, by the profiler for whole runs, and as its sum over operators; the share of the dense model's time that the
compiled one takes, by `mscompile` and by the profiler. Fails where times or shares differ by more than `FACTOR`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort
from candidates import beside, table

import mscompile
from mscompile import sizes
from mscompile.data import read
from mscompile.dense import open_dense
from mscompile.files import load_model

FACTOR = 1.5
"""Times of one model on one machine, measured one after the other, differ by less unless the machine is busy."""
RUNS = 60
SECONDS = 2.0
SAMPLES = 400


def profiled(path: Path, batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Milliseconds of a batch by onnxruntime's profiler: of a whole run, and of its operators together."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, dict(batch))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [e for e in events if e.get("name") == "model_run"]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    within = [
        sum(n["dur"] for n in nodes if run["ts"] <= n["ts"] and n["ts"] + n["dur"] <= run["ts"] + run["dur"]) for run in runs
    ]
    # The first run reserves memory, and is no measurement to mscompile either.
    return sizes.quickest([e["dur"] / 1e3 for e in runs[1:]]), sizes.quickest([total / 1e3 for total in within[1:]])


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keep", default=0.5, show_default=True, help="Share of every site's units to keep.")
def main(models: tuple[Path, ...], keep: float) -> None:
    """Print the table."""
    sizes.LATENCY_SECONDS = SECONDS
    rows, apart = [], False
    for path in models:
        options = mscompile.Options(keep=keep, samples=SAMPLES, probes=1)
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "small.onnx"
            mscompile.compile_model(path, beside(path, "calib"), small, replace(options, recalibrate=False))
            dense = open_dense(path)
            samples = read(beside(path, "calib"), dense.specs, limit=SAMPLES)
            batch = next(samples.batches(options.batch_size))
            measured = sizes.measure_latency(load_model(path)[0], load_model(small)[0], samples, options.batch_size)
            found = [profiled(file, batch) for file in (path, small)]
        shares = measured[1] / measured[0], found[1][0] / found[0][0]
        ratios = [one / other for one, (other, _) in zip(measured, found, strict=True)] + [shares[0] / shares[1]]
        apart |= any(not 1 / FACTOR < ratio < FACTOR for ratio in ratios)
        cells = [f"{ms:.3f} / {run:.3f} / {nodes:.3f}" for ms, (run, nodes) in zip(measured, found, strict=True)]
        rows.append([path.stem, *cells, f"{shares[0]:.2f} / {shares[1]:.2f}"])
    print(table(["network", "dense, ms", "compiled, ms", "share"], rows))
    sys.exit(int(apart))


if __name__ == "__main__":
    main()
