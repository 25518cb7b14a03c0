"""Third-party models calibrated end to end: sites, and what scored each.

    python tests/benchmarks/calibrate_zoo.py MODEL.onnx [MODEL.onnx ...] [--data NAME=FILE.npz] [--samples 64] [--batch 8]

Inputs are taken from `--data` (NAME is a model's file name without suffix), else made up by declared type and shape and said
to be so: float images are coarse noise, enlarged; integers are random below 1000, attention masks are ones, token types
zeros; free dimensions that are no samples are 32, or 224 along the sides of images. Made-up inputs show that a model passes,
not what its scores are worth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mscompile.errors import MscompileError
from mscompile.intake.samples import InputSpec
from mscompile.network.dense import open_dense
from mscompile.options import Options
from mscompile.stages import calibrate_model

LENGTH, SIDE, TOKENS = 32, 224, 1000


def made_up(spec: InputSpec, count: int, *, shared: bool) -> np.ndarray:
    """Values for one input."""
    rng = np.random.default_rng(0)
    image = len(spec.shape) == 4
    free = SIDE if image else LENGTH
    shape = [d if isinstance(d, int) else free for d in spec.shape]
    if shared:
        return np.zeros(shape, spec.dtype)
    shape[0] = count * (spec.shape[0] if isinstance(spec.shape[0], int) else 1)
    if spec.dtype.kind in "iu":
        if "mask" in spec.name or "type" in spec.name:
            return np.full(shape, "mask" in spec.name, spec.dtype)
        top = 256 if "byte" in spec.name else TOKENS
        return rng.integers(0, top, shape).astype(spec.dtype)
    if not image:
        return rng.standard_normal(shape).astype(spec.dtype)
    coarse = rng.standard_normal((*shape[:2], -(-shape[2] // 8), -(-shape[3] // 8)))
    smooth = np.kron(coarse, np.ones((8, 8)))[:, :, : shape[2], : shape[3]]
    return (smooth + 0.1 * rng.standard_normal(shape)).astype(spec.dtype)


def calibrate_one(path: Path, data: Path | None, count: int, batch: int) -> None:
    """Print one model's table."""
    began = time.perf_counter()
    try:
        dense = open_dense(path)
        free = any(spec.shape and not isinstance(spec.shape[0], int) for spec in dense.specs)
        arrays: object = data
        if data is None:
            alone = {s.name: free and all(isinstance(d, int) for d in s.shape) for s in dense.specs}
            arrays = {spec.name: made_up(spec, count, shared=alone[spec.name]) for spec in dense.specs}
        options = Options(probes=1, batch_size=batch, replacement="affine-pointwise", samples=count, anchors=0)
        found = calibrate_model(path, arrays, None, options)  # type: ignore[arg-type]
    except MscompileError as error:
        print(f"{path.name}: {error}")
        return
    source = "made-up inputs" if data is None else f"inputs of {data}"
    seconds = time.perf_counter() - began
    print(f"{path.name}: {len(found.dense.sites)} sites, {found.statistics.samples} samples, {source}, {seconds:.1f} s")
    bases = Counter(found.scores.basis[site.tensor] for site in found.dense.sites)
    for basis, sites in bases.items():
        print(f"  {sites:3d} by {basis}")
    means = sum("the mean replaces the optimal constant" in note for note in found.notes)
    print(f"  at {means} of them some constants are means: optima lie outside the range observed")
    for note in (note for note in found.notes if "no sample axis" in note):
        print(f"  note: {note}")


def main() -> None:
    """Calibrate every model given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    chosen = parser.parse_args()
    given = {name: Path(file) for name, _, file in (entry.partition("=") for entry in chosen.data)}
    for path in chosen.models:
        calibrate_one(path, given.get(path.stem), chosen.samples, chosen.batch)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
