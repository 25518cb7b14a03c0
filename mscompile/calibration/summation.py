"""Summation: a graph that sums over batches, run on shards of the data, and the totals over all shards.

Shards are cut by the data and the batch size alone, and are merged in their order: the totals are the same to the last bit
whoever sums up which shard, in one run or in several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from pydantic import TypeAdapter

from mscompile.calibration.seeds import SeedFeeds
from mscompile.calibration.statistics import Array, Window
from mscompile.calibration.tally import Start, before, ones_of
from mscompile.calibration.windows import offset_of
from mscompile.intake.samples import Samples
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Tick
from mscompile.runtime import Arrays, Session
from mscompile.verification.skeletons import Skeleton, skeleton_of

HELD_BATCHES = 16
"""Batches summed up in float32 inside onnxruntime before the sums are added to the float64 totals outside; shards are whole
multiples of them."""
MOST_SHARDS = 4096
"""Shards that data is cut into at most: enough for hundreds of workers, none of them too small to be worth its way."""


@dataclass(frozen=True)
class Feeds:
    """Inputs of a summing graph beside the model's own; plain numbers, which can travel.

    Attributes
    ----------
    ones
        Rows per sample of the matrices that are summed down.
    offsets
        By name of input: a window, and the step between those observed.
    seed
        Of the offsets.
    """

    ones: tuple[int, ...]
    seeds: SeedFeeds | None
    offsets: Mapping[str, tuple[Window, int]]
    seed: int

    def of(self, number: int, start: int, count: int, labels: Array | None, where: str) -> Arrays:
        """For batch `number`, counted from 1: the samples `start` to `start + count`, with their labels."""
        seeds = {} if self.seeds is None else self.seeds.feed(start, count, labels, where)
        offsets = {name: offset_of(window, thin, number, self.seed) for name, (window, thin) in self.offsets.items()}
        return {**seeds, **offsets, **{ones_of(rows): np.ones((1, rows * count), dtype=np.float32) for rows in self.ones}}


@dataclass(frozen=True)
class Summation:
    """A summing graph, with all that it takes to run it on any part of the data.

    Attributes
    ----------
    model
        The graph; its outputs are its inputs of the names `tally.before` plus the sums over a batch.
    starts
        By output, where the sums begin.
    lean
        Whether memory matters more than time, see `Session`.
    """

    kind: ClassVar[str] = "summation"
    model: ir.Model | Skeleton
    starts: Mapping[str, Start]
    feeds: Feeds
    lean: bool = False

    def open(self, threads: int | None = None) -> Callable[[Parcel, Tick], Parcel]:
        """Load the graph; gives what sums up a shard."""
        session = Session(self.model, threads=threads, lean=self.lean)

        def work(shard: Parcel, tick: Tick) -> Parcel:
            return Parcel({}, self._sum(session, shard, tick))

        return work

    def _sum(self, session: Session, shard: Parcel, tick: Tick) -> dict[str, Array]:
        samples, size, number, start = _samples(shard), *(int(shard.header[key]) for key in ("batch", "number", "start"))
        totals: dict[str, Array] = {}
        state, done, batches = self.empty(), 0, math.ceil(len(samples) / size)
        for i, batch in enumerate(samples.batches(size), start=1):
            count = min(size, len(samples) - done)
            labels = None if samples.labels is None else samples.labels[done : done + count]
            feed = self.feeds.of(number + i, start + done, count, labels, samples.source)
            sums = session.step({**batch, **feed}, state)
            state = {before(name): value for name, value in sums.items()}
            done += count
            tick(1)
            if i % HELD_BATCHES == 0 or i == batches:
                state.clear()
                for name in list(sums):  # let go of one by one: beside the totals they take most of the memory
                    self.take(totals, {name: sums.pop(name).numpy().astype(np.float64)})
                state = self.empty() if i < batches else state
        return totals

    def empty(self) -> dict[str, ort.OrtValue]:
        """The sums over no data."""
        return {before(name): ort.OrtValue.ortvalue_from_numpy(start.array) for name, start in self.starts.items()}

    def add(self, totals: dict[str, Array], found: Mapping[str, Array]) -> None:
        """Add more sums, and extremes, to the totals."""
        for name, value in found.items():
            if name not in totals:
                totals[name] = np.array(value)
            elif self.starts[name].largest:
                np.maximum(totals[name], value, out=totals[name])
            else:
                totals[name] += value

    def take(self, totals: dict[str, Array], found: Mapping[str, Array]) -> None:
        """The same with arrays that are not used any more: the first ones become the totals."""
        totals.update({name: value for name, value in found.items() if name not in totals and value.flags.writeable})
        self.add(totals, {name: value for name, value in found.items() if totals.get(name) is not value})

    def pack(self) -> Parcel:
        """All of it, to travel."""
        skeleton = (skeleton_of(self.model) if isinstance(self.model, ir.Model) else self.model).portable()
        starts = {name: asdict(start) for name, start in self.starts.items()}
        feeds = TypeAdapter(Feeds).dump_python(self.feeds, mode="json")
        content = np.frombuffer(skeleton.proto.SerializeToString(), dtype=np.uint8)
        arrays = {"graph": content, **{f"weight:{name}": array for name, array in skeleton.weights.items()}}
        return Parcel({"kind": self.kind, "starts": starts, "feeds": feeds, "lean": self.lean}, arrays)

    @classmethod
    def unpack(cls, parcel: Parcel) -> Summation:
        """The reverse of `pack`."""
        graph = onnx.ModelProto.FromString(parcel.arrays["graph"].tobytes())
        weights = {name.removeprefix("weight:"): a for name, a in parcel.arrays.items() if name.startswith("weight:")}
        starts = TypeAdapter(dict[str, Start]).validate_python(parcel.header["starts"])
        feeds = TypeAdapter(Feeds).validate_python(parcel.header["feeds"])
        return cls(Skeleton(graph, weights), starts, feeds, parcel.header["lean"])


@dataclass(frozen=True)
class Shards:
    """Samples cut into shards."""

    samples: Samples
    batch_size: int

    @property
    def size(self) -> int:
        """Samples per shard, the last one excepted: a multiple of those summed up at once in float32."""
        held = HELD_BATCHES * self.batch_size
        return held * math.ceil(len(self.samples) / (held * MOST_SHARDS))

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.size)

    def cut(self, number: int) -> Parcel:
        """A shard, as views of the samples."""
        start = number * self.size
        part = self.samples.take(slice(start, start + self.size))
        header = {
            "batch": self.batch_size,
            "number": start // self.batch_size,
            "start": start,
            "source": part.source,
            "shared": sorted(part.shared),
        }
        labels = {} if part.labels is None else {LABELS: part.labels}
        return Parcel(header, {**{f"input:{name}": array for name, array in part.inputs.items()}, **labels})

    def counts(self) -> Iterator[int]:
        """Samples of each shard."""
        return (min(self.size, len(self.samples) - start) for start in range(0, len(self.samples), self.size))


LABELS = "labels"
"""Labels in a parcel; inputs have a prefix there."""


def _samples(shard: Parcel) -> Samples:
    inputs = {name.removeprefix("input:"): array for name, array in shard.arrays.items() if name != LABELS}
    return Samples(inputs, shard.arrays.get(LABELS), str(shard.header["source"]), (), frozenset(shard.header["shared"]))
