"""What a network compiled from few samples is worth: constants, affine maps as they are, and with covariances shrunk.

    python tests/benchmarks/few_samples.py MODEL.onnx … [--samples 40 100 …] [--keep 0.5 0.25] [--swap 0.1]

Half of the samples fit, a tenth chooses λ (`mscompile.planning.shrinkage`); nothing is re-calibrated. For each: the share of
test samples where the compiled network answers as the dense one, and its risk there, half the mean squared change of the
outputs. Then, of all fits at that keep, how much of the risk under interchange would be saved by constants for the units
where they do better: as the tenth judges, and as the test samples themselves would, the most that any such choice can give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from candidates import beside, samples_of, table

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import interchange_error

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.statistics import Moments, Statistics
from mscompile.clock import Clock
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, open_dense
from mscompile.options import Options
from mscompile.planning.preparation import eliminate, split, what_to_measure
from mscompile.planning.replacements import Fit, fit_affine
from mscompile.planning.scores import joint_curvature, score
from mscompile.planning.shrinkage import with_shrinkage
from mscompile.runtime import Session, no_progress
from mscompile.search.candidates import Workshop

TEST = 3000
"""Test samples, at most."""
BATCH = 64


def compiled(
    dense: DenseModel, statistics: Statistics, parts: dict[str, Samples], keep: float, options: Options
) -> tuple[Workshop, Session]:
    """The network at one keep ratio."""
    scores = score(dense.scm, dense.sites, statistics, options.objective)
    eliminations = eliminate(dense, statistics, scores, options)
    workshop = Workshop(dense, statistics, scores, eliminations, parts, options, Clock(), no_progress)
    counts = {group: max(1, round(keep * len(found.order))) for group, found in eliminations.items()}
    return workshop, Session(workshop.make(counts, recalibrated=False).compiled.model)


def rows(dense: DenseModel, given: Samples, test: Samples, keeps: list[float], swap: float) -> Iterator[list[str]]:
    """One row per keep ratio."""
    wanted = Session(dense.model).run_all(test.batches(BATCH), [dense.output])[dense.output]
    truth = calibrate(dense.scm, dense.sites, test, batch_size=BATCH, measure=Measure(shared=swap > 0)).moments
    options = Options(swap=swap, recalibrate=False)
    constant = replace(options, replacement="constant")
    parts = split(dense, given, options)
    plain, fixed = (
        calibrate(dense.scm, dense.sites, parts["calibrate"], batch_size=BATCH, measure=what_to_measure(dense, how))
        for how in (options, constant)
    )
    scores = score(dense.scm, dense.sites, plain, options.objective)
    shrunk, shares = with_shrinkage(dense, plain, scores, parts["choose"], replacement="affine", swap=swap, batch_size=BATCH)
    seen = calibrate(dense.scm, dense.sites, parts["choose"], batch_size=BATCH, measure=Measure(shared=swap > 0)).moments
    scarce = min(m.count / len(m.mean) for m in plain.moments.values())
    for keep in keeps:
        cells = [str(len(given)), f"{scarce:.2f}", f"{keep:g}"]
        for statistics, how in ((fixed, constant), (plain, options), (shrunk, options)):
            workshop, session = compiled(dense, statistics, parts, keep, how)
            found = session.run_all(test.batches(BATCH), [dense.output])[dense.output]
            same = float((found.argmax(-1) == wanted.argmax(-1)).mean())
            cells.append(f"{same:.4f} ({0.5 * float(np.square(found - wanted).sum()) / len(test):.2g})")
        eliminations = workshop.eliminations
        judged, best, total = 0.0, 0.0, 0.0
        for site in dense.sites:
            order = eliminations[site.group].order
            stays = np.isin(site.units, order[-max(1, round(keep * len(order))) :])
            kept, replaced = np.flatnonzero(stays), np.flatnonzero(~stays)
            if site.rows is not None or not len(kept) or not len(replaced):
                continue
            moments = shrunk.moments[site.tensor]
            fits = (
                fit_affine(moments, kept, replaced, swap),
                Fit(moments.mean[replaced], np.zeros((len(replaced), len(kept)))),
            )

            def errors(on: Moments, fits: tuple[Fit, Fit] = fits, kept=kept, replaced=replaced):  # type: ignore[no-untyped-def]
                return [np.diagonal(interchange_error(fit, on, kept, replaced, swap)) for fit in fits]

            weight = np.diagonal(joint_curvature(site, plain))[replaced]
            (here, other), (affine, fixed_error) = errors(seen[site.tensor]), errors(truth[site.tensor])
            total += float(weight @ affine)
            judged += float(weight @ np.where(other < here, fixed_error, affine))
            best += float(weight @ np.minimum(affine, fixed_error))
        spread = f"{min(shares.values()):g} to {max(shares.values()):g}" if shares else "–"
        yield [*cells, spread, f"{1 - judged / total:.1%}", f"{1 - best / total:.1%}"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--samples", nargs="+", type=int, default=[40, 100, 200, 400, 1000])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--swap", type=float, default=0.1)
    arguments = parser.parse_args()
    titles = ["model", "samples", "observations per channel", "kept", "constants", "affine", "shrunk", "λ"]
    lines = []
    for path in arguments.models:
        dense = open_dense(path)
        test = samples_of(dense, beside(path, "test"))
        test = test.take(slice(0, min(TEST, len(test))))
        samples = samples_of(dense, beside(path, "calib"))
        for count in arguments.samples:
            found = rows(dense, samples.take(slice(0, count)), test, arguments.keep, arguments.swap)
            lines += [[path.stem, *cells] for cells in found]
    print(table([*titles, "per unit, held out", "at best"], lines))


if __name__ == "__main__":
    main()
