"""Measured latency against a plain onnxruntime session, before and after compiling.

    python tests/benchmarks/latency_count.py MODEL.onnx... [--keep 0.5] [--seconds 5]

Every MODEL.onnx needs its data MODEL.calib.npz beside it. Each network is compiled; its dense and its compiled file are
timed as `mscompile` does (`network.sizes.measure_latency`), and by ``plain_clock.py``: a process of its own in which
onnxruntime runs the same two files on the same batch, with as many threads, timed by another clock. Columns: milliseconds
per batch by `mscompile` and by the other, lower quartiles; the share of the dense model's time that the compiled one takes,
by both, and by the other's minima. Fails where the shares by lower quartiles differ by more than `APART`: times drift with
what else runs on the machine, shares hardly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from candidates import beside, table

import mscompile
from mscompile.files import load_model
from mscompile.intake.data import read
from mscompile.network import sizes
from mscompile.network.dense import open_dense

APART = 0.05
"""Share of a share: what two measurements of some seconds each differ by on a machine that does nothing else."""
SAMPLES = 400
CLOCK = Path(__file__).parent / "plain_clock.py"


def counted(dense: Path, small: Path, batch: Path, seconds: float) -> list[dict[str, float]]:
    """What the other process finds."""
    command = [sys.executable, str(CLOCK), str(dense), str(small), str(batch), str(seconds)]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"ORT_DISABLE_TELEMETRY": "1"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    return list(json.loads(found.stdout))


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keep", default=0.5, show_default=True, help="Share of every site's units to keep.")
@click.option("--seconds", default=5.0, show_default=True, help="Seconds that each of both measures a network.")
def main(models: tuple[Path, ...], keep: float, seconds: float) -> None:
    """Print the table."""
    sizes.LATENCY_SECONDS = seconds
    rows, apart = [], False
    for path in models:
        options = mscompile.Options(keep=keep, samples=SAMPLES, probes=1, recalibrate=False)
        samples = read(beside(path, "calib"), open_dense(path).specs, limit=SAMPLES)
        with tempfile.TemporaryDirectory() as folder:
            small, batch = Path(folder) / "small.onnx", Path(folder) / "batch.npz"
            mscompile.compile_model(path, beside(path, "calib"), small, options)
            np.savez(batch, **next(samples.batches(options.batch)))
            ours = sizes.measure_latency(load_model(path)[0], load_model(small)[0], samples, options.batch)
            theirs = counted(path, small, batch, seconds)
        shares = [ours[1] / ours[0], *(theirs[1][name] / theirs[0][name] for name in ("quartile", "minimum"))]
        apart |= abs(shares[1] / shares[0] - 1) > APART
        cells = [f"{mine:.3f} / {other['quartile']:.3f}" for mine, other in zip(ours, theirs, strict=True)]
        rows.append([path.stem, *cells, " / ".join(f"{share:.3f}" for share in shares)])
    print(table(["network", "dense, ms", "compiled, ms", "share"], rows))
    sys.exit(int(apart))


if __name__ == "__main__":
    main()
