"""Seeds: the vectors v of λ = Jᵀv, and what the reverse pass starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.errors import DataError
from mscompile.operators import Shape
from mscompile.operators.backward import PREFIX, Builder
from mscompile.runtime import Arrays


class Seeds:
    """Inputs of a graph from which its outputs are differentiated.

    Of all outputs together as many unit vectors as they have values, where that is no more than the probes asked for; the
    curvature is then exact. Otherwise random signs.

    Parameters
    ----------
    outputs
        Weight by name of output: of its squared change, or its divergence, in the objective.
    extents
        Shape per sample by name of output.
    declared
        Shape by name of output as the model states it: onnxruntime fuses what it sees to be of equal shape.
    fisher
        Whether the curvature is that of the KL divergence of the softmax over the last axis, diag p − p pᵀ, and not that of
        the squared distance.
    """

    def __init__(
        self,
        graph: ir.Graph,
        build: Builder,
        *,
        outputs: Mapping[str, float],
        extents: Mapping[str, tuple[int, ...]],
        declared: Mapping[str, Shape],
        fisher: bool,
        probes: int,
        seed: int,
    ) -> None:
        self._graph, self._build, self._fisher, self._seed = graph, build, fisher, seed
        self._outputs, self._extents, self._declared = outputs, extents, declared
        self._values = {v.name or "": v for v in graph.outputs}
        self._labelled: str | None = None
        self._size = sum(map(math.prod, extents.values()))
        self.exact = self._size <= probes
        """Whether the seeds are all unit vectors, which cost no more then than random ones."""
        self.probes = self._size if self.exact else probes
        """Reverse passes per sample."""

    def probe(self, k: int) -> dict[str, ir.Value]:
        """Seed k by output: the input r, or for the Fisher curvature ``√p ∘ r − p (√p · r)``, whose second moment it is."""
        found = {}
        for output in self._outputs:
            seed = self._input(f"{PREFIX}seed.{k}:{output}", output)
            if self._fisher:
                p, axis = self._softmax(output), len(self._extents[output])
                weighted = self._build.op("Mul", self._build.op("Sqrt", p), seed)
                along = self._build.reduce("ReduceSum", weighted, [axis])
                seed = self._build.op("Sub", weighted, self._build.op("Mul", p, along))
            found[output] = seed
        return found

    def loss_gradient(self) -> dict[str, ir.Value]:
        """Gradient of the cross-entropy of the only output: softmax minus one-hot labels."""
        (self._labelled,) = self._outputs
        hot = self._input(f"{PREFIX}labels", self._labelled)
        return {self._labelled: self._build.op("Sub", self._softmax(self._labelled), hot)}

    @property
    def feeds(self) -> SeedFeeds:
        """The numbers that go into the inputs."""
        return SeedFeeds(self.exact, self.probes, self._size, self._seed, self._outputs, self._extents, self._labelled)

    def _input(self, name: str, output: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(self._declared[output]), type=ir.TensorType(ir.DataType.FLOAT))
        self._graph.inputs.append(value)
        return value

    def _softmax(self, output: str) -> ir.Value:
        logits = self._build.op("Cast", self._values[output], to=int(ir.DataType.FLOAT))
        return self._build.op("Softmax", logits, axis=len(self._extents[output]))


@dataclass(frozen=True)
class SeedFeeds:
    """What goes into the seeds' inputs; plain numbers, which can travel. Attributes as of `Seeds`.

    Attributes
    ----------
    size
        Values per sample of all outputs together.
    labelled
        The output that labels are of, where the gradient of the cross-entropy is asked for.
    """

    exact: bool
    probes: int
    size: int
    seed: int
    outputs: Mapping[str, float]
    extents: Mapping[str, tuple[int, ...]]
    labelled: str | None

    def feed(self, start: int, count: int, labels: npt.NDArray[Any] | None, where: str) -> Arrays:
        """Seeds of the samples `start` to `start + count`, which have these labels; they do not depend on the batches."""
        if self.exact:
            vectors = np.broadcast_to(np.eye(self.size, dtype=np.float32), (count, self.size, self.size))
        else:
            signs = random_signs(self.seed, start, count, self.probes * self.size)
            vectors = signs.reshape(count, self.probes, self.size)
        found, begin = {}, 0
        for output, weight in self.outputs.items():
            extent = self.extents[output]
            part = vectors[:, :, begin : begin + math.prod(extent)] * np.float32(math.sqrt(weight))
            begin += math.prod(extent)
            for k in range(self.probes):
                found[f"{PREFIX}seed.{k}:{output}"] = np.ascontiguousarray(part[:, k]).reshape(count, *extent)
        if self.labelled is not None:
            found[f"{PREFIX}labels"] = _one_hot(self.extents[self.labelled], labels, where)
        return found


def _one_hot(extent: tuple[int, ...], labels: npt.NDArray[Any] | None, where: str) -> npt.NDArray[np.float32]:
    classes = extent[-1]
    if labels is None or labels.shape[1:] != extent[:-1] or labels.dtype.kind not in "iu":
        raise DataError(
            "the cross-entropy objective needs class labels",
            where=where,
            why="there are no labels" if labels is None else f"labels are {labels.dtype} {labels.shape[1:]} per sample",
            hint="add integer labels under `label`, or use --objective kl, which needs none",
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            "a label is no class of the output",
            where=where,
            why=f"labels run from {labels.min()} to {labels.max()}, the output has {classes} classes",
            hint="number the classes from 0",
        )
    hot: npt.NDArray[np.float32] = np.eye(classes, dtype=np.float32)[labels]
    return hot


def random_signs(seed: int, start: int, count: int, size: int) -> npt.NDArray[np.float32]:
    """[count, size] of ±1: rows `start` to `start + count` of an endless table that only `seed` and `size` determine."""
    blocks = -(-size // 256)  # a step of the Philox counter gives 256 bits
    bits = np.random.Philox(key=seed)
    bits.advance(start * blocks)
    words = bits.random_raw(4 * blocks * count).astype("<u8").view(np.uint8).reshape(count, -1)
    return 2.0 * np.unpackbits(words, axis=1)[:, :size].astype(np.float32) - 1.0
