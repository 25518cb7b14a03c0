"""Measured latency against onnxruntime's own profiler, before and after compiling.

    python tests/benchmarks/latency_count.py MODEL.onnx... [--keep 0.5]

Every MODEL.onnx needs its data MODEL.calib.npz beside it. Each network is compiled; its dense and its compiled file are
timed as `mscompile` does (`network.sizes.measure_latency`), while onnxruntime's profiler writes down when each of these
runs and each of its operators began and ended: the same runs by two clocks, so that what else runs on the machine does not
matter. Columns: milliseconds per batch, lower quartile, by `mscompile`, by the profiler for whole runs, and as its sum over
operators; the share of the dense model's time that the compiled one takes, by `mscompile` and by the sums. Fails where a
time differs from the profiler's by more than `WHOLE`, or from the sum over operators by more than `PARTS`.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from candidates import beside, table

import mscompile
from mscompile.files import load_model
from mscompile.intake.data import read
from mscompile.intake.samples import Samples
from mscompile.network import sizes
from mscompile.network.dense import open_dense

WHOLE = 1.15
"""A call from Python takes longer than the run inside it, by some microseconds, or a pause where the machine is busy."""
PARTS = 2.0
"""Operators alone: what lies between them, waiting for a core above all, and the profiler's own work is left out."""
SECONDS = 2.0
SAMPLES = 400


def profiled(dense: ir.Model, small: ir.Model, samples: Samples, batch_size: int) -> tuple[list[float], list[list[float]]]:
    """Milliseconds of a batch of both models by `measure_latency`, and by the profiler: of whole runs, and of operators."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        real = ort.SessionOptions

        def options() -> ort.SessionOptions:
            made = real()
            made.enable_profiling = True
            made.profile_file_prefix = f"{folder}/{len(began)}"
            began.append(made)
            return made

        began: list[ort.SessionOptions] = []
        patch.setattr(ort, "SessionOptions", options)
        measured = list(sizes.measure_latency(dense, small, samples, batch_size))
        gc.collect()  # profiles are written when sessions end
        found = [json.loads(next(Path(folder).glob(f"{i}_*")).read_text(encoding="utf-8")) for i in range(2)]
    return measured, [_quickest(events) for events in found]


def _quickest(events: list[dict[str, Any]]) -> list[float]:
    runs = [e for e in events if e.get("name") == "model_run"][1:]  # the first one is no measurement to mscompile either
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    starts = np.array([node["ts"] for node in nodes])
    spent = np.concatenate([[0.0], np.cumsum([node["dur"] for node in nodes])])
    bounds = [np.searchsorted(starts, [run["ts"], run["ts"] + run["dur"]]) for run in runs]
    return [
        sizes.quickest([run["dur"] / 1e3 for run in runs]),
        sizes.quickest([(spent[last] - spent[first]) / 1e3 for first, last in bounds]),
    ]


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keep", default=0.5, show_default=True, help="Share of every site's units to keep.")
def main(models: tuple[Path, ...], keep: float) -> None:
    """Print the table."""
    sizes.LATENCY_SECONDS = SECONDS
    rows, apart = [], False
    for path in models:
        options = mscompile.Options(keep=keep, samples=SAMPLES, probes=1, recalibrate=False)
        samples = read(beside(path, "calib"), open_dense(path).specs, limit=SAMPLES)
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "small.onnx"
            mscompile.compile_model(path, beside(path, "calib"), small, options)
            measured, found = profiled(load_model(path)[0], load_model(small)[0], samples, options.batch_size)
        for ours, (whole, parts) in zip(measured, found, strict=True):
            apart |= not 1 / WHOLE < ours / whole < WHOLE or not 1 <= ours / parts < PARTS
        cells = [f"{ours:.3f} / {whole:.3f} / {parts:.3f}" for ours, (whole, parts) in zip(measured, found, strict=True)]
        rows.append([path.stem, *cells, f"{measured[1] / measured[0]:.3f} / {found[1][1] / found[0][1]:.3f}"])
    print(table(["network", "dense, ms", "compiled, ms", "share"], rows))
    sys.exit(int(apart))


if __name__ == "__main__":
    main()
