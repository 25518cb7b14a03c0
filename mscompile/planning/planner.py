"""Planning: which units of a group stay at a given width, and fits for those that do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mscompile.calibration.statistics import Statistics
from mscompile.calibration.windows import determined, fit_window, window_name, window_weight
from mscompile.errors import GoalError
from mscompile.network.scm import Scm, Site
from mscompile.network.units import among
from mscompile.operators import IntArray
from mscompile.planning.drafts import Draft, Folding
from mscompile.planning.plan import Plan, SitePlan, WindowPlan
from mscompile.planning.replacements import AFFINE_FITS, CONSTANT, WINDOWED, Factor, Fit, fit_by_row
from mscompile.planning.scores import MEASURABLE, Scores, joint_curvature
from mscompile.planning.selection import retained_heads, retained_units, without_carriers

Stays = npt.NDArray[np.bool_]
Entry = TypeVar("Entry", SitePlan, SitePlan | Draft)


@dataclass(frozen=True)
class Planner:
    """What plans are made from.

    Attributes
    ----------
    orders
        Units by group in the order they go, see `mscompile.planning.selection`.
    replacement
        One of `REPLACEMENTS`.
    swap
        Interchange probability that affine maps are fitted for.
    lossless
        By group, how many of the first units are functions of the others. Where no more go, least squares folds them without
        loss, whatever an interchange may do.
    factors
        By site tensor, what shortens its affine fits.
    foldings
        By site tensor and reader, what makes them needless where plans are drafts.
    """

    scm: Scm
    statistics: Statistics
    scores: Scores
    groups: Mapping[int, Sequence[Site]]
    orders: Mapping[int, IntArray]
    replacement: str
    swap: float
    lossless: Mapping[int, int] = field(default_factory=dict)
    factors: Mapping[str, Factor] = field(default_factory=dict)
    foldings: Mapping[str, Mapping[str, Folding]] = field(default_factory=dict)

    def plan(self, counts: Mapping[int, int], model_sha256: str) -> Plan:
        """The plan of a model for so many channels left in it by group."""
        planned = [entry for group, count in counts.items() for entry in self.group(group, count)]
        return Plan(
            model_sha256=model_sha256,
            objective=self.scores.objective,
            replacement=self.replacement,
            swap=self.swap,
            sites=self.in_order(planned),
        )

    def in_order(self, entries: Iterable[Entry]) -> tuple[Entry, ...]:
        """By their sites' places in the graph."""
        place = {site.tensor: i for i, site in enumerate(self.scm.sites)}
        return tuple(sorted(entries, key=lambda entry: place[entry.tensor]))

    def group(self, group: int, count: int) -> list[SitePlan]:
        """Plans of the sites of a group that lose units, with their predicted risks.

        Where constants must reach a zero-padded border, some of the channels left are carriers, so fewer units are retained.
        """
        plans = [
            [self._site(site, group, stays, swap) for site, stays, swap in self._cut(group, kept)]
            for kept in self._sets(group, count)
        ]
        return min(plans, key=lambda entries: sum(entry.predicted_risk or 0.0 for entry in entries), default=[])

    def drafts(self, group: int, count: int) -> list[SitePlan | Draft]:
        """The same to be tried: risks are not predicted, which costs as much as a fit, unless the choice depends on them."""
        sets = self._sets(group, count)
        if len(sets) != 1:
            return [*self.group(group, count)]
        found: list[SitePlan | Draft] = []
        for site, stays, swap in self._cut(group, sets[0]):
            kept = np.flatnonzero(stays)
            factor, foldings = self.factors.get(site.tensor), self.foldings.get(site.tensor)
            if foldings and factor is not None and len(kept) and factor.fits(kept, swap):
                found.append(Draft(site.tensor, kept, self.scores.basis[site.tensor], foldings))
            else:
                found.append(self._site(site, group, stays, swap, predicted=False))
        return found

    def _sets(self, group: int, count: int) -> list[IntArray]:
        """Units that may be retained: whole heads or some channels of each, where the former are no wider."""
        sites, order = self.groups[group], self.orders[group]
        left = retained_units(order, count, self.scm.blocks, self.scm.frozen, sites)
        retained = without_carriers(left, order, self.scm.blocks, sites)
        if count == len(order) or not len(retained):
            return []
        heads = retained_heads(order, count, self.scm.blocks, self.scm.frozen)
        if heads is None or len(heads) > len(retained) or not all(np.isin(site.units, heads).any() for site in sites):
            return [retained]
        return [retained, heads]

    def _free(self, group: int) -> IntArray:
        """Units that cost nothing where least squares folds them."""
        return self.orders[group][: self.lossless.get(group, 0)]

    def _cut(self, group: int, kept_units: IntArray) -> list[tuple[Site, Stays, float]]:
        """Sites that lose units, which of their channels stay, and the swap probability to fit for."""
        stays = [(site, among(site.units, kept_units)) for site in self.groups[group]]
        cut, free = [(site, left) for site, left in stays if not left.all()], self._free(group)
        lossless = all(among(site.units[~left], free).all() for site, left in cut)
        return [(site, left, 0.0 if lossless else self.swap) for site, left in cut]

    def _site(self, site: Site, group: int, stays: Stays, swap: float, *, predicted: bool = True) -> SitePlan:
        kept, replaced = np.flatnonzero(stays), np.flatnonzero(~stays)
        moments = self.statistics.moments[site.tensor]
        if len(kept) == 0:
            raise GoalError(
                "no unit of a site would be left",
                where=site.tensor,
                why="units of the same group are all that is kept",
                hint="keep more units",
            )
        if self.replacement == CONSTANT:
            fit = Fit(self.scores.constants[site.tensor][replaced], None)
        elif site.rows is not None:
            fit = fit_by_row(AFFINE_FITS[self.replacement], moments, kept, replaced, swap, site.rows)
        elif site.tensor in self.factors and self.factors[site.tensor].fits(kept, swap):
            fit = self.factors[site.tensor].fit(kept, replaced)
        else:
            fit = AFFINE_FITS[self.replacement](moments, kept, replaced, swap)
        windows: tuple[WindowPlan, ...] = ()
        if self.replacement == WINDOWED:
            windows = tuple(_plan_windows(site, self.statistics, kept, replaced, swap))
        risk = None
        if predicted and self.scores.basis[site.tensor].startswith(MEASURABLE):
            error = fit.error_moment(moments, kept, replaced)
            risk = max(0.5 * float(np.sum(joint_curvature(site, self.statistics)[np.ix_(replaced, replaced)] * error)), 0.0)
        return SitePlan(
            name=site.tensor,
            tensor=site.tensor,
            axis=site.axis,
            size=site.size,
            kept=kept,
            lossless=replaced[np.isin(site.units[replaced], self._free(group))],
            constants=fit.constants.astype(np.float32),
            affine=None if fit.matrix is None else fit.matrix.astype(np.float32),
            windows=windows,
            basis=self.scores.basis[site.tensor],
            predicted_risk=risk,
        )


def _plan_windows(
    site: Site, statistics: Statistics, kept: IntArray, replaced: IntArray, swap: float
) -> Iterator[WindowPlan]:
    for reader in site.readers:
        moments = statistics.windows.get(window_name(reader))
        if moments is None or not determined(moments, len(kept)):
            continue
        refit = fit_window(moments, window_weight(site, reader, moments.window), kept, replaced, swap)
        places = None
        if not moments.window.kernel:
            places = np.argsort(reader.index, kind="stable").reshape(site.size, -1)[kept]
        columns, response = refit.columns.astype(np.float32), refit.response.astype(np.float32)
        yield WindowPlan(reader=window_name(reader), places=places, columns=columns, response=response)
