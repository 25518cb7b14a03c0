"""Window replacement: a replaced channel, as one reader sees it, from all retained channels inside the reader's window.

A convolution sees a k×k window at once, a matrix product behind a flattened map sees all positions. Predicting a replaced
channel from the retained ones at the same position alone wastes what stands beside it. The reader sees a vector of features
z — channel k at tap t — and is linear in it, so least squares over the window is affine replacement once more, with features
in place of channels: from the features' second moments alone,

    W' = W_K + W_P B,    B = ((1−p) M_PK + p X_PK) [q M_KK + (1−q) X_KK, M_KK within a unit]⁻¹,

for interchange with swap probability p, q = (1−p)² + p², X the moments between different samples at the same place: a unit
is swapped at all its taps together, so that products of its own taps stay whole. Zero padding is part of the features: each
tap has a further feature that is 1 inside the map and 0 in the padding, whose weights become those of a carrier channel (see
`mscompile.planning.constants`), and borders are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from mscompile.calibration.statistics import Window, WindowMoments
from mscompile.network.scm import Reader, Site
from mscompile.operators import IntArray, Shape
from mscompile.operators.backward import Builder
from mscompile.planning.replacements import stabilise

Array = npt.NDArray[np.float64]

FEATURES = 4096
"""Features up to which a reader is fitted by its window: their second moments take 128 MB, their solution seconds."""
FEWEST_ROWS = 4
"""Windows per feature below which a reader is not fitted by its window: least squares would learn the calibration data."""
OLDEST = 11
"""Opset from which padding and slicing take operands."""
ROWS_PER_FEATURE = 48
"""Windows observed per feature that are aimed at; a map has many more, alike among neighbours, and they are thinned."""


def window_of(site: Site, reader: Reader, opset: int) -> Window | None:
    """The window of a reader that sees more than one position at a time; None where it has none, or too many features."""
    window = view_of(site, reader) if reader.layout is not None and reader.layout.first else None
    return window if window is not None and window.taps > 1 and window.features <= FEATURES and opset >= OLDEST else None


def view_of(site: Site, reader: Reader) -> Window | None:
    """What a reader sees at once, be it one position; None where it is neither a product with a matrix nor a convolution."""
    if reader.groups > 1:
        return None
    taps, linear = len(reader.index) // site.size, reader.signature.linear
    tensor = reader.weight.const_value
    assert linear is not None
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if len(shape) == 2 and linear.weight == 1 and (taps == 1 or reader.data_axis == 1):
        return Window(site.size, taps)
    kernel = shape[2:]
    attributes = reader.node.attributes
    if reader.node.op_type != "Conv" or taps > 1 or site.axis != 1 or reader.data != site.tensor:
        return None  # or positions were moved on the way
    if "auto_pad" in attributes and attributes["auto_pad"].as_string() not in ("NOTSET", "VALID"):
        return None

    def ints(name: str, default: Sequence[int]) -> tuple[int, ...]:
        return tuple(attributes[name].as_ints()) if name in attributes else tuple(default)

    ones = [1] * len(kernel)
    pads = ints("pads", [0] * 2 * len(kernel))
    return Window(site.size, math.prod(kernel), kernel, ints("strides", ones), ints("dilations", ones), pads)


def window_name(reader: Reader) -> str:
    """Name of a reader in statistics and plans: that of its output, which is unique."""
    return reader.node.outputs[0].name or ""


def window_weight(site: Site, reader: Reader, window: Window) -> Array:
    """[channels, taps, outputs]: a reader's weight in float64."""
    columns = reader.columns(site.size)
    if not window.kernel:
        return columns
    return np.ascontiguousarray(columns.reshape(site.size, -1, window.taps).transpose(0, 2, 1))


@dataclass(frozen=True)
class Refit:
    """New weights of one reader over retained channels.

    Attributes
    ----------
    columns
        [retained, taps · rest]: weight on each feature of the retained channels; `rest` are the weight's other axes.
    response
        [taps · rest]: weight on the marks of a padded window; [rest] for one without padding, where it is a bias.
    """

    columns: Array
    response: Array


def determined(moments: WindowMoments, retained: int) -> bool:
    """Whether enough windows were seen for a fit on `retained` channels to hold beyond them."""
    return moments.count >= FEWEST_ROWS * (retained * moments.window.taps + moments.window.marks)


def fit_window(moments: WindowMoments, weight: Array, kept: IntArray, replaced: IntArray, swap: float) -> Refit:
    """Fit a reader's weights over the retained channels of its window.

    Parameters
    ----------
    weight
        [channels, taps, outputs]: the dense reader's weight.
    swap
        Interchange probability p.
    """
    window, m = moments.window, moments.products / moments.count
    x = m if moments.shared is None else 0.5 * (moments.shared + moments.shared.T) / moments.count
    taps, both = window.taps, (1 - swap) ** 2 + swap**2
    spots = np.arange(window.channels * taps).reshape(window.channels, taps)
    k, p = spots[kept].ravel(), spots[replaced].ravel()
    marks = np.arange(window.channels * taps, window.features)
    within = both * m[np.ix_(k, k)] + (1 - both) * x[np.ix_(k, k)]
    for i in range(len(kept)):  # a unit's taps are swapped together
        own = slice(i * taps, (i + 1) * taps)
        within[own, own] = m[np.ix_(k[own], k[own])]
    h = np.block([[within, m[np.ix_(k, marks)]], [m[np.ix_(marks, k)], m[np.ix_(marks, marks)]]])
    cross = np.hstack([((1 - swap) * m + swap * x)[np.ix_(p, k)], m[np.ix_(p, marks)]])
    flat = weight.reshape(-1, weight.shape[2])
    stabilise(h)
    # Products of float32 sums may leave a tiny negative eigenvalue: an indefinite solver copes where Cholesky would stop.
    gained = scipy.linalg.solve(h, cross.T @ flat[p], assume_a="sym")
    columns = flat[k] + gained[: len(k)]
    on_marks = gained[len(k) :] + through_marks(window, moments.centre, weight)
    by_tap = (moments.centre[kept, None, None] * columns.reshape(len(kept), taps, -1)).sum(axis=0)
    on_marks = on_marks - (by_tap if window.marks == taps else by_tap.sum(axis=0, keepdims=True))
    return Refit(columns.reshape(len(kept), taps, -1), on_marks)


