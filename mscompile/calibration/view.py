"""How the elements of a site's tensor are taken as samples, positions and channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.errors import UnsupportedError
from mscompile.network.layout import FIRST, Layout
from mscompile.network.scm import Site
from mscompile.operators import Dim, Shape
from mscompile.operators.backward import Builder


def layout_of(layout: Layout, shape: Shape, samples: int, tensor: str) -> Layout:
    """A layout with its numbers for a batch; where there are not as many rows for each sample, they are taken as they come.

    Raises
    ------
    UnsupportedError
        The samples are not where they were taken to be.
    """
    whole = all(isinstance(size, int) for size in shape)
    try:
        known = layout.of(shape, samples)
        if whole or known.alone:
            return known
        why = "its size depends on the data"
    except ValueError as error:
        why = str(error)
    if layout.first and layout.behind is None:
        return FIRST
    raise UnsupportedError(
        "a tensor does not hold the samples where they were taken to be",
        where=tensor,
        why=why,
        hint="leave it alone with --freeze, and please report this as a bug",
    )


@dataclass(frozen=True)
class Turned:
    """A tensor's layout in a graph, for a batch of which the shape is known."""

    build: Builder
    layout: Layout
    shape: Shape

    @property
    def _apart(self) -> Shape:
        return self.layout.split(self.shape, -1)

    @property
    def _order(self) -> list[int]:
        place = self.layout.place
        return [place, *(a for a in range(len(self._apart)) if a != place)]

    @property
    def moves(self) -> bool:
        """Whether anything has to be moved."""
        return self.layout != FIRST

    def in_front(self, samples: Dim) -> Shape:
        """The shape with that many samples in front."""
        apart = self.layout.split(self.shape, samples)
        return tuple(apart[axis] for axis in self._order)

    def front(self, value: ir.Value) -> ir.Value:
        """The value with the samples in front, see `Layout.front`."""
        found = value
        if len(self._apart) != len(self.shape):
            found = self.build.op("Reshape", found, self.build.integers([int(n or 0) for n in self._apart]))
        if self.layout.place:
            found = self.build.op("Transpose", found, perm=self._order)
        found.type = value.type
        return found

    def back(self, value: ir.Value) -> ir.Value:
        """The reverse of `front`."""
        found = value
        if self.layout.place:
            found = self.build.op("Transpose", found, perm=np.argsort(self._order).tolist())
        if len(self._apart) != len(self.shape):
            whole = [-1 if axis == self.layout.axis else int(n or 0) for axis, n in enumerate(self.shape)]
            found = self.build.op("Reshape", found, self.build.integers(whole))
        found.type = value.type
        return found


@dataclass(frozen=True)
class View:
    """A site's tensor with the samples in front, as the values are that its methods take.

    Attributes
    ----------
    whole
        Shape of the tensor as it is in the network, for a batch of so many samples.
    """

    build: Builder
    site: Site
    whole: Shape
    samples: int

    @cached_property
    def turned(self) -> Turned:
        """What brings the samples to the front."""
        return Turned(self.build, layout_of(self.site.layout, self.whole, self.samples, self.site.tensor), self.whole)

    @cached_property
    def shape(self) -> Shape:
        """Shape with the samples in front."""
        size = self.whole[self.site.layout.axis]
        return self.turned.in_front(size if self.turned.layout.alone else self.samples)

    @cached_property
    def axis(self) -> int:
        """Axis of the channels."""
        return self.turned.layout.channel(self.site.axis)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def positions(self) -> list[int]:
        """Axes of positions: neither samples, which axis 0 counts, nor channels."""
        return [a for a in range(1, self.rank) if a != self.axis]

    @property
    def places(self) -> int | None:
        """Positions per sample; None if not known before the graph runs."""
        sizes = [self.shape[a] for a in self.positions]
        return None if any(not isinstance(d, int) for d in sizes) else math.prod(int(d or 0) for d in sizes)

    @property
    def steady(self) -> bool:
        """Whether axis 0 counts the samples, and each has the same number of positions."""
        return self.shape[0] == self.samples and self.places is not None

    @property
    def image(self) -> bool:
        """Whether positions are summed by pooling.

        onnxruntime keeps images in a blocked layout of its own, which pooling, products of equal shapes and normalisation
        take as it is; every other operator costs a conversion.
        """
        return self.rank == 4 and self.axis == 1 and self.steady

    @property
    def factor(self) -> float:
        """Sum over positions, in units of what `over_positions` gives."""
        return float(self.places or 1) if self.image else 1.0

    def over_positions(self, value: ir.Value) -> ir.Value:
        """[samples, channels], of an image [samples, channels, 1, 1]: the sum over positions, divided by `factor`."""
        if self.image:
            return self.build.op("GlobalAveragePool", value)
        return self.build.reduce("ReduceSum", value, self.positions, keepdims=False) if self.positions else value

    def less(self, value: ir.Value, centre: npt.NDArray[np.float32]) -> ir.Value:
        """The value less a number per channel."""
        build, channels = self.build, len(centre)
        if not centre.any():
            return value
        if self.image:
            zeros, ones = (build.constant(np.full(channels, number), np.float32) for number in (0.0, 1.0))
            shift = build.constant(-centre, np.float32)
            return build.op("BatchNormalization", value, ones, shift, zeros, ones, epsilon=0.0)
        return build.op("Sub", value, build.constant(centre.reshape([-1] + [1] * (self.rank - 1 - self.axis)), np.float32))

    def largest(self, value: ir.Value) -> ir.Value:
        """[samples, channels], of an image [samples, channels, 1, 1]: the largest over positions."""
        if self.image:
            return self.build.op("GlobalMaxPool", value)
        return self.build.reduce("ReduceMax", value, self.positions, keepdims=False) if self.positions else value

    def largest_negated(self, value: ir.Value) -> ir.Value:
        """The same of the negated value."""
        build = self.build
        if self.image:
            zeros, ones = (build.constant(np.full(self.site.size, number), np.float32) for number in (0.0, 1.0))
            less = build.constant(np.full(self.site.size, -1.0), np.float32)
            return build.op("GlobalMaxPool", build.op("BatchNormalization", value, less, zeros, zeros, ones, epsilon=0.0))
        smallest = build.reduce("ReduceMin", value, self.positions, keepdims=False) if self.positions else value
        return build.op("Neg", smallest)

    def rows(self, value: ir.Value) -> ir.Value:
        """[observations, channels]."""
        axis = self.axis
        if axis != self.rank - 1:
            value = self.build.op("Transpose", value, perm=[a for a in range(self.rank) if a != axis] + [axis])
        return value if self.rank == 2 else self.build.op("Reshape", value, self.build.integers([-1, self.site.size]))
