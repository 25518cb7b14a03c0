"""Trials in shards: run ahead by whoever works, kept as they are found, and taken in their order.

Shards are cut by the number of trials and the batch size alone, and the batches in them are those that one process would
run: what is found is the same to the last bit whoever runs which shard, in one run or in several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx

from mscompile.intake.samples import Samples
from mscompile.network.layout import Layout
from mscompile.operators import IntArray
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import ALONE, Run, Tick
from mscompile.runs.work import FORGET, Stage
from mscompile.verification.interchange import Correspondence, Law, Opened, Pair, Trials
from mscompile.verification.skeletons import Skeleton
from mscompile.verification.surgery import Patch

MOST_BATCHES = 16
"""Batches in a shard at most."""
SHARD_BYTES = 1 << 26
"""Bytes of outputs that a shard of more than one batch gives at most."""
KEPT_BYTES = 1 << 28
"""Bytes of outputs above which a shard is not kept."""
MODELS = ("dense", "compiled")
KINDS = ("dense", "matched", "own")
"""Of outputs, see `Trials`."""


@dataclass(frozen=True)
class Interchanges:
    """Interchange on a pair of models, with all that it takes to run any shard of trials.

    Attributes
    ----------
    answers
        The compiled model's output by the dense one's.
    opened
        The pair as it is open in this process already.
    """

    kind: ClassVar[str] = "interchanges"
    pair: Pair
    answers: Mapping[str, str]
    opened: Opened | None = None

    def open(self, threads: int | None = None) -> Callable[[Parcel, Tick], Parcel]:
        """Open the models; gives what runs a shard."""
        opened = self.opened or Opened(self.pair, self.answers, batch_size=1, threads=threads)
        return partial(_outputs, opened)

    def pack(self) -> Parcel:
        """All of it, to travel."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, model in zip(MODELS, (self.pair.dense, self.pair.compiled), strict=True):
            portable = model.portable()
            arrays[name] = np.frombuffer(portable.proto.SerializeToString(), dtype=np.uint8)
            arrays |= {f"{name}:{weight}": array for weight, array in portable.weights.items()}
        sites = []
        for number, site in enumerate(self.pair.sites):
            arrays |= {f"kept {number}": site.kept, f"places {number}": site.places}
            sizes = {"size": site.size, "width": site.width}
            sites.append({"dense": asdict(site.dense), "compiled": asdict(site.compiled), **sizes})
        return Parcel({"kind": self.kind, "sites": sites, "answers": dict(self.answers)}, arrays)

    @classmethod
    def unpack(cls, parcel: Parcel) -> Interchanges:
        """The reverse of `pack`."""
        dense, compiled = (_skeleton(parcel, name) for name in MODELS)
        sites = tuple(
            Correspondence(
                _patch(site["dense"]),
                _patch(site["compiled"]),
                site["size"],
                site["width"],
                parcel.arrays[f"kept {number}"],
                parcel.arrays[f"places {number}"],
            )
            for number, site in enumerate(parcel.header["sites"])
        )
        return cls(Pair(dense, compiled, sites), parcel.header["answers"])


def _patch(fields: Mapping[str, Any]) -> Patch:
    return Patch(**{**fields, "layout": Layout(**fields["layout"])})


def _skeleton(parcel: Parcel, name: str) -> Skeleton:
    weights = {key.removeprefix(f"{name}:"): a for key, a in parcel.arrays.items() if key.startswith(f"{name}:")}
    return Skeleton(onnx.ModelProto.FromString(parcel.arrays[name].tobytes()), weights)


@dataclass(frozen=True)
class Design:
    """Which interchanges: the law, the probability of a swap, the seed of all choices; with `own` values patched, too."""

    law: Law
    swap: float
    seed: int
    own: bool = False


