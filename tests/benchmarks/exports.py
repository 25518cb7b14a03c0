"""What can be cut of the same networks as different exporters write them.

    python tests/benchmarks/exports.py [--only NAME]... [--optimise] [--compile]

The untrained networks of ``networks.py`` are exported by TorchScript (opsets 11 to 17) and by ``dynamo`` (18 to 23), with a
free batch dimension, and inspected. One line each: sites that can be cut, of all, and the share of the weight elements on
them; with ``--compile`` also parameters left and fold error where half of every site is kept. ``--optimise`` has
onnxruntime's own optimiser for transformers rewrite each file first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import click
import numpy as np
import torch
from candidates import table
from networks import NETWORKS
from torch import Tensor, nn

import mscompile
from mscompile.network.dense import open_dense
from mscompile.network.inspection import inspect_scm

OPSETS = ((False, 11), (False, 13), (False, 17), (True, 18), (True, 20), (True, 23))
"""Whether by dynamo, and the opset."""
HEADS, WIDTH = 4, 32
"""Of the transformers among the networks, but the reference ones."""


def exported(model: nn.Module, inputs: tuple[Tensor, ...], file: Path, *, dynamo: bool, opset: int) -> None:
    """Write a network with a free batch dimension."""
    names = [f"x{i}" for i in range(len(inputs))]
    how = {"input_names": names, "output_names": ["y"], "opset_version": opset}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if dynamo:
            free = tuple({0: torch.export.Dim("batch")} for _ in inputs)
            torch.onnx.export(model, inputs, str(file), dynamo=True, external_data=False, dynamic_shapes=free, **how)
        else:
            free = {name: {0: "batch"} for name in (*names, "y")}
            torch.onnx.export(model, inputs, str(file), dynamo=False, dynamic_axes=free, **how)


def optimised(file: Path, heads: int, width: int) -> Path:
    """The file as onnxruntime's optimiser for transformers rewrites it, in a process of its own: it imports bare names."""
    found = file.with_suffix(".optimised.onnx")
    given = ["--input", str(file), "--output", str(found), "--model_type", "bert"]
    given += ["--num_heads", str(heads), "--hidden_size", str(width)]
    command = [sys.executable, "-m", "onnxruntime.transformers.optimizer", *given]
    subprocess.run(command, check=True, capture_output=True, cwd=file.parent)
    return found


def made_up(inputs: tuple[Tensor, ...], samples: int = 200) -> dict[str, np.ndarray]:
    """As many samples like these: normal numbers, or whole ones up to the largest there is."""
    rng = np.random.default_rng(0)
    return {
        f"x{i}": rng.standard_normal((samples, *x.shape[1:])).astype(np.float32)
        if x.is_floating_point()
        else rng.integers(0, int(x.max()) + 1, (samples, *x.shape[1:]))
        for i, x in enumerate(inputs)
    }


def cell(name: str, folder: Path, *, dynamo: bool, opset: int, optimise: bool, whole: bool) -> str:
    """What can be cut of one export."""
    build, make = NETWORKS[name]
    file, inputs = folder / f"{name}.{opset}.onnx", make()
    torch.manual_seed(0)
    try:
        exported(build().eval(), inputs, file, dynamo=dynamo, opset=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        return type(error).__name__
    if optimise:
        file = optimised(file, HEADS, WIDTH)
    inspection = inspect_scm(open_dense(file).scm)
    found = list(inspection.left_alone.values())
    said = f"{sum(reason is None for reason in found)}/{len(found)}, {inspection.reachable:.3f}"
    if not whole:
        return said
    options = mscompile.Options(keep=0.5, probes=1, recalibrate=False)
    report = mscompile.compile_model(file, made_up(inputs), None, options).report
    return f"{said}, {report.sizes.compiled.params / report.sizes.dense.params:.3f}, {report.fold_error:.0e}"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--only", multiple=True, type=click.Choice([*NETWORKS]), help="Networks; all by default.")
@click.option("--optimise", is_flag=True, help="Have onnxruntime's optimiser rewrite each file first.")
@click.option("--compile", "whole", is_flag=True, help="Compile each, half of every site kept.")
def main(only: tuple[str, ...], optimise: bool, whole: bool) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    head = ["network", *(f"{'dynamo' if dynamo else 'TorchScript'} {opset}" for dynamo, opset in OPSETS)]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            [
                name,
                *(cell(name, Path(folder), dynamo=d, opset=opset, optimise=optimise, whole=whole) for d, opset in OPSETS),
            ]
            for name in (only or NETWORKS)
        ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
