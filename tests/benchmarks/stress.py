"""Two stresses of the method as one page: rescaled units, and strong swaps.

    python tests/benchmarks/stress.py FOLDER/mlp.onnx -o stress.html

Rescaling: every unit of a ReLU site is multiplied by α, log-uniform in [1/s, s], and its outgoing weights are divided by
it: the same function. Drawn is the Jaccard overlap of the set selected then with the set selected before, by s; an objective
that depends on the units' scale falls. Strong swaps: IIA over disjoint pairs of the test set by swap probability up to 1,
for several ways to choose units and to stand in for them.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from candidates import accuracy_of_interchange, beside, candidate_of, orders_of, samples_of, scores_of, statistics_of, table
from published import METHODS
from rescaling import rescaled, selected

from mscompile.network.dense import open_dense
from mscompile.pages import Figure, figures_html
from mscompile.pages.drawing import Series, lines

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
SWAPS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
RESCALED = (
    "Every unit of the site is multiplied by its own factor, log-uniform between 1/s and s, and its outgoing weights are "
    "divided by it: the same function. Drawn is the overlap (Jaccard) of the units chosen then with those chosen before, 1 "
    "where the scale of a unit does not matter. The three objectives with curvature lie on one line, at 1. Two random sets "
    "overlap by chance alone."
)
SWAPPED = (
    "How often both networks give the same answer, by the probability with which each retained unit is swapped, up to the "
    "strong swap of all. Replaced units keep their base values in the large network and follow the swapped ones in the "
    "small one: the more is swapped, the less any fit can do."
)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("stress.html"), show_default=True)
@click.option("--site", default="relu_1", show_default=True, help="Site to rescale and to cut.")
@click.option("--keep", default=128, show_default=True, help="Units kept.")
@click.option("--seeds", default=2, show_default=True, help="Rescalings by scale, and pairings of the test set.")
def main(model: Path, output: Path, site: str, keep: int, seeds: int) -> None:
    """Print both tables and write the page."""
    dense = open_dense(model)
    calib, test = (samples_of(dense, beside(model, part)) for part in ("calib", "test"))
    before = selected(dense, calib, site, keep, seed=0)
    overlap: dict[str, list[float]] = {name: [] for name in before}
    for scale in SCALES:
        found: dict[str, list[float]] = {name: [] for name in before}
        for seed in range(1, seeds + 1):
            alpha = scale ** np.random.default_rng(seed).uniform(-1.0, 1.0, dense.scm.site(site).size)
            for name, kept in selected(rescaled(model, site, alpha), calib, site, keep, seed=seed).items():
                found[name].append(len(kept & before[name]) / len(kept | before[name]))
        for name, values in found.items():
            overlap[name].append(float(np.mean(values)))
    statistics, iia = statistics_of(dense, calib), {}
    for name, method in METHODS.items():
        scores = scores_of(dense, statistics, method.objective)
        orders = orders_of(dense, statistics, scores, joint=method.joint, swap=method.swap)
        candidate = candidate_of(dense, statistics, scores, orders, {site: keep}, method.replacement, swap=method.swap)
        engine = candidate.interchange(test)
        iia[name] = [accuracy_of_interchange(engine, test, swap=swap, passes=seeds) for swap in SWAPS]
    figures = [
        Figure(
            "Rescaled units",
            lines(
                [Series(name, SCALES, values) for name, values in overlap.items()],
                title="Overlap of the selected sets after rescaling",
                description="By the largest scale s; 1 means that the scale of units does not matter.",
                x="largest scale s",
                y="Jaccard overlap",
                log_x=True,
            ),
            RESCALED,
            ["chosen by", *(f"s = {s:g}" for s in SCALES)],
            [[n, *(f"{v:.3f}" for v in o)] for n, o in overlap.items()],
        ),
        Figure(
            "Strong swaps",
            lines(
                [Series(name, SWAPS, values) for name, values in iia.items()],
                title="IIA by swap probability",
                description="Strong swaps: up to every retained unit.",
                x="swap probability",
                y="IIA",
            ),
            SWAPPED,
            ["chosen and replaced by", *(f"p = {p:g}" for p in SWAPS)],
            [[n, *(f"{v:.4f}" for v in o)] for n, o in iia.items()],
        ),
    ]
    for figure in figures:
        print(f"{table(figure.head, figure.rows)}\n")
    text = f"{keep} units kept of {dense.scm.site(site).size} at {site}, calibrated on {len(calib)} samples."
    output.write_text(figures_html(f"Stress of {model.stem}", text, figures), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
