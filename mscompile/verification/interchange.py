"""Interchange interventions on a dense and a compiled model: retained units take the values they have on another input.

Both models then give an answer; how often it is the same is the interchange-intervention accuracy. Two conventions say
which values go into the compiled model: *matched*, the dense model's, as in the dense one; *own*, those that the compiled
model itself has on the source. Units that the compiled model has not got keep their base values in the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from mscompile.intake.samples import Samples
from mscompile.operators import IntArray
from mscompile.runtime import Arrays
from mscompile.verification.checks import check_full_source, check_patches, cuts_all_paths
from mscompile.verification.interventions import Feed, Intervened, Setting
from mscompile.verification.metrics import Metric, default_metric
from mscompile.verification.skeletons import Skeleton
from mscompile.verification.surgery import Patch

Law = Literal["one-site", "all-sites"]
Masks = list[npt.NDArray[np.bool_]]
CHUNK = 64
"""Trials whose random numbers come from one generator: what is drawn does not depend on the batch size."""


@dataclass(frozen=True)
class Correspondence:
    """One site in both models: channel `kept[i]` of the dense tensor is channel `places[i]` of the compiled one.

    `size` and `width` are the numbers of channels; those of either model beyond the pairs are never set.
    """

    dense: Patch
    compiled: Patch
    size: int
    width: int
    kept: IntArray
    places: IntArray

    @property
    def origin(self) -> IntArray:
        """[width] dense channel whose value a compiled channel takes; 0 where it takes none."""
        origin = np.zeros(self.width, dtype=np.int64)
        origin[self.places] = self.kept
        return origin


@dataclass(frozen=True)
class Pair:
    """A dense model, its compiled model and tau: how their sites correspond."""

    dense: Skeleton
    compiled: Skeleton
    sites: tuple[Correspondence, ...]

    def masks(self, start: int, stop: int, *, law: Law, swap: float, seed: int) -> Masks:
        """Per site, [trials, retained]: the units that a law swaps in trials `start` to `stop`."""
        places, units = Draws(seed, [site.size for site in self.sites]).take(start, stop)
        drawn = (places * len(self.sites)).astype(np.int64)
        masks = []
        for number, (site, numbers) in enumerate(zip(self.sites, units, strict=True)):
            chosen = numbers[:, site.kept] < swap
            masks.append(chosen & (drawn == number)[:, None] if law == "one-site" else chosen)
        return masks


class Draws:
    """The random numbers of a sequence of trials: which site, and a number in [0, 1) for each dense unit.

    A unit is swapped where its number is below the swap probability, so that laws of other probabilities, and other compiled
    models, share the numbers and can be compared trial by trial.
    """

    def __init__(self, seed: int, sizes: Sequence[int]) -> None:
        self.seed, self.sizes = seed, tuple(sizes)

    def chunk(self, number: int) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float32]]]:
        """[CHUNK] and, for each site, [CHUNK, channels]."""
        rng = np.random.default_rng([self.seed, number])
        return rng.random(CHUNK), [rng.random((CHUNK, size), dtype=np.float32) for size in self.sizes]

    def take(self, start: int, stop: int) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float32]]]:
        """The numbers of trials `start` to `stop`."""
        first = start // CHUNK
        chunks = [self.chunk(number) for number in range(first, math.ceil(stop / CHUNK))]
        rows = slice(start - first * CHUNK, stop - first * CHUNK)
        places = np.concatenate([place for place, _ in chunks])[rows]
        return places, [np.concatenate([units[i] for _, units in chunks])[rows] for i in range(len(self.sizes))]


@dataclass(frozen=True)
class Trials:
    """A batch of interchanges.

    Attributes
    ----------
    base, source
        [trials] numbers of the samples.
    draw
        Gives the masks.
    dense, matched, own
        [trials, …] by output, under its name in the dense model; the last is None where it was not asked for.
    """

    base: IntArray
    source: IntArray
    draw: Callable[[], Masks]
    dense: Arrays
    matched: Arrays
    own: Arrays | None

    @cached_property
    def masks(self) -> Masks:
        """Per site, [trials, retained]: which pairs of channels were swapped."""
        return self.draw()


def disjoint_pairs(count: int, seed: int) -> tuple[IntArray, IntArray]:
    """Bases and sources: every one of `count` samples in one pair at most, so that trials speak of the population."""
    order = np.random.default_rng(seed).permutation(count)
    trials = count // 2
    return order[:trials], order[trials : 2 * trials]


class Opened:
    """Both models of a pair, opened for interchange.

    Attributes
    ----------
    answers
        The compiled model's output by the dense one's.
    batch_size
        Trials run at once.
    """

    def __init__(self, pair: Pair, answers: Mapping[str, str], *, batch_size: int, threads: int | None = None) -> None:
        self.pair, self.answers, self.batch_size = pair, dict(answers), batch_size
        self.dense = Intervened(pair.dense, [site.dense for site in pair.sites], threads=threads)
        self.compiled = Intervened(pair.compiled, [site.compiled for site in pair.sites], threads=threads)

    def trials(
        self,
        samples: Samples,
        base: IntArray,
        source: IntArray,
        *,
        law: Law,
        swap: float,
        seed: int,
        own: bool = False,
        first: int = 0,
    ) -> Iterator[Trials]:
        """Interchange the pairs (base[i], source[i]) in order, a batch at a time.

        Three forward passes each; with `own`, five. They are trials `first` and on of those that the seed gives.
        """
        for start in range(0, len(base), self.batch_size):
            stop = min(start + self.batch_size, len(base))
            masks = self.pair.masks(first + start, first + stop, law=law, swap=swap, seed=seed)
            yield self.interchange(samples, base[start:stop], source[start:stop], masks, own=own)

    def interchange(
        self,
        samples: Samples,
        base: IntArray,
        source: IntArray,
        masks: Masks,
        *,
        own: bool = False,
    ) -> Trials:
        """One batch under given masks; a batch shorter than the others is filled up, for models of a fixed batch size."""
        missing = self.batch_size - len(base) if self._fixed else 0
        rows = np.concatenate([np.arange(len(base)), np.zeros(max(missing, 0), dtype=np.int64)])
        base_feed, source_feed = (samples.take(part[rows]).inputs for part in (base, source))
        padded = [mask[rows] for mask in masks]
        values = self.dense.read(source_feed, [site.dense.tensor for site in self.pair.sites])
        dense = self.dense.run(base_feed, self.dense_settings(padded, values), list(self.answers))
        matched = self._run_compiled(base_feed, self.matched_settings(padded, values), len(base))
        mine = None
        if own:
            values = self.compiled.read(source_feed, [site.compiled.tensor for site in self.pair.sites])
            settings = {
                site.compiled.tensor: (self._narrow(site, mask), values[site.compiled.tensor])
                for site, mask in zip(self.pair.sites, padded, strict=True)
            }
            mine = self._run_compiled(base_feed, settings, len(base))
        answers = {name: array[: len(base)] for name, array in dense.items()}
        return Trials(base, source, lambda: masks, answers, matched, mine)

    def _run_compiled(self, inputs: Feed, settings: dict[str, Setting], count: int) -> Arrays:
        found = self.compiled.run(inputs, settings, list(self.answers.values()))
        return {output: found[answer][:count] for output, answer in self.answers.items()}

    def dense_settings(self, masks: Sequence[npt.NDArray[np.bool_]], values: Arrays) -> dict[str, Setting]:
        """Swapped units of the dense model, given the source's values."""
        settings: dict[str, Setting] = {}
        for site, mask in zip(self.pair.sites, masks, strict=True):
            wide = np.zeros((len(mask), site.size), dtype=np.bool_)
            wide[:, site.kept] = mask
            settings[site.dense.tensor] = (wide, values[site.dense.tensor])
        return settings

    def matched_settings(self, masks: Sequence[npt.NDArray[np.bool_]], values: Arrays) -> dict[str, Setting]:
        """The same units of the compiled model, with the dense model's values."""
        settings: dict[str, Setting] = {}
        for site, mask in zip(self.pair.sites, masks, strict=True):
            value = values[site.dense.tensor]
            taken = value if _whole(site) else np.take(value, site.origin, axis=site.dense.axis)
            settings[site.compiled.tensor] = (self._narrow(site, mask), _moved(taken, site, len(mask)))
        return settings

    def _narrow(self, site: Correspondence, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        narrow = np.zeros((len(mask), site.width), dtype=np.bool_)
        narrow[:, site.places] = mask
        return narrow

    @property
    def _fixed(self) -> bool:
        shape = self.pair.dense.proto.graph.input[0].type.tensor_type.shape.dim
        return bool(len(shape)) and shape[0].HasField("dim_value")

    def plain(self, samples: Samples) -> tuple[Arrays, Arrays]:
        """Outputs of both models without intervention."""
        names = list(self.answers), list(self.answers.values())
        runs = [
            (self.dense.read(batch, names[0]), self.compiled.read(batch, names[1]))
            for batch in samples.batches(self.batch_size)
        ]
        return (
            {output: np.concatenate([dense[output] for dense, _ in runs]) for output in self.answers},
            {a: np.concatenate([compiled[b] for _, compiled in runs]) for a, b in self.answers.items()},
        )


class Engine(Opened):
    """Both models opened for interchange; building one runs the self-checks.

    A null patch and a self patch must leave either model's outputs bit for bit as they are; where the sites lie on every
    path from input to output, patching all their channels must reproduce the source's outputs.

    Parameters
    ----------
    outputs
        The compiled model's by the dense one's, one result per sample in both. By default the first of floating point.

    Attributes
    ----------
    output
        The first one compared.
    metric
        How its values are compared.
    full_source_checked
        Whether the sites lie on every path to every output compared, so that the third check was made for all.
    answer_bytes
        Bytes of the dense model's outputs compared, per sample.
    """

    def __init__(
        self,
        pair: Pair,
        samples: Samples,
        *,
        batch_size: int,
        metric: Metric | None = None,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(pair, {}, batch_size=batch_size)
        self.batch = next(samples.batches(min(batch_size, len(samples))))
        values = self.dense.read(self.batch)
        if outputs is None:
            output = compared_output(pair.dense.proto)
            outputs = {output: output if output in self.compiled.outputs else compared_output(pair.compiled.proto)}
        self.answers = dict(outputs)
        self.output = next(iter(self.answers))
        self.answer_bytes = sum(values[name].nbytes for name in self.answers) // max(len(values[self.output]), 1)
        self.metric = metric if metric is not None else default_metric(values[self.output])
        check_patches("dense", self.dense, self.batch, list(self.answers), samples.shared)
        check_patches("compiled", self.compiled, self.batch, list(self.answers.values()), samples.shared)
        sites = [site.dense.tensor for site in pair.sites]
        cut = [output for output in self.answers if cuts_all_paths(pair.dense.proto, sites, output)]
        self.full_source_checked = len(cut) == len(self.answers)
        if cut:
            check_full_source(self.dense, self.batch, cut, samples.shared)


def _whole(site: Correspondence) -> bool:
    return site.width == site.size and np.array_equal(site.origin, np.arange(site.size))


def _moved(values: npt.NDArray[Any], site: Correspondence, samples: int) -> npt.NDArray[Any]:
    """Values with their channels, and the samples, where the compiled model has them."""
    dense, compiled = site.dense, site.compiled
    if dense.layout == compiled.layout:
        return values if dense.axis == compiled.axis else np.moveaxis(values, dense.axis, compiled.axis)
    here, there = dense.layout.of(values.shape, samples), compiled.layout
    front = np.moveaxis(here.front(values, samples), here.channel(dense.axis), 1)
    apart = there.split((-1,) * compiled.rank, samples)
    places = [apart[a] for a in range(len(apart)) if a not in (there.place, there.split_axis(compiled.axis))]
    if len(places) != front.ndim - 2:  # the same positions in order, on more axes or fewer
        front = front.reshape(*front.shape[:2], *places)
    return np.ascontiguousarray(there.back(np.moveaxis(front, 1, there.channel(compiled.axis))))


def compared_output(model: onnx.ModelProto) -> str:
    """The first output of floating point; the first where there is none."""
    for output in model.graph.output:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
        if np.dtype(dtype).kind not in "iub?SO":
            return str(output.name)
    return str(model.graph.output[0].name)
