"""Candidates by hand: calibrate once, then plan, rewrite and measure as often as a table asks for.

`mscompile.compile_model` does the same in one call and splits its data to certify. The scripts here want the stages apart:
one calibration under many plans, several objectives side by side, and interchanges on a test set of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.statistics import Statistics
from mscompile.intake.data import read
from mscompile.intake.samples import Samples, Source
from mscompile.network.dense import DenseModel
from mscompile.network.sizes import count_parameters
from mscompile.operators import IntArray
from mscompile.options import Options
from mscompile.planning.plan import Keep, Plan, resolve_keep
from mscompile.planning.planner import Planner
from mscompile.planning.scores import OBJECTIVES, Scores, score
from mscompile.planning.selection import eliminate_by_score, eliminate_jointly
from mscompile.rewrite import Compiled, rewrite
from mscompile.verification.verify import Interchange, Law, Pair, make_pair

BATCH = Options().batch
"""Samples at a time: the compiler's default, since the windows it observes are drawn batch by batch."""


def samples_of(dense: DenseModel, source: Source) -> Samples:
    """Read samples for a model."""
    return read(source, dense.specs)


def measure_of(dense: DenseModel, objective: str) -> Measure:
    """What an objective and affine replacement need to know, as `compile_model` asks for it."""
    needs = OBJECTIVES[objective]
    return Measure(
        windows=True,
        outputs={dense.output: 1.0},
        curvature=needs.curvature,
        gradient=needs.gradient,
        second=needs.curvature != "none",
    )


def statistics_of(dense: DenseModel, samples: Samples, objective: str = "logit-mse") -> Statistics:
    """Calibrate every site; statistics for logit-mse serve every objective but those of another curvature."""
    return calibrate(dense.scm, dense.sites, samples, batch_size=BATCH, measure=measure_of(dense, objective))


def scores_of(dense: DenseModel, statistics: Statistics, objective: str, *, seed: int = 0) -> Scores:
    """Score every unit of every site."""
    return score(dense.scm, dense.sites, statistics, objective, seed=seed)


def orders_of(
    dense: DenseModel, statistics: Statistics, scores: Scores, *, joint: bool, swap: float = 0.1
) -> dict[int, IntArray]:
    """The order in which the units of every group go: by score, or jointly for affine maps fitted for `swap`."""
    return {
        group: eliminate_jointly(sites, statistics, swap).order if joint else eliminate_by_score(sites, scores).order
        for group, sites in dense.groups.items()
    }


@dataclass(frozen=True)
class Candidate:
    """A plan carried out, and the two models side by side."""

    plan: Plan
    compiled: Compiled
    pair: Pair

    @property
    def parameters(self) -> int:
        """Elements of floating-point weights."""
        return count_parameters(self.compiled.model)

    def interchange(self, samples: Samples) -> Interchange:
        """Open both models for interchanges; the self-checks run on `samples`."""
        return Interchange(self.pair, samples, batch_size=BATCH)


def candidate_of(
    dense: DenseModel,
    statistics: Statistics,
    scores: Scores,
    orders: Mapping[int, IntArray],
    keep: Keep | Mapping[str, Keep],
    replacement: str,
    *,
    swap: float = 0.1,
) -> Candidate:
    """Plan at `keep`, affine maps fitted for the swap probability, and carry the plan out."""
    planner = Planner(dense.scm, statistics, scores, dense.groups, orders, replacement, swap)
    plan = planner.plan(resolve_keep(dense.scm, dense.groups, keep), dense.sha256)
    compiled = rewrite(dense.model, plan)
    return Candidate(plan, compiled, make_pair(dense.scm, compiled.model, plan, compiled.alignment))


def accuracy_of_interchange(
    interchange: Interchange, samples: Samples, *, swap: float, passes: int, law: Law = "one-site"
) -> float:
    """Interchange-intervention accuracy over `passes` pairings of all samples, one seed each."""
    runs = [interchange.run(samples, law=law, swap=swap, seed=seed, delta=0.05) for seed in range(passes)]
    return 1.0 - sum(run.disagreements for run in runs) / sum(run.trials for run in runs)


def beside(model: Path, part: str) -> Path:
    """File of one part of the data that lies beside a model: NAME.calib.npz or NAME.test.npz."""
    return model.with_name(f"{model.stem}.{part}.npz")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are set flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
