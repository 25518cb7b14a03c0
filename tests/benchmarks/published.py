"""Interchange accuracy at the penultimate layer of an MLP on MNIST, beside the published figures.

    python -m mscompile.models train mlp --data MNIST_FOLDER -o FOLDER
    python tests/benchmarks/published.py FOLDER/mlp.onnx
    python tests/benchmarks/published.py MNIST_FOLDER --seeds 3

One site of 512 units is cut and nothing else; 2000 training images calibrate, and IIA is measured by interchanges on the
10 000 test images, 5000 disjoint pairs a pass. The published network has the same shape and was trained elsewhere. Given a
folder of MNIST instead of a model, networks are trained here by plain Adam, whose variances are spread as the published
network's seem to be (`trainings.CUT`); figures are then means over the trainings, ± half their range.

Columns (selection, replacement): VBP (variance, constant); random (random, constant; mean over several sets); affine of
r = 8 retained parents (logit-mse score); affine of all retained units, fitted for interchange with p = 0.1 (logit-mse
score); the same with joint selection, the compiler's default, fitted for p = 0.1 and for p = 0.5. Beside the last three
nothing is published.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from candidates import (
    accuracy_of_interchange,
    beside,
    candidate_of,
    orders_of,
    samples_of,
    scores_of,
    statistics_of,
    table,
)
from trainings import CALIBRATION, CUT, pixels, train_plainly

from mscompile.intake.samples import Source
from mscompile.network.dense import open_dense

SOURCE = "A. Asiaee, Certified Interventional Fidelity, UAI 2026"
PUBLISHED: dict[tuple[str, int, float], float] = {
    (method, keep, swap): value
    for method, by_keep in {
        "VBP": {
            384: (0.997, 0.897),
            256: (0.990, 0.682),
            128: (0.917, 0.493),
            64: (0.633, 0.358),
            32: (0.494, 0.285),
        },
        "random": {
            384: (0.988, 0.703),
            256: (0.954, 0.526),
            128: (0.749, 0.400),
            64: (0.497, 0.279),
            32: (0.196, 0.132),
        },
        "affine, r = 8": {
            384: (0.989, 0.695),
            256: (0.984, 0.558),
            128: (0.956, 0.484),
            64: (0.929, 0.462),
            32: (0.824, 0.409),
        },
    }.items()
    for keep, values in by_keep.items()
    for swap, value in zip((0.1, 0.5), values, strict=True)
}
"""IIA by method, units kept of 512 and swap probability. The published affine map is weighted by the curvature of the label
cross-entropy; here it is least squares."""


@dataclass(frozen=True)
class Method:
    """A column: how units are selected, and what replaces the others."""

    objective: str
    replacement: str
    joint: bool = False
    swap: float = 0.1


METHODS = {
    "VBP": Method("variance", "constant"),
    "random": Method("random", "constant"),
    "affine, r = 8": Method("logit-mse", "affine-parents"),
    "affine, all": Method("logit-mse", "affine"),
    "affine, all, joint": Method("logit-mse", "affine", joint=True),
    "affine, all, joint, fit for 0.5": Method("logit-mse", "affine", joint=True, swap=0.5),
}
SWAPS = (0.1, 0.5)


def measured(
    model: Path, calib: Source, test: Source, site: str, keeps: tuple[int, ...], passes: int, random_sets: int
) -> dict[str, np.ndarray]:
    """[keeps, IIA at each swap and test accuracy] by method; the dense accuracy under `dense`."""
    dense = open_dense(model)
    samples = samples_of(dense, test)
    statistics = statistics_of(dense, samples_of(dense, calib))
    found: dict[str, np.ndarray] = {}
    for name, method in METHODS.items():
        runs = []
        for seed in range(random_sets if method.objective == "random" else 1):
            scores = scores_of(dense, statistics, method.objective, seed=seed)
            orders = orders_of(dense, statistics, scores, joint=method.joint, swap=method.swap)
            run = []
            for keep in keeps:
                candidate = candidate_of(
                    dense, statistics, scores, orders, {site: keep}, method.replacement, swap=method.swap
                )
                interchange = candidate.interchange(samples)
                plain = interchange.plain(samples)
                iias = [accuracy_of_interchange(interchange, samples, swap=swap, passes=passes) for swap in SWAPS]
                run.append([*iias, plain["accuracy_compiled"]])
                found["dense"] = np.full((len(keeps), 1), plain["accuracy_dense"])
            runs.append(run)
        found[name] = np.mean(runs, axis=0)
    return found


def cell(values: np.ndarray, reference: float | None) -> str:
    """Mean over trainings, half their range, and the published figure."""
    spread = f" ± {np.ptp(values) / 2:.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}" + ("" if reference is None else f" ({reference:.3f})")


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("source", metavar="MODEL|MNIST_FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--site", default="relu_1", show_default=True, help="Site to cut, as `mscompile inspect` prints it.")
@click.option("--keep", "keeps", multiple=True, type=int, default=(384, 256, 128, 64, 32, 16), show_default=True)
@click.option("--passes", default=2, show_default=True, help="Pairings of the test set.")
@click.option("--random-sets", default=5, show_default=True, help="Random sets behind the mean of their column.")
@click.option("--seeds", default=3, show_default=True, help="Networks to train, where a folder is given.")
def main(source: Path, site: str, keeps: tuple[int, ...], passes: int, random_sets: int, seeds: int) -> None:
    """Print the table."""
    how = site, keeps, passes, random_sets
    if source.is_file():
        runs = [measured(source, beside(source, "calib"), beside(source, "test"), *how)]
    else:
        train, test = pixels(source)
        calib = {name: array[:CALIBRATION] for name, array in train.items()}
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(seeds):
                model = Path(folder) / f"{seed}.onnx"
                train_plainly(train, seed, model, CUT)
                runs.append(measured(model, calib, test, *how))
    rows: list[list[object]] = []
    for row, keep in enumerate(keeps):
        for column, what in enumerate([*(f"IIA, p = {swap:g}" for swap in SWAPS), "test accuracy"]):
            published = [PUBLISHED.get((name, keep, SWAPS[column])) if column < len(SWAPS) else None for name in METHODS]
            cells = [np.array([run[name][row, column] for run in runs]) for name in METHODS]
            rows.append([keep, what, *map(cell, cells, published)])
    whole = cell(np.array([run["dense"][0, 0] for run in runs]), None)
    rows.append(["all", "test accuracy", *[whole] * len(METHODS)])
    print(table([f"units kept at `{site}`", f"measured (in brackets: {SOURCE})", *METHODS], rows))


if __name__ == "__main__":
    main()
