"""What can be cut of the same networks as different exporters write them.

    python tests/benchmarks/exports.py [--only NAME]...

Untrained networks in torch are exported by TorchScript (opsets 11 to 17) and by ``dynamo`` (18 to 23), with a free batch
dimension, and inspected. One line each: sites that can be cut, of all, and the share of the weight elements on them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from candidates import table
from torch import Tensor, nn

from mscompile.models.architectures import ARCHITECTURES
from mscompile.network.dense import open_dense
from mscompile.network.inspection import inspect_scm

OPSETS = ((False, 11), (False, 13), (False, 17), (True, 18), (True, 20), (True, 23))
"""Whether by dynamo, and the opset."""


class Encoder(nn.Module):
    """Two of torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class Packed(nn.Module):
    """Self-attention with one projection for queries, keys and values, by torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.packed, self.out, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.packed(self.norm(x)).reshape(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head((x + self.out(seen.transpose(1, 2).reshape(batch, length, width))).mean(1))


class Grouped(nn.Module):
    """Grouped-query attention: two heads of keys and values for four of queries; then a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.out, self.gate, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        (batch, length, width), seen = x.shape, self.norm(x)
        query = self.query(seen).view(batch, length, 4, 8).transpose(1, 2)
        key, value = (
            layer(seen).view(batch, length, 2, 8).transpose(1, 2)[:, :, None].expand(batch, 2, 2, length, 8)
            for layer in (self.key, self.value)
        )
        key, value = (part.reshape(batch, 4, length, 8) for part in (key, value))
        weights = (query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, length, width))
        return self.head((x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))).mean(1))


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ARCHITECTURES["resnet"].build, (2, 1, 28, 28)),
    "vit": (ARCHITECTURES["vit"].build, (2, 1, 28, 28)),
    "nn.TransformerEncoder": (Encoder, (2, 10, 32)),
    "packed projection": (Packed, (2, 10, 32)),
    "grouped-query, gated": (Grouped, (2, 10, 32)),
}


def exported(model: nn.Module, x: Tensor, file: Path, *, dynamo: bool, opset: int) -> None:
    """Write a network with a free batch dimension."""
    names = {"input_names": ["x"], "output_names": ["y"]}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if dynamo:
            free = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                model, (x,), str(file), opset_version=opset, dynamo=True, external_data=False, dynamic_shapes=free, **names
            )
        else:
            torch.onnx.export(
                model, (x,), str(file), opset_version=opset, dynamo=False, dynamic_axes={"x": {0: "batch"}}, **names
            )


def cell(name: str, folder: Path, *, dynamo: bool, opset: int) -> str:
    """What can be cut of one export."""
    build, shape = NETWORKS[name]
    file = folder / f"{name}.{opset}.onnx"
    try:
        exported(build().eval(), torch.randn(*shape), file, dynamo=dynamo, opset=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        return type(error).__name__
    inspection = inspect_scm(open_dense(file).scm)
    found = list(inspection.left_alone.values())
    return f"{sum(reason is None for reason in found)}/{len(found)}, {inspection.reachable:.3f}"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--only", multiple=True, type=click.Choice([*NETWORKS]), help="Networks; all by default.")
def main(only: tuple[str, ...]) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    head = ["network", *(f"{'dynamo' if dynamo else 'TorchScript'} {opset}" for dynamo, opset in OPSETS)]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            [name, *(cell(name, Path(folder), dynamo=dynamo, opset=opset) for dynamo, opset in OPSETS)]
            for name in (only or NETWORKS)
        ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
