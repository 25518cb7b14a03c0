"""Command line of the reference models: ``python -m mscompile.models train NAME -o FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from mscompile.errors import MscompileError, UsageError
from mscompile.models import NAMES


def _fail(error: MscompileError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


@click.group()
def main() -> None:
    """Train the reference models and export them to ONNX."""


@main.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the four MNIST idx files, gzipped or not; needed by mlp, cnn, resnet and vit.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Output folder.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every random choice.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training set; each model has its own.")
def train(name: str, folder: Path | None, output: Path, seed: int, epochs: int | None) -> None:
    """Train the model NAME; write its ONNX file, calibration and test data and card."""
    try:
        from mscompile.models import training

        for report in training.train(name, folder, output, seed=seed, epochs=epochs):
            print(report)
    except ImportError as error:
        missing = "training needs a package that is not installed"
        _fail(UsageError(missing, where=f"train {name}", why=str(error), hint="pip install 'mscompile[torch]'"))
    except MscompileError as error:
        _fail(error)


if __name__ == "__main__":
    main(prog_name="python -m mscompile.models")
