"""The frontier of size and fidelity: risk curves over all groups and candidates along the way down, of one calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mscompile.network.costs import Costs, Counts
from mscompile.network.latency import LatencyModel, LatencyTable
from mscompile.network.sizes import time_of
from mscompile.runs.work import digest
from mscompile.search.candidates import Workshop
from mscompile.search.goals import Cost, Curve, descend, distinct, make_curve, probed, reach, widths
from mscompile.search.risks import GroupRisks
from mscompile.search.sweep import Point, Sweep
from mscompile.verification.metrics import METRICS

SPACINGS = (0.04, 0.03, 0.02, 0.01, 0.005)
"""Differences of size between candidates that are tried in turn until there are enough of them."""
ENOUGH = 20
"""Candidates that are enough."""
TABLE_BATCH = 16
"""Samples at a time that the latency table is for."""


@dataclass(frozen=True)
class Tried:
    """A candidate of the frontier, measured on the `choose` part.

    Attributes
    ----------
    counts
        Channels left by group.
    size
        Mean of the shares of parameters and of multiply–accumulates.
    params, macs, latency
        Shares of the dense model's; the latency is that of the table.
    """

    counts: Mapping[int, int]
    size: float
    params: float
    macs: float
    latency: float
    point: Point


class Frontier:
    """Curves and candidates of one calibration."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._tried: tuple[Tried, ...] | None = None
        self._curves: dict[bool, dict[int, Curve]] = {}
        source, options = workshop.source, workshop.options
        first = next(workshop.parts["calibrate"].batches(min(TABLE_BATCH, source.batch or TABLE_BATCH)))
        orders = {group: elimination.order for group, elimination in workshop.eliminations.items()}
        self.costs = Costs(source.scm, orders, {name: array.shape for name, array in first.items()})
        self.table = LatencyTable.open(cache=options.cache)
        self._first = first

    @cached_property
    def sweep(self) -> Sweep:
        """The graph that candidates are tried on."""
        workshop = self.workshop
        metric = None if workshop.options.metric is None else METRICS[workshop.options.metric]
        parts, batch = workshop.parts, workshop.batch
        return Sweep(
            workshop.source,
            parts["choose"],
            batch_size=batch,
            metric=metric,
            tunable=workshop.tunable,
            foldings=workshop.read_by_rows,
            work=workshop.stage.work,
        )

    @cached_property
    def latency(self) -> LatencyModel:
        """Predicted latency at given widths."""
        return LatencyModel(self.costs, self.table, time_of(self.workshop.source.model, self._first))

    def curves(self, *, aligned: bool = False) -> dict[int, Curve]:
        """Risk curves by group, on one scale; `aligned` keeps to widths that convolutions like."""
        if aligned not in self._curves:
            workshop, source = self.workshop, self.workshop.source
            found = {}
            with workshop.clock.time("search"):
                risks = GroupRisks(workshop)
                for group in workshop.progress(risks.places, "measure risks", len(source.groups)):
                    elimination = workshop.eliminations[group]
                    counts = widths(source.groups[group], len(elimination.order), source.ranks, aligned=aligned)
                    counts = distinct(counts, [self.costs.left(group, int(count)) for count in counts])
                    measured = self._kept_risks(risks, group, probed(counts))
                    found[group] = make_curve(elimination, counts, workshop.carriers(group), measured)
            self._curves[aligned] = found
        return self._curves[aligned]

    def _kept_risks(self, risks: GroupRisks, group: int, counts: np.ndarray) -> dict[int, float]:
        """Those of one group, kept."""
        name = f"risks-{group}-{digest(counts.tolist())}"
        pairs = self.workshop.stage.recall(name, "measured risks", lambda: [*risks.measure(group, counts).items()])
        return {int(count): float(risk) for count, risk in pairs}

    def cost(self, kind: str) -> Cost:
        """A cost as a share of the dense model's, up to a constant for latency."""
        if kind == "latency":
            latency = self.latency
            whole = max(latency.dense_ms, latency.nodes({}))
            beside = whole - latency.nodes({})
            return lambda counts, group: (latency.nodes(counts, group) + (beside if group is None else 0.0)) / whole
        of = {"params": (self.costs.params,), "macs": (self.costs.macs,), "size": (self.costs.params, self.costs.macs)}[kind]
        parts = [(cost, cost({}, None)) for cost in of]
        parts = [(cost, total) for cost, total in parts if total > 0]
        return lambda counts, group: sum(cost(counts, group) / total for cost, total in parts) / len(parts)

    def reach(self, kind: str, share: float) -> tuple[dict[int, int] | None, float]:
        """Widths of about least risk within a share of the dense model's cost; None, and the least share, where none is."""
        curves, cost = self.curves(aligned=kind == "latency"), self.cost(kind)
        with self.workshop.clock.time("search"):
            counts = reach(curves, cost, share)
            return counts, cost(counts or {group: curve.counts[-1] for group, curve in curves.items()}, None)

    def tried(self) -> tuple[Tried, ...]:
        """Candidates from large to small, as far down as it goes, those that cut nothing left out.

        Which they are, and their order, is fixed before any of them is tried.
        """
        if self._tried is None:
            with self.workshop.clock.time("search"):
                steps = list(descend(self.curves(), self.cost("size")))
                chosen = [steps[i] for i in ladder([size for _, size in steps])]
                found = [(*step, self.measure(step[0], "choose")) for step in chosen if self.workshop.drafts(step[0])]
            with self.workshop.clock.time("measure"):
                self._tried = tuple(self._described(*entry) for entry in found)
        return self._tried

    def keep_table(self) -> tuple[str, ...]:
        """Keep what was measured of operators; gives a warning where that fails."""
        reason = self.table.save()
        return () if reason is None else (reason,)

    def _described(self, counts: Mapping[int, int], size: float, point: Point) -> Tried:
        return Tried(
            dict(counts),
            size,
            self.cost("params")(counts, None),
            self.cost("macs")(counts, None),
            self.latency.share(counts),
            point,
        )

    def measure(self, counts: Counts, part: str) -> Point:
        """Interchange of a candidate as fitted, not re-calibrated, on one part of the data."""
        workshop, options = self.workshop, self.workshop.options
        samples = workshop.parts[part]

        def found() -> dict[str, Any]:
            plans = workshop.drafts(counts)
            return vars(self.sweep.measure(plans, samples, law=options.law, swap=options.swap, seed=options.seed))

        name = f"candidate-{part}-{digest(sorted((int(group), int(count)) for group, count in counts.items()))}"
        return Point(**workshop.stage.recall(name, "candidates measured", found))


def ladder(sizes: Sequence[float]) -> list[int]:
    """Numbers of those of falling `sizes` that come first behind each of evenly spaced ones."""
    found: list[int] = []
    for spacing in SPACINGS:
        rungs = np.arange(1.0 - spacing, 0.0, -spacing)
        behind = np.searchsorted(-np.array(sizes), -rungs)
        found = sorted({int(i) for i in behind if i < len(sizes)})
        if len(found) >= ENOUGH:
            break
    return found
