"""Before anything is chosen: how data is split, what is measured, which sites can be fitted, and in which order units go."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mscompile.calibration.instrument import Measure
from mscompile.calibration.statistics import Statistics
from mscompile.errors import DataError, GoalError
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel
from mscompile.network.scm import Site
from mscompile.options import Options
from mscompile.planning.replacements import CONSTANT, WINDOWED
from mscompile.planning.scores import OBJECTIVES, Scores
from mscompile.planning.selection import Elimination, eliminate_by_score, eliminate_jointly

SHARES = {"calibrate": 0.5, "choose": 0.1, "certify": 0.4}
"""How data is split. Fitting wants the most; certifying wants pairs, two samples each."""


def eliminate(source: DenseModel, statistics: Statistics, scores: Scores, options: Options) -> dict[int, Elimination]:
    """The order in which the units of each group go."""
    return {
        group: eliminate_jointly(sites, statistics, options.swap) if options.joint else eliminate_by_score(sites, scores)
        for group, sites in source.groups.items()
    }


def split(source: DenseModel, samples: Samples, options: Options) -> dict[str, Samples]:
    """Split as `SHARES` says; where the model takes batches of a fixed size, each part is a multiple of two of them."""
    parts = dict(zip(SHARES, samples.split(tuple(SHARES.values()), options.seed), strict=True))
    if source.batch is None:
        return parts
    whole = 2 * source.batch  # pairs of batches: interchange meets each sample with another
    even = {name: part.take(slice(len(part) // whole * whole)) for name, part in parts.items()}
    for name, part in even.items():
        if not len(part):
            needed = math.ceil(whole / SHARES[name])
            raise DataError(
                "there are too few samples",
                where=samples.source,
                why=f"{len(samples)} samples; with batches of exactly {source.batch} it takes about {needed} to {name}",
                hint="give more data, or export the model with a symbolic batch dimension",
            )
    return even


def finite_sites(source: DenseModel, statistics: Statistics) -> tuple[DenseModel, tuple[str, ...]]:
    """Leave sites alone where an activation or a reader's weight is NaN or infinite, and say so."""
    groups: dict[int, list[Site]] = {}
    warnings: list[str] = []
    for group, sites in source.groups.items():
        ill = [site.tensor for site in sites if not _is_finite(site, statistics)]
        if ill:
            warnings.append(
                f"site {ill[0]!r} is left alone: its activations or the weights that read it are NaN or infinite"
            )
        else:
            groups[group] = sites
    if not groups:
        raise GoalError(
            "nothing in this model can be cut",
            where=str(source.path or "model"),
            why="activations on the data, or weights, are NaN or infinite at every site",
            hint="look for NaN and infinities in the model and in its data",
        )
    return replace(source, groups=groups), tuple(warnings)


def _is_finite(site: Site, statistics: Statistics) -> bool:
    weights = [reader.weight.const_value for reader in site.readers]
    arrays = [weight.numpy().astype(np.float64) for weight in weights if weight is not None]
    return all(np.isfinite(array).all() for array in (statistics.moments[site.tensor].variance, *arrays))


def what_to_measure(source: DenseModel, options: Options) -> Measure:
    """What the objective and the replacement need to know."""
    objective, outputs = OBJECTIVES[options.objective], source.weighted_outputs(options)
    return Measure(
        covariance=options.replacement != CONSTANT,
        shared=options.swap > 0 and options.replacement not in (CONSTANT, "affine-parents"),
        windows=options.replacement == WINDOWED,
        extremes=True,
        outputs=outputs,
        curvature=objective.curvature if outputs else "none",
        gradient=objective.gradient,
        probes=options.probes,
        seed=options.seed,
        second=objective.curvature != "none",
    )
