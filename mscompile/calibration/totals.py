"""Totals over all shards: what was summed up, by whomever, is merged in the order of the shards, and kept on the way."""

from __future__ import annotations

import math
from collections.abc import Callable

from mscompile.calibration.statistics import Array
from mscompile.calibration.summation import Shards, Summation
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Run, counting
from mscompile.runs.work import Stage
from mscompile.runtime import Progress


def total(
    summation: Summation, cut: Callable[[], Shards], *, stage: Stage, name: str, run: Run, progress: Progress
) -> dict[str, Array]:
    """Sums over all shards, which are cut if they are needed.

    Sums so far are kept in the stage from time to time as `NAME-merged`, with the number of shards in them; shards that
    come before their turn as `NAME-NUMBER`; all of them in the end as `NAME`.
    """
    if (done := stage.parcel(name)) is not None:
        stage.reuse(name, f"sums over {done.header['samples']} samples")
        return dict(done.arrays)
    shards = cut()
    merging = Merging(summation, stage, name, len(shards))
    missing = merging.missing()
    for piece in merging.found if len(missing) < len(shards) else ():
        stage.reuse(piece, f"{len(shards) - len(missing)} of {len(shards)} shards of calibration")
    batches = [math.ceil(count / shards.batch_size) for count in shards.counts()]
    with counting(progress, "calibrate", sum(batches)) as tick:
        tick(sum(batches) - sum(batches[i] for i in missing))
        for number, found in run.map(summation, missing, shards.cut, tick, batches):
            merging.take(number, found)
    stage.keep(name, Parcel({"samples": len(shards.samples)}, merging.totals))
    merging.drop()
    return merging.totals


class Merging:
    """Shards on their way into the totals, in their order.

    Attributes
    ----------
    totals
        Sums over the shards before `turn`.
    """

    def __init__(self, summation: Summation, stage: Stage, name: str, shards: int) -> None:
        self._summation, self._stage, self._name, self._shards = summation, stage, name, shards
        merged = stage.parcel(f"{name}-merged")
        self.totals: dict[str, Array] = {}
        self.turn = 0
        if merged is not None:
            self.turn = int(merged.header["shards"])
            summation.add(self.totals, merged.arrays)
        self._early = {i: piece for i in range(self.turn, shards) if (piece := stage.parcel(self._piece(i))) is not None}
        self._kept = set(self._early)
        self._merge()

    def _piece(self, number: int) -> str:
        return f"{self._name}-{number}"

    @property
    def found(self) -> list[str]:
        """Names of the pieces that the work begins with."""
        return [f"{self._name}-merged", *map(self._piece, self._kept)]

    def missing(self) -> list[int]:
        """Shards that no sums are there of."""
        return [number for number in range(self.turn, self._shards) if number not in self._early]

    def take(self, number: int, found: Parcel) -> None:
        """Take the sums of a shard, and keep them where that costs little."""
        self._early[number] = found
        self._merge()
        if not self._stage.affordable or self.turn == self._shards:
            return
        if number >= self.turn:
            self._stage.keep(self._piece(number), found)
            self._kept.add(number)
        else:
            self._stage.keep(f"{self._name}-merged", Parcel({"shards": self.turn}, self.totals))
            self._forget()

    def _merge(self) -> None:
        while self.turn in self._early:
            self._summation.take(self.totals, self._early.pop(self.turn).arrays)
            self.turn += 1

    def _forget(self) -> None:
        """Drop the pieces that are part of the totals kept."""
        for number in sorted(number for number in self._kept if number < self.turn):
            self._stage.drop(self._piece(number))
            self._kept.remove(number)

    def drop(self) -> None:
        """Drop all that led to the totals."""
        self._stage.drop(f"{self._name}-merged")
        self._forget()
