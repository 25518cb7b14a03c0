"""How long interchanges take, and that their cost is linear in the trials.

    python tests/benchmarks/interchange_speed.py FOLDER/mlp.onnx FOLDER/resnet.onnx

Half of the units of every site are set in two copies of a reference model, matched values, one site a trial, on the test
set beside it. Trials beyond its 5000 disjoint pairs are further pairings. The least of `--repeat` runs is shown, with the
load of the machine.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import numpy as np
from candidates import beside, samples_of, table

from mscompile.audit.inputs import open_model
from mscompile.network.dense import open_dense
from mscompile.verification.interchange import Correspondence, Engine, Pair, disjoint_pairs
from mscompile.verification.surgery import Patch

COUNTS = (1250, 2500, 5000, 10_000)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--repeat", default=3, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
def main(models: tuple[Path, ...], repeat: int, batch_size: int) -> None:
    """Print the table."""
    rows = []
    for path in models:
        dense, skeleton = open_dense(path), open_model(path).skeleton
        samples = samples_of(dense, beside(path, "test"))
        sites = []
        for site in dense.sites:
            patch, kept = Patch(site.tensor, dense.ranks[site.tensor], site.axis), np.arange(0, site.size, 2)
            sites.append(Correspondence(patch, patch, site.size, site.size, kept, kept))
        engine = Engine(Pair(skeleton, skeleton, tuple(sites)), samples, batch_size=batch_size)
        pairings = [disjoint_pairs(len(samples), seed) for seed in range(2)]
        base, source = (np.concatenate([p[i] for p in pairings]) for i in range(2))
        seconds = []
        for count in COUNTS:
            runs = []
            for _ in range(repeat):
                start = time.perf_counter()
                for _ in engine.trials(samples, base[:count], source[:count], law="one-site", swap=0.1, seed=0):
                    pass
                runs.append(time.perf_counter() - start)
            seconds.append(min(runs))
        rows.append([path.stem, len(sites), *(f"{s:.2f}" for s in seconds), f"{COUNTS[-1] / seconds[-1]:,.0f}"])
    print(table(["network", "sites", *(f"{count:,} trials, s" for count in COUNTS), "trials a second"], rows))
    print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
