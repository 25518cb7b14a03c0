"""Calibration statistics: what is known of a network from data, as sums that add up.

Statistics of disjoint data add: ``a + b`` is what one pass over both would have given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mscompile.runs.shelf import Shelf

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """First and second moments of a site's channels, positions pooled.

    Attributes
    ----------
    count
        Observations: samples times positions.
    mean
        [channels], in the units of the activation.
    squares
        [channels]: sum of squared deviations from the mean.
    scatter
        [channels, channels]: sum of outer products of deviations from the mean; None if not asked for.
    shared
        [channels, channels]: like `scatter`, with one factor from another sample at the same position: what all samples have
        in common there, which an interchange leaves in place. None where there are no positions, or not asked for.
    low, high
        [channels]: range observed; infinite if not asked for.
    """

    count: int
    mean: Array
    squares: Array
    scatter: Array | None
    shared: Array | None
    low: Array
    high: Array

    @property
    def covariance(self) -> Array:
        """[channels, channels], normalised by the count."""
        if self.scatter is None:
            raise ValueError("these statistics were collected without covariance")
        return self.scatter / self.count

    @property
    def common(self) -> Array:
        """[channels, channels]: covariance between different samples at the same position."""
        return np.zeros_like(self.covariance) if self.shared is None else self.shared / self.count

    @property
    def variance(self) -> Array:
        """[channels]."""
        return self.squares / self.count

    def __add__(self, other: Moments) -> Moments:
        """Moments over the union of two disjoint sets of observations (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        weight = self.count * other.count / count
        between = np.outer(shift, shift) * weight
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.squares + other.squares + shift**2 * weight,
            _merged(self.scatter, other.scatter, between),
            _merged(self.shared, other.shared, between),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


def _merged(a: Array | None, b: Array | None, between: Array) -> Array | None:
    return None if a is None or b is None else a + b + between


def _put(array: Array | None, shelf: Shelf) -> Array | None:
    return None if array is None else shelf.put(array)


@dataclass(frozen=True)
class Curvature:
    """Gauss–Newton curvature of the outputs in a site's channels.

    With λ = Jᵀv at each position, S1 = Σ_positions λ and S2 = Σ_positions λ a, the change of the outputs under
    do(a_j := c) satisfies E_v (vᵀ J δ)² = ‖J δ‖², so that its square is S1² c² − 2 S1 S2 c + S2² in expectation over v:
    all positions of a unit move together, and the formula is exact to second order.

    Attributes
    ----------
    samples
        Samples summed over.
    s11, s12, s22
        [channels]: sums of S1², S1 S2 and S2², over samples and averaged over random (summed over unit) seeds.
    g1, g2
        [channels]: sums of Σ_positions g and Σ_positions g a, g the gradient of a loss; zero for objectives without one.
    second
        [channels, channels]: sum of λ λᵀ over samples and positions, over seeds like the others; None if not asked for.
    """

    samples: int
    s11: Array
    s12: Array
    s22: Array
    g1: Array
    g2: Array
    second: Array | None

    def __add__(self, other: Curvature) -> Curvature:
        second = None if self.second is None or other.second is None else self.second + other.second
        return Curvature(
            self.samples + other.samples,
            self.s11 + other.s11,
            self.s12 + other.s12,
            self.s22 + other.s22,
            self.g1 + other.g1,
            self.g2 + other.g2,
            second,
        )


@dataclass(frozen=True)
class Window:
    """What a reader sees at once.

    Attributes
    ----------
    channels
        Channels of the site.
    taps
        Features per channel: places in a convolution's window, or positions flattened into a product's input.
    kernel, strides, dilations, pads
        Of a convolution, per position axis (pads: begins, then ends); empty for a product.
    """

    channels: int
    taps: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @property
    def marks(self) -> int:
        """Features that are 1 inside the map: one per tap where there is padding, else a single constant."""
        return self.taps if any(self.pads) else 1

    @property
    def features(self) -> int:
        """All features: channel-major, then the marks."""
        return self.channels * self.taps + self.marks


@dataclass(frozen=True)
class WindowMoments:
    """Second moments of a reader's features, channels less a fixed centre.

    Attributes
    ----------
    window
        The window.
    centre
        [channels]: what was subtracted inside the map.
    count
        Windows observed.
    products
        [features, features]: sum of z zᵀ.
    shared
        [features, features]: the same with one factor from another sample's window at the same place; None if not asked for.
    """

    window: Window
    centre: Array
    count: int
    products: Array
    shared: Array | None

    def __add__(self, other: WindowMoments) -> WindowMoments:
        """Moments over both; `other` is brought to the same centre."""
        moved = other.recentred(self.centre)
        shared = None if self.shared is None or moved.shared is None else self.shared + moved.shared
        return WindowMoments(self.window, self.centre, self.count + other.count, self.products + moved.products, shared)

    def recentred(self, centre: Array) -> WindowMoments:
        """The same moments about another centre: each channel's features change by a multiple of the marks."""
        if np.array_equal(centre, self.centre):
            return self
        shift = np.repeat(self.centre - centre, self.window.taps)
        marks = np.tile(np.arange(self.window.marks), self.window.channels * self.window.taps // self.window.marks)
        change = np.eye(self.window.features)
        change[np.arange(len(shift)), len(shift) + marks] = shift
        shared = None if self.shared is None else change @ self.shared @ change.T
        return WindowMoments(self.window, centre, self.count, change @ self.products @ change.T, shared)


@dataclass(frozen=True)
class Scale:
    """How the second order holds at a site, as measured (`mscompile.calibration.anchors`).

    Attributes
    ----------
    factor
        Measured over predicted risk.
    step
        Constants are the means, plus so much of the way to the optima of the quadratic.
    """

    factor: float = 1.0
    step: float = 1.0


@dataclass(frozen=True)
class Statistics:
    """What calibration found.

    Attributes
    ----------
    moments
        By site tensor.
    curvature
        By site tensor, where the reverse pass reaches.
    refused
        By site tensor: why it has no curvature.
    windows
        By reader, for those fitted by their window.
    samples
        Samples seen.
    data_sha256
        Digests of the data sets seen, in order.
    onnxruntime
        Version that ran.
    metric
        What the curvature is of, as in `Measure`.
    outputs
        Weight by name of the outputs that it is of.
    scales
        By site tensor, where units were measured.
    """

    moments: Mapping[str, Moments]
    curvature: Mapping[str, Curvature]
    refused: Mapping[str, str]
    windows: Mapping[str, WindowMoments]
    samples: int
    data_sha256: tuple[str, ...]
    onnxruntime: str
    metric: str = "none"
    outputs: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)

    def on(self, shelf: Shelf) -> Statistics:
        """The same with their matrices on a shelf."""
        return replace(
            self,
            moments={
                t: replace(m, scatter=_put(m.scatter, shelf), shared=_put(m.shared, shelf)) for t, m in self.moments.items()
            },
            curvature={t: replace(c, second=_put(c.second, shelf)) for t, c in self.curvature.items()},
            windows={
                r: replace(w, products=shelf.put(w.products), shared=_put(w.shared, shelf)) for r, w in self.windows.items()
            },
        )

    def __add__(self, other: Statistics) -> Statistics:
        if self.moments.keys() != other.moments.keys() or self.curvature.keys() != other.curvature.keys():
            raise ValueError("statistics of different sites do not add up")
        if (self.metric, self.outputs) != (other.metric, other.outputs):
            raise ValueError("curvatures of different outputs, or of another kind, do not add up")
        return Statistics(
            {tensor: self.moments[tensor] + other.moments[tensor] for tensor in self.moments},
            {tensor: self.curvature[tensor] + other.curvature[tensor] for tensor in self.curvature},
            self.refused,
            {name: self.windows[name] + other.windows[name] for name in self.windows},
            self.samples + other.samples,
            self.data_sha256 + other.data_sha256,
            self.onnxruntime,
            self.metric,
            self.outputs,
            {**other.scales, **self.scales},
        )
