"""Compile somebody else's MNIST classifier and report its accuracy on the test set.

    python tests/benchmarks/compile_zoo.py MODEL.onnx MNIST_FOLDER

MODEL.onnx takes one input of 28 × 28 grey values, (x/255 − mean) / std, in any layout that holds 784 numbers a sample, and
returns ten class scores. 2000 training images calibrate, choose and certify, as `mscompile MODEL.onnx` with each goal would
do; the test set only measures. For `digit_cnn`, the network of the wheel digit-recognizer-py 0.1.0, mean and std are the
defaults.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from candidates import BATCH, samples_of, table

import mscompile
from mscompile.intake.samples import Samples
from mscompile.models import mnist
from mscompile.network.dense import open_dense
from mscompile.runtime import Session


def accuracy(model: ir.Model, output: str, samples: Samples) -> float:
    """Share of right answers."""
    scores = Session(model).run_all(samples.batches(BATCH), [output])[output]
    return float((scores.argmax(axis=-1) == samples.labels).mean())


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", "keeps", multiple=True, type=float, default=(0.75, 0.5, 0.25), show_default=True)
@click.option("--macs", "works", multiple=True, type=float, default=(0.75,), show_default=True)
@click.option("--fidelity", "faith", multiple=True, type=float, default=(0.95,), show_default=True)
@click.option("--replacement", type=click.Choice(["affine", "constant"]), default="affine", show_default=True)
@click.option("--mean", default=0.1307, show_default=True, help="Subtracted from grey values in [0, 1].")
@click.option("--std", default=0.3081, show_default=True, help="Divides them then.")
@click.option("--images", default=2000, show_default=True, help="Training images given to the compiler.")
@click.option("--seed", default=0, show_default=True, help="Draws the images and seeds the compiler.")
def main(
    model: Path,
    data: Path,
    keeps: tuple[float, ...],
    works: tuple[float, ...],
    faith: tuple[float, ...],
    replacement: str,
    mean: float,
    std: float,
    images: int,
    seed: int,
) -> None:
    """Print the table."""
    dense = open_dense(model)
    (spec,) = dense.specs

    def samples(pixels: np.ndarray, labels: np.ndarray) -> Samples:
        scaled = ((pixels.astype(np.float32) / 255 - mean) / std).astype(np.float32)
        return samples_of(dense, {spec.name: scaled.reshape(-1, *spec.shape[1:]), "label": labels.astype(np.int64)})

    (train, train_labels), (test, test_labels) = mnist.read(data)
    drawn = np.random.default_rng(seed).permutation(len(train))[:images]
    given, held_out = samples(train[drawn], train_labels[drawn]), samples(test, test_labels)
    rows = [["dense", "1.000", "1.000", f"{accuracy(dense.model, dense.output, held_out):.4f}", "", "", ""]]
    goals = [{kind: share} for kind, shares in {"keep": keeps, "macs": works, "fidelity": faith}.items() for share in shares]
    for goal in goals:
        options = mscompile.Options(**goal, replacement=replacement, seed=seed)
        result = mscompile.compile_model(model, given, None, options)
        sizes, fidelity = result.report.sizes, result.report.fidelity
        rows.append(
            [
                *(f"{kind} {share:g}" for kind, share in goal.items()),
                f"{sizes.compiled.params / sizes.dense.params:.3f}",
                f"{sizes.compiled.macs / sizes.dense.macs:.3f}",
                f"{accuracy(result.model, dense.output, held_out):.4f}",
                f"{fidelity.iia:.4f}",
                f"{fidelity.iia_lower:.4f}",
                f"{result.report.fold_error:.1e}",
            ]
        )
    head = [
        f"`{model.stem}`, {replacement}",
        "parameters",
        "MACs",
        "test accuracy",
        "IIA",
        "certified at least",
        "fold error",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
