"""Which objectives survive a rescaling of units that leaves the function as it is.

    python tests/benchmarks/rescaling.py FOLDER/mlp.onnx

Every unit of one ReLU site is multiplied by α > 0, log-uniform in [0.1, 10], and its outgoing weights are divided by α: the
same function in other units. The table gives the Jaccard overlap |A ∩ B| / |A ∪ B| of the set that is selected then with
the set that is selected in the model as trained. Random sets are drawn anew each time, so that their row shows chance.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from candidates import BATCH, beside, orders_of, samples_of, scores_of, statistics_of, table

from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, open_dense
from mscompile.runtime import Session

SELECTIONS = {
    "logit-mse": ("logit-mse", False),
    "logit-mse, joint": ("logit-mse", True),
    "cwvar": ("cwvar", False),
    "variance": ("variance", False),
    "magnitude": ("magnitude", False),
    "random": ("random", False),
}
"""Objective, and whether units are selected jointly for affine maps."""
INVARIANT = ("logit-mse", "cwvar")
SAME = 1e-4
"""Largest change of the outputs, in standard deviations, that float32 rounding explains."""


def rescaled(path: Path, tensor: str, alpha: np.ndarray) -> DenseModel:
    """The model with channel j of a site multiplied by ``alpha[j]`` and undone by its readers.

    It is the same function only where everything between the units' weights and the site is positively homogeneous, such
    as ReLU and max-pooling.
    """
    dense = open_dense(path)
    site = dense.scm.site(tensor)
    by_unit = dict(zip(site.units.tolist(), alpha.tolist(), strict=True))
    for creator in dense.scm.creators_of(site.units):
        for slot in creator.slots:
            scale_axis(slot.node.inputs[slot.operand], slot.axis, np.array([by_unit[u] for u in slot.units.tolist()]))
    for reader in site.readers:
        scale_axis(reader.weight, reader.axis, 1.0 / alpha[reader.index])
    return open_dense(dense.model)


def scale_axis(value: ir.Value, axis: int, factor: np.ndarray) -> None:
    """Multiply a weight along one axis."""
    array = value.const_value.numpy()
    shape = [-1 if a == axis else 1 for a in range(array.ndim)]
    value.const_value = ir.tensor((array * factor.reshape(shape)).astype(array.dtype), name=value.name)


def selected(dense: DenseModel, samples: Samples, tensor: str, keep: int, *, seed: int) -> dict[str, set[int]]:
    """Units retained at the site, by way of selecting them."""
    statistics = statistics_of(dense, samples)
    group = dense.scm.site(tensor).group
    kept = {}
    for name, (objective, joint) in SELECTIONS.items():
        scores = scores_of(dense, statistics, objective, seed=seed)
        kept[name] = set(orders_of(dense, statistics, scores, joint=joint)[group][-keep:].tolist())
    return kept


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--site", default="relu_1", show_default=True, help="Site to rescale, as `mscompile inspect` prints it.")
@click.option("--keep", default=256, show_default=True, help="Units kept.")
@click.option("--seeds", default=10, show_default=True, help="Rescalings.")
def main(model: Path, site: str, keep: int, seeds: int) -> None:
    """Print the table; fail where an invariant objective does not select the same units every time."""
    dense = open_dense(model)
    samples = samples_of(dense, beside(model, "calib"))
    wanted = outputs(dense, samples)
    before = selected(dense, samples, site, keep, seed=0)
    overlaps: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    for seed in range(1, seeds + 1):
        rng = np.random.default_rng(seed)
        other = rescaled(model, site, 10.0 ** rng.uniform(-1.0, 1.0, dense.scm.site(site).size))
        gap = float(np.abs(outputs(other, samples) - wanted).max() / wanted.std())
        if not gap <= SAME:
            raise click.ClickException(f"rescaling {site!r} changes the function by {gap:.3g} standard deviations")
        for name, kept in selected(other, samples, site, keep, seed=seed).items():
            overlaps[name].append(len(kept & before[name]) / len(kept | before[name]))
    rows = [[name, f"{np.mean(found):.3f}", f"{np.min(found):.3f}"] for name, found in overlaps.items()]
    print(table([f"selection, {keep} units kept at `{site}`", f"mean Jaccard of {seeds} rescalings", "least"], rows))
    for name in INVARIANT:
        if min(overlaps[name]) < 1.0:
            raise click.ClickException(f"{name} selects other units after rescaling")


def outputs(dense: DenseModel, samples: Samples) -> np.ndarray:
    """First output on all samples."""
    return Session(dense.model, optimise=False).run_all(samples.batches(BATCH))[dense.output]


if __name__ == "__main__":
    main()