def through_marks(window: Window, centre: Array, weight: Array) -> Array:
    """[marks, outputs]: what the centres of all channels contribute to the dense reader."""
    by_tap: Array = (centre[:, None, None] * weight).sum(axis=0)
    return by_tap if window.marks == window.taps else by_tap.sum(axis=0, keepdims=True)


def features(build: Builder, window: Window, centred: ir.Value, thin: int, offset: ir.Value | None) -> ir.Value:
    """[samples, positions …, features] of a batch, as nodes.

    Parameters
    ----------
    centred
        The site's tensor less the centre; for a product its input, less the centre, channel-major.
    thin, offset
        Every `thin`-th window per position axis, from a random `offset` on, [position axes] int64.
    """
    if not window.kernel:
        one = build.constant(np.ones((1, 1)), np.float32)
        ones = build.op("Expand", one, _rows_of(build, centred))
        return build.op("Concat", centred, ones, axis=1)
    return patches(build, window, padded(build, window, centred, offset), thin)


def padded(build: Builder, window: Window, centred: ir.Value, offset: ir.Value | None) -> ir.Value:
    """[samples, channels + 1, positions …]: what a convolution's windows are taken from, the last channel 1 in the map."""
    rank = len(window.kernel)
    shape = build.op("Shape", centred)
    single = build.op("Concat", build.op("Slice", shape, build.integers([0]), build.integers([1])), build.integers([1]),
                      build.op("Slice", shape, build.integers([2]), build.integers([2 + rank])), axis=0)  # fmt: skip
    inside = build.op("Expand", build.constant(1.0, np.float32), single)
    stacked = build.op("Concat", centred, inside, axis=1)
    found = build.op("Pad", stacked, build.integers([0, 0, *window.pads[:rank], 0, 0, *window.pads[rank:]]))
    if offset is None:
        return found
    starts = build.op("Mul", offset, build.integers(list(window.strides)))
    ends = build.integers([np.iinfo(np.int64).max] * rank)
    return build.op("Slice", found, starts, ends, build.integers(list(range(2, 2 + rank))))


def patches(build: Builder, window: Window, padded: ir.Value, thin: int) -> ir.Value:
    """[samples, positions …, features]: every `thin`-th window of a padded map."""
    rank, channels = len(window.kernel), window.channels + 1
    kernel = np.zeros((channels * window.taps, 1, window.taps), dtype=np.float32)
    kernel[np.arange(channels * window.taps), 0, np.tile(np.arange(window.taps), channels)] = 1.0
    filters = build.constant(kernel.reshape(channels * window.taps, 1, *window.kernel), np.float32)
    seen = build.op("Conv", padded, filters, group=channels, strides=[thin * s for s in window.strides],
                    dilations=list(window.dilations))  # fmt: skip
    rows = build.op("Transpose", seen, perm=[0, *range(2, 2 + rank), 1])
    if window.marks == window.taps:
        return rows
    return build.op("Slice", rows, build.integers([0]), build.integers([window.features]), build.integers([-1]))


def _rows_of(build: Builder, matrix: ir.Value) -> ir.Value:
    """Shape [rows, 1] of a matrix."""
    rows = build.op("Slice", build.op("Shape", matrix), build.integers([0]), build.integers([1]))
    return build.op("Concat", rows, build.integers([1]), axis=0)


def extents(window: Window, shape: Shape) -> tuple[int, ...] | None:
    """Windows per position axis of a map; None where that is not known."""
    if not window.kernel or not all(isinstance(d, int) for d in shape[2:]):
        return None
    found = []
    for axis, (k, s, d) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        size = int(shape[2 + axis] or 0) + window.pads[axis] + window.pads[len(window.kernel) + axis]
        found.append(max((size - d * (k - 1) - 1) // s + 1, 1))
    return tuple(found)


def thinning(window: Window, shape: Shape, samples: int, batches: int) -> int:
    """Step between observed windows per position axis that leaves about `ROWS_PER_FEATURE` windows per feature.

    Each batch observes from another offset; the step is small enough for the batches to go through all offsets.
    """
    places = extents(window, shape)
    if places is None:
        return 1
    wanted = ROWS_PER_FEATURE * window.features
    step = int((samples * math.prod(places) / wanted) ** (1 / len(places)))
    return max(1, min(step, int(batches ** (1 / len(places))), *places))


def offset_of(window: Window, thin: int, number: int, seed: int) -> IntArray:
    """[position axes]: first window that batch `number` observes; consecutive batches go through all offsets."""
    count = thin ** len(window.kernel)
    order = np.random.default_rng([seed, number // count]).permutation(count)
    return np.array(np.unravel_index(order[number % count], (thin,) * len(window.kernel)), dtype=np.int64)
