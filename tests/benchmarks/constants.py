"""Constants alone: units chosen and constants set by curvature (logit-mse), against variance-based pruning.

    python -m mscompile.models train resnet --data MNIST_FOLDER -o FOLDER
    python tests/benchmarks/constants.py FOLDER/resnet.onnx --site relu_1 --site relu_3 --site relu_5

Units of the named sites are replaced by constants and folded; nothing is fitted, retrained or re-calibrated. Variance-based
pruning takes the means, least variance first. 2000 images beside the model calibrate; test accuracy is that of 10 000.
"""

from __future__ import annotations

from pathlib import Path

import click
from candidates import beside, candidate_of, orders_of, samples_of, scores_of, statistics_of, table

from mscompile.network.dense import open_dense

OBJECTIVES = ("logit-mse", "variance")


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--site", "sites", multiple=True, help="Sites to cut, as `mscompile inspect` prints them. [default: all]")
@click.option("--keep", "keeps", multiple=True, type=float, default=(0.9, 0.75, 0.5, 0.25, 0.1), show_default=True)
def main(models: tuple[Path, ...], sites: tuple[str, ...], keeps: tuple[float, ...]) -> None:
    """Print the table."""
    rows = []
    for model in models:
        dense = open_dense(model)
        test = samples_of(dense, beside(model, "test"))
        statistics = statistics_of(dense, samples_of(dense, beside(model, "calib")))
        scores = {objective: scores_of(dense, statistics, objective) for objective in OBJECTIVES}
        orders = {objective: orders_of(dense, statistics, found, joint=False) for objective, found in scores.items()}
        for keep in keeps:
            cells = []
            for objective in OBJECTIVES:
                chosen = dict.fromkeys(sites, keep) or keep
                candidate = candidate_of(dense, statistics, scores[objective], orders[objective], chosen, "constant")
                plain = candidate.interchange(test).plain(test)
                cells.append(f"{plain['accuracy_compiled']:.4f}")
            rows.append([f"{model.stem}, dense {plain['accuracy_dense']:.4f}", f"{keep:g}", *cells])
    print(table(["test accuracy", "kept of each site", *OBJECTIVES], rows))


if __name__ == "__main__":
    main()