@dataclass(frozen=True)
class Shards:
    """Trials on the pairs (base[i], source[i]) of samples, cut into shards.

    Attributes
    ----------
    trial_bytes
        Bytes of the outputs of one trial.
    """

    samples: Samples
    base: IntArray
    source: IntArray
    design: Design
    batch_size: int
    trial_bytes: int = 0

    @cached_property
    def ends(self) -> list[int]:
        """Trials before each shard, and in all.

        A shard is of as many batches as all before it together, up to a limit: who stops early has run little in vain.
        """
        most = max(1, min(MOST_BATCHES, SHARD_BYTES // max(self.batch_size * self.trial_bytes, 1)))
        ends = [0]
        while ends[-1] < len(self.base):
            batches = min(max(ends[-1] // self.batch_size, 1), most)
            ends.append(min(ends[-1] + batches * self.batch_size, len(self.base)))
        return ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def part(self, number: int) -> slice:
        """The trials of a shard."""
        return slice(self.ends[number], self.ends[number + 1])

    def name(self, number: int) -> str:
        """What its outputs are kept as."""
        part, design = self.part(number), self.design
        return f"{design.law}-{design.swap!r}-{'own' if design.own else 'matched'}-{part.start}-{part.stop}"

    def cut(self, number: int) -> Parcel:
        """A shard: bases, and sources behind them."""
        part = self.part(number)
        both = self.samples.take(np.concatenate([self.base[part], self.source[part]]))
        header = {"first": part.start, "batch": self.batch_size, "shared": sorted(both.shared), **asdict(self.design)}
        return Parcel(header, both.inputs)


def run_trials(
    task: Interchanges, shards: Shards, *, run: Run = ALONE, stage: Stage = FORGET
) -> Generator[Trials, None, None]:
    """All trials in their order, a batch at a time.

    What the stage keeps is not run again. Whoever stops early leaves undone what no worker has begun.
    """
    missing = [number for number in range(len(shards)) if shards.name(number) not in stage.entries]
    with contextlib.closing(_found(task, shards, missing, run, stage)) as found:
        early: dict[int, Parcel] = {}
        for turn in range(len(shards)):
            while turn in missing and turn not in early:
                early.update([next(found)])
            content = early.pop(turn, None) or stage.parcel(shards.name(turn))
            if content is None:  # what was kept is damaged
                ((_, content),) = _found(task, shards, [turn], ALONE, stage)
            stage.reuse(shards.name(turn), "interchanges")
            yield from _trials(task, shards, turn, content.arrays)


def _found(
    task: Interchanges, shards: Shards, missing: Sequence[int], run: Run, stage: Stage
) -> Generator[tuple[int, Parcel], None, None]:
    """The outputs on shards as they come, kept where that costs little."""
    with contextlib.closing(run.map(task, missing, shards.cut, lambda _: None, [0] * len(shards))) as found:
        for number, content in found:
            if stage.affordable and sum(array.nbytes for array in content.arrays.values()) <= KEPT_BYTES:
                stage.keep(shards.name(number), content)
            yield number, content


def _outputs(opened: Opened, shard: Parcel, tick: Tick) -> Parcel:
    """The outputs of all trials of a shard."""
    header = dict(shard.header)
    first, opened.batch_size, shared = header.pop("first"), header.pop("batch"), frozenset(header.pop("shared"))
    samples = Samples(dict(shard.arrays), None, "", (), shared)
    rows = np.arange(len(samples))
    count = len(rows) // 2
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for trials in opened.trials(samples, rows[:count], rows[count:], first=first, **header):
        for kind in KINDS:
            for name, array in (getattr(trials, kind) or {}).items():
                parts.setdefault(f"{kind}:{name}", []).append(array)
        tick(1)
    return Parcel({}, {name: np.concatenate(arrays) for name, arrays in parts.items()})


def _trials(task: Interchanges, shards: Shards, number: int, found: Mapping[str, npt.NDArray[Any]]) -> Iterator[Trials]:
    """The trials of a shard in the batches that they were run in."""
    part, design = shards.part(number), shards.design
    for start in range(part.start, part.stop, shards.batch_size):
        stop = min(start + shards.batch_size, part.stop)
        rows = slice(start - part.start, stop - part.start)
        dense, matched, own = (
            {name: found[f"{kind}:{name}"][rows] for name in task.answers if f"{kind}:{name}" in found} for kind in KINDS
        )
        draw = partial(task.pair.masks, start, stop, law=design.law, swap=design.swap, seed=design.seed)
        yield Trials(shards.base[start:stop], shards.source[start:stop], draw, dense, matched, own or None)
