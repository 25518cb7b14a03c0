"""The published table for variance-based pruning and random sets, by the trials of `audit` alone.

    python tests/benchmarks/published_audit.py MNIST_FOLDER

The published network (784-512-512-10 on MNIST) is not at hand, and how it was trained matters: with AdamW and a one-cycle
schedule, as the reference model is, VBP at keep 384 and swap 0.5 comes to 0.81 instead of 0.897, on every training tried.
Plain Adam at a constant rate of 1e-3 on normalised pixels for five epochs spreads the units' variances further; this script
trains that way, once per seed, compiles each set into a file, opens dense and compiled file as `audit` does, self-checks and
all, and runs its trials: disjoint pairs of the 10 000 test images, matched values, one site, IIA at swap 0.1 and 0.5.

z is the published figure less the mean over trainings, in standard errors of that difference. Both are draws: the published
one of one training (for random sets also of one set), ours of `--seeds` of them, with the error of their own trials in their
spread; so its square is s² (1 + 1/k) + p (1 − p) / 10 000, s the standard deviation of our k draws (every random set of
every training is one) and the last term the published trials'. With k = 3 it has two degrees of freedom: 95 % of such
numbers lie within 4.3, not 2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
from candidates import candidate_of, orders_of, samples_of, scores_of, statistics_of, table
from published import PUBLISHED
from trainings import CALIBRATION, pixels, train_plainly

from mscompile.audit.claims import stream
from mscompile.audit.inputs import open_model
from mscompile.audit.setup import AuditOptions, prepare
from mscompile.files import save_model
from mscompile.network.dense import open_dense
from mscompile.reporting import stamp

SWAPS = (0.1, 0.5)
METHODS = {"VBP": "variance", "random": "random"}


def measured(
    model: Path, calib: dict[str, np.ndarray], test: dict[str, np.ndarray], keeps: tuple[int, ...], sets: int, trials: int
) -> dict[tuple[str, int], np.ndarray]:
    """[sets, swaps] IIA by method and units kept."""
    dense = open_dense(model)
    site = dense.sites[-1].tensor
    statistics = statistics_of(dense, samples_of(dense, calib))
    options = AuditOptions()
    audited, samples = open_model(model), samples_of(dense, test)
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
                setup = prepare(audited, open_model(small), samples, options)
                (measure,) = setup.measures
                rates = []
                for swap in SWAPS:
                    batches = stream(setup, options, "one-site", swap, trials)
                    rates.append(1.0 - np.concatenate([measure.loss(t.dense, t.matched) for t in batches]).mean())
                runs.append(rates)
            found[method, keep] = np.array(runs)
    return found


def compared(draws: np.ndarray, published: float) -> str:
    """Mean ± standard deviation of the draws, the published figure and z."""
    error = np.sqrt(draws.var(ddof=1) * (1 + 1 / len(draws)) + published * (1 - published) / 10_000)
    return f"{draws.mean():.3f} ± {draws.std(ddof=1):.3f} ({published:.3f}, z {(published - draws.mean()) / error:+.1f})"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", "keeps", multiple=True, type=int, default=(384, 256, 128, 64, 32), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Trainings.")
@click.option("--random-sets", default=3, show_default=True, help="Random sets of every training.")
@click.option("--trials", default=5000, show_default=True, help="Interchanges behind each number.")
def main(data: Path, keeps: tuple[int, ...], seeds: int, random_sets: int, trials: int) -> None:
    """Print the table."""
    train, test = pixels(data)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            model = Path(folder) / "dense.onnx"
            train_plainly(train, seed, model)
            runs.append(measured(model, {"x": train["x"][:CALIBRATION]}, {"x": test["x"]}, keeps, random_sets, trials))
    rows = []
    for keep in keeps:
        for number, swap in enumerate(SWAPS):
            draws = {m: np.array([run[m, keep][:, number] for run in runs]) for m in METHODS}
            rows.append([keep, swap, *(compared(draws[m].ravel(), PUBLISHED[m, keep, swap]) for m in METHODS)])
    print(table(["units kept of 512", "swap", *(f"{method}: mean ± sd (published, z)" for method in METHODS)], rows))


if __name__ == "__main__":
    main()
