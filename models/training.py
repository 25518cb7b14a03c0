"""Train a reference model and write its ONNX file, its data and its card."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mscompile.models.architectures import ARCHITECTURES, Architecture
from mscompile.models.data import Data, Pair
from mscompile.models.export import export, fold, input_name, run

CARD = """\
# {stem}

A reference model of mscompile, {about}.

- architecture: {architecture}
- operators: {operators}
- input: {inputs}; output: {outputs}
- trained parameters: {parameters}
- data: {data}
- data licence: {data_licence}
- training: {epochs} epochs of AdamW with a one-cycle schedule, batch {batch}, highest rate {rate:g}, seed {seed}
- test accuracy: {accuracy:.6f} ({right} of {total} {unit})
- test cross entropy: {loss:.6f}
- file: `{stem}.onnx`, {size} bytes
- sha256: `{sha256}`
- licence of the weights: Apache-2.0

`{stem}.calib.npz` holds {calib}.
{test}

To remake it:

    python -m mscompile.models train {name} {data_option}-o FOLDER --seed {seed} --epochs {epochs}

The numbers above were measured on the file itself with ONNX Runtime {ort}; it was made with torch {torch} and
Python {python}. Other versions or processors may round differently and give a file with another sha256.
"""


@dataclass(frozen=True)
class Report:
    """What was written and how well it does on the test set."""

    file: Path
    right: int
    total: int
    loss: float
    size: int
    sha256: str

    @property
    def accuracy(self) -> float:
        """Share of right answers on the test set."""
        return self.right / self.total

    def __str__(self) -> str:
        return (
            f"{self.file}: test accuracy {self.accuracy:.4f}, loss {self.loss:.4f}, {self.size} bytes, sha256 {self.sha256}"
        )


def fit(model: nn.Module, how: Architecture, pair: Pair, *, seed: int, epochs: int) -> None:
    """Train with AdamW under a one-cycle schedule, the same way for every model."""
    x, y = map(torch.from_numpy, pair)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.rate, epochs=epochs, steps_per_epoch=-(-len(x) // how.batch)
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=order).split(how.batch):
            loss = cross_entropy(model(how.augment(x[rows])).flatten(0, -2), y[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1} of {epochs}: loss {total / len(x):.4f}", file=sys.stderr)


def measure(file: Path, pair: Pair) -> Report:
    """Run the file on the test set."""
    logits = run(file, pair[0]).astype(np.float64)
    logits, labels = logits.reshape(-1, logits.shape[-1]), pair[1].reshape(-1)
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    raw = file.read_bytes()
    right = int((logits.argmax(1) == labels).sum())
    return Report(file, right, len(labels), float(losses.mean()), len(raw), hashlib.sha256(raw).hexdigest())


def signature(values: Iterable[onnx.ValueInfoProto]) -> str:
    """Describe inputs or outputs: name, element type, shape."""
    return ", ".join(
        f"`{v.name}` {onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)} "
        f"[{', '.join(d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim)}]"
        for v in values
    )


def card(name: str, data: Data, report: Report, *, about: str, parameters: int, seed: int, epochs: int) -> str:
    """Write the card of an exported file."""
    how, stem, graph = ARCHITECTURES[name], report.file.stem, onnx.load(report.file).graph
    operators = Counter(node.op_type for node in graph.node)
    if data.calib is data.test:
        calib = (
            f"all {len(data.test[1])} held-out examples with their labels, so that what is calibrated and certified "
            "on it\nrests on data the network never learned from"
        )
        test = f"There is no `{stem}.test.npz`: it would hold the same examples."
    else:
        calib = f"{len(data.calib[1])} training examples drawn with the seed, with their labels"
        test = f"`{stem}.test.npz` holds the test set."
    return CARD.format(
        stem=stem,
        about=about,
        architecture=how.about,
        operators=", ".join(f"{kind} {count}" for kind, count in sorted(operators.items())),
        inputs=signature(graph.input),
        outputs=signature(graph.output),
        parameters=parameters,
        data=data.about,
        data_licence=data.licence,
        epochs=epochs,
        batch=how.batch,
        rate=how.rate,
        seed=seed,
        accuracy=report.accuracy,
        right=report.right,
        total=report.total,
        unit=data.unit,
        loss=report.loss,
        size=report.size,
        sha256=report.sha256,
        calib=calib,
        test=test,
        name=name,
        data_option="--data MNIST_FOLDER " if data.from_folder else "",
        ort=onnxruntime.__version__,
        torch=str(torch.__version__),
        python=sys.version.split()[0],
    )


def train(name: str, folder: Path | None, output: Path, *, seed: int = 0, epochs: int | None = None) -> list[Report]:
    """Train a reference model and write everything that belongs to it.

    Parameters
    ----------
    name
        One of `mscompile.models.NAMES`.
    folder
        The MNIST idx files, for the models that learn from them.
    output
        Folder to write to; made when missing.
    seed
        Seed of the weights, the order of the examples and the draw of the calibration data.
    epochs
        Passes over the training set, when not those of the architecture.

    Returns
    -------
    list of Report
        One for every ONNX file.
    """
    how = ARCHITECTURES[name]
    data = how.load(folder, seed)
    epochs = epochs or how.epochs
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the sum of many threads depends on their number
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = how.build()
    fit(model, how, data.train, seed=seed, epochs=epochs)

    files = {name: (model, "trained from scratch")}
    if how.fold:
        files[name] = (model, f"with batch normalisation kept as nodes (folded in `{name}_folded.onnx`)")
        files[f"{name}_folded"] = (
            fold(model),
            f"the network of `{name}.onnx` with batch normalisation folded into the convolutions",
        )
    parameters = sum(weight.numel() for weight in model.parameters())
    reports = []
    for stem, (network, about) in files.items():
        export(network, data.test[0][:16], output / f"{stem}.onnx")
        for part, pair in (("calib", data.calib), ("test", data.test)):
            if part == "calib" or pair is not data.calib:
                arrays: dict[str, Any] = {input_name(network): pair[0], "label": pair[1]}
                np.savez_compressed(output / f"{stem}.{part}.npz", **arrays)
        report = measure(output / f"{stem}.onnx", data.test)
        text = card(name, data, report, about=about, parameters=parameters, seed=seed, epochs=epochs)
        (output / f"{stem}.md").write_text(text, encoding="utf-8")
        reports.append(report)
    return reports
