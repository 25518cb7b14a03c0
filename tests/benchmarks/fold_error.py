"""Fold error, size and fidelity of the reference models over keep ratios and replacements.

    python tests/benchmarks/fold_error.py FOLDER
    python tests/benchmarks/fold_error.py FOLDER/cnn.onnx FOLDER/vit.onnx

Every model NAME.onnx needs its data NAME.calib.npz beside it: one half calibrates, everything is measured on the other.
The fold error compares the compiled graph with the dense graph under the same replacements, unfolded, in standard
deviations of the output; what exceeds 1e-4 is set in bold and makes the script fail. At keep 1.0 nothing is replaced, and
the outputs must be those of the original file bit for bit. Units are selected as by default: for constants by their score
under logit-mse, for affine maps jointly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import onnx
from candidates import (
    BATCH,
    Candidate,
    accuracy_of_interchange,
    beside,
    candidate_of,
    orders_of,
    samples_of,
    scores_of,
    statistics_of,
    table,
)

from mscompile.errors import MscompileError, VerificationError
from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.network.sizes import count_parameters
from mscompile.runtime import Session
from mscompile.verification.verify import fold_error

KEEPS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)
REPLACEMENTS = ("constant", "affine")
SWAP = 0.1
SPLIT_SEED = 0


def models_of(paths: Sequence[Path]) -> list[Path]:
    """The models named, and those with data in the folders named."""
    found = [p for path in paths for p in (sorted(path.glob("*.onnx")) if path.is_dir() else [path])]
    return [path for path in found if beside(path, "calib").is_file()]


def bit_equal(path: Path, candidate: Candidate, samples: Samples) -> bool:
    """Whether the compiled model and the original file agree in every bit of every output."""
    original = Session(onnx.load(path), optimise=False).run_all(samples.batches(BATCH))
    compiled = Session(candidate.compiled.model, optimise=False).run_all(samples.batches(BATCH))
    return all(np.array_equal(original[name], compiled[name], equal_nan=True) for name in original)


def rows_of(path: Path) -> Iterator[tuple[list[str], bool]]:
    """Rows of one model, each with whether it is sound."""
    dense = open_dense(path)
    fit, held_out = samples_of(dense, beside(path, "calib")).split((1, 1), SPLIT_SEED)
    statistics = statistics_of(dense, fit)
    scores = scores_of(dense, statistics, "logit-mse")
    orders = {name: orders_of(dense, statistics, scores, joint=name == "affine", swap=SWAP) for name in REPLACEMENTS}
    for keep in KEEPS:
        for replacement in REPLACEMENTS:
            start = time.perf_counter()
            try:
                candidate = candidate_of(dense, statistics, scores, orders[replacement], keep, replacement, swap=SWAP)
                error, sound = proof(candidate, held_out)
            except MscompileError as failure:
                yield [path.stem, f"{keep:g}", replacement, f"**{failure.what}: {failure.why}**", "", "", "", ""], False
                continue
            seconds = time.perf_counter() - start
            share = f"{candidate.parameters / count_parameters(dense.model):.3f}"
            if candidate.plan.sites:
                interchange = candidate.interchange(held_out)
                agreement = f"{interchange.plain(held_out)['agreement']:.4f}"
                iia = f"{accuracy_of_interchange(interchange, held_out, swap=SWAP, passes=1):.4f}"
            elif bit_equal(path, candidate, held_out):
                agreement, iia = "bit-equal", "nothing replaced"
            else:
                agreement, iia, sound = "**not bit-equal**", "nothing replaced", False
            yield [path.stem, f"{keep:g}", replacement, error, share, agreement, iia, f"{seconds:.2f}"], sound


def proof(candidate: Candidate, samples: Samples) -> tuple[str, bool]:
    """Fold error as a table cell, and whether it is tolerable."""
    try:
        return f"{fold_error(candidate.pair, candidate.plan, samples, BATCH):.1e}", True
    except VerificationError as failure:
        return f"**{failure.why}**", False


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(paths: tuple[Path, ...]) -> None:
    """Print the table; fail where a row is not sound."""
    rows = [row for path in models_of(paths) for row in rows_of(path)]
    head = ["model", "keep", "replacement", "fold error", "parameters", "agreement", "IIA, one site, p = 0.1"]
    print(table([*head, "plan, rewrite, proof [s]"], [row for row, _ in rows]))
    if not rows or not all(sound for _, sound in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
