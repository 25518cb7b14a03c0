"""The published table for variance-based pruning and random sets, by `audit` alone.

    python tests/benchmarks/published_audit.py MNIST_FOLDER

The published network (784-512-512-10 on MNIST) is not at hand, and how it was trained matters: with AdamW and a one-cycle
schedule, as the reference model is, VBP at keep 384 and swap 0.5 comes to 0.81 instead of 0.897, on every training tried.
Plain Adam at a constant rate of 1e-3 on normalised pixels for five epochs spreads the units' variances further; this script
trains that way, once per seed, compiles each set into a file, and audits dense against compiled: disjoint pairs of the
10 000 test images, matched values, one site, IIA at swap 0.1 and 0.5.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from candidates import candidate_of, orders_of, samples_of, scores_of, statistics_of, table
from published import PUBLISHED

from mscompile.audit.pipeline import audit
from mscompile.audit.setup import AuditOptions
from mscompile.dense import open_dense
from mscompile.files import save_model
from mscompile.models import mnist
from mscompile.reporting import stamp

RATE, EPOCHS, BATCH = 1e-3, 5, 128
MEAN, STD = 0.1307, 0.3081
SWAPS = (0.1, 0.5)
METHODS = {"VBP": "variance", "random": "random"}


def trained(train: tuple[np.ndarray, np.ndarray], test: np.ndarray, seed: int, target: Path) -> None:
    """Train the network by plain Adam and write its file."""
    torch: Any = importlib.import_module("torch")
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.export import export

    torch.manual_seed(seed)
    net = ARCHITECTURES["mlp"].build()
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    x, y = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    export(net, test[:4], target)


def measured(
    model: Path, calib: dict[str, np.ndarray], test: dict[str, np.ndarray], keeps: tuple[int, ...], sets: int, trials: int
) -> dict[tuple[str, int], np.ndarray]:
    """[swaps] IIA by method and units kept."""
    dense = open_dense(model)
    site = dense.sites[-1].tensor
    statistics = statistics_of(dense, samples_of(dense, calib))
    found = {}
    for method, objective in METHODS.items():
        for keep in keeps:
            runs = []
            for seed in range(sets if objective == "random" else 1):
                scores = scores_of(dense, statistics, objective, seed=seed)
                orders = orders_of(dense, statistics, scores, joint=False)
                candidate = candidate_of(dense, statistics, scores, orders, {site: keep}, "constant")
                small = model.with_name("small.onnx")
                save_model(stamp(candidate.compiled, candidate.plan, dense.sha256), small)
                options = AuditOptions(swaps=SWAPS, table=trials, explain=False)
                laws = {row.swap: row.iia_matched for row in audit(model, small, test, options, calib=calib).laws}
                runs.append([laws[swap] for swap in SWAPS])
            found[method, keep] = np.mean(runs, axis=0)
    return found


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", "keeps", multiple=True, type=int, default=(384, 256, 128, 64, 32), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Trainings.")
@click.option("--random-sets", default=3, show_default=True, help="Random sets behind each mean.")
@click.option("--trials", default=5000, show_default=True, help="Interchanges behind each number.")
def main(data: Path, keeps: tuple[int, ...], seeds: int, random_sets: int, trials: int) -> None:
    """Print the table: mean of the trainings, and their range."""
    (train, labels), (test, _) = mnist.read(data)
    x, held_out = ((part.reshape(-1, 784).astype(np.float32) / 255 - MEAN) / STD for part in (train, test))
    x, held_out = x.astype(np.float32), held_out.astype(np.float32)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            model = Path(folder) / "dense.onnx"
            trained((x, labels.astype(np.int64)), held_out, seed, model)
            runs.append(measured(model, {"x": x[:2000]}, {"x": held_out}, keeps, random_sets, trials))
    rows = []
    for keep in keeps:
        for number, swap in enumerate(SWAPS):
            cells = []
            for method in METHODS:
                values = [run[method, keep][number] for run in runs]
                cells.append(
                    f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}] ({PUBLISHED[method, keep, swap]:.3f})"
                )
            rows.append([keep, swap, *cells])
    print(table(["units kept of 512", "swap", *(f"{method}: mean [range] (published)" for method in METHODS)], rows))


if __name__ == "__main__":
    main()
