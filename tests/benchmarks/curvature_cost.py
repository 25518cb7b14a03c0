"""Curvature of all units against brute force, and the memory that calibration takes.

    python tests/benchmarks/curvature_cost.py [--width 160] [--samples 256] [--probes 4]

A residual CNN of that width is made anew (weights do not matter here; torch is needed for it). Brute force replaces every
unit by its constant, one intervened run over the samples each; it is timed on some units of every site and taken times the
number of units. Peak memory is that of a process of its own for each number of samples, less what it held before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.prediction import unit_risks
from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.planning.scores import score
from mscompile.runtime import Session
from mscompile.verification.skeletons import skeleton_of

BATCH = 64
TIMED = 4
"""Units per site that brute force is timed on."""


def export_wide(width: int, path: Path) -> None:
    """Write a residual CNN of three blocks."""
    import torch

    from mscompile.models.architectures import GlobalAverage, Residual, chain
    from mscompile.models.export import export

    torch.manual_seed(0)
    stem = chain(conv=torch.nn.Conv2d(1, width, 3, padding=1), relu=torch.nn.ReLU(), pool=torch.nn.MaxPool2d(2))
    blocks = {f"block{i}": Residual(width) for i in range(3)}
    network = chain(
        stem=stem, pool=torch.nn.MaxPool2d(2), **blocks, average=GlobalAverage(), head=torch.nn.Linear(width, 10)
    )
    export(network, noise(2), path)


def noise(count: int) -> np.ndarray:
    """Images of noise."""
    return np.random.default_rng(0).standard_normal((count, 1, 28, 28)).astype(np.float32)


def measure_of(output: str, probes: int) -> Measure:
    """Scores of every unit of every site for constant replacement."""
    return Measure(covariance=False, outputs={output: 1.0}, curvature="identity", probes=probes)


def against_brute_force(path: Path, count: int, probes: int) -> None:
    """Print the seconds of both."""
    dense = open_dense(path)
    samples = Samples({"x": noise(count)}, None, "noise")
    began = time.perf_counter()
    found = calibrate(dense.scm, dense.sites, samples, batch_size=BATCH, measure=measure_of(dense.output, probes))
    scores = score(dense.scm, dense.sites, found, "logit-mse")
    curvature, brute, units = time.perf_counter() - began, 0.0, 0
    skeleton = skeleton_of(dense.model)
    session = Session(skeleton)
    for site in dense.sites:
        rules, some = [scores.constants[site.tensor]], np.arange(TIMED)
        began = time.perf_counter()
        rank, basis = dense.ranks[site.tensor], scores.basis[site.tensor]
        unit_risks(skeleton, session, site, rank, rules, some, basis, {dense.output: 1.0}, samples, BATCH)
        brute += (time.perf_counter() - began) * site.size / TIMED
        units += site.size
    print(f"{len(dense.sites)} sites, {units} units, {count} samples, {probes} probes; load {os.getloadavg()[0]:.1f}")
    print(f"curvature of all {curvature:.2f} s; brute force {brute:.1f} s; {brute / curvature:.0f} times")


def peak(path: Path, count: int) -> None:
    """Print the peak memory of this process before and after calibration, in MiB."""
    dense = open_dense(path)
    samples = Samples({"x": noise(count)}, None, "noise")
    Session(dense.model).run(next(samples.batches(BATCH)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    before = high_water()
    calibrate(dense.scm, dense.sites, samples, batch_size=BATCH, measure=measure_of(dense.output, 1))
    print(f"{count:5d} samples: {before:.0f} MiB before calibration, {high_water() - before:.0f} MiB more at the peak of it")


def high_water() -> float:
    """Peak resident memory in MiB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "N"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        peak(Path(chosen.peak[0]), int(chosen.peak[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "wide.onnx"), Path(folder, "narrow.onnx")
        export_wide(32, narrow)
        for count in (500, 2000, 8000):
            subprocess.run([sys.executable, __file__, "--peak", str(narrow), str(count)], check=True)
        export_wide(chosen.width, wide)
        against_brute_force(wide, chosen.samples, chosen.probes)


if __name__ == "__main__":
    main()
