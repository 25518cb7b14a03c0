"""Fitting a reader's weights to what the dense reader gives, on features of a network compiled in part.

A retained feature h of the network under interchange is, with probability p, the dense value o of another sample, and
else the value e that it has in the network as compiled so far; the dense reader's own input is o or d likewise. Given the
samples,

    E h = a = (1−p) e + p o,        Var h = p(1−p) (e−o)(e−o)ᵀ within a unit,
    E t = W_Kᵀ ((1−p) d + p o) + W_Pᵀ d_P,      Cov(t, h) = p(1−p) W_Kᵀ (d−o)(e−o)ᵀ within a unit,

t the dense reader's output, K the retained and P the replaced channels. Weights of least squared error from the sums H of
E h hᵀ and T of E t hᵀ are, near given weights W₀,

    W = W₀ + (T − W₀ H) (H + λ diag H)⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.calibration.statistics import Window
from mscompile.calibration.view import layout_of
from mscompile.calibration.windows import ROWS_PER_FEATURE, through_marks, window_name, window_weight
from mscompile.network.layout import FIRST
from mscompile.network.scm import Reader, Site
from mscompile.operators import IntArray
from mscompile.planning.plan import SitePlan, WindowPlan
from mscompile.planning.replacements import stabilise

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares λ tried; beyond 1 little of the change is left."""
MIDDLE = 2
"""Number of the one that is tried first."""
PAYS = 0.99
"""Share of the error of W₀ on data held out above which it stays: below a percent, new weights are noise."""


@dataclass(frozen=True)
class Target:
    """A reader of a planned site.

    Attributes
    ----------
    weight
        [channels, taps, outputs]: the dense reader's.
    centre
        [channels]: subtracted from the features, so that float32 products keep what varies.
    """

    site: Site
    reader: Reader
    window: Window
    planned: SitePlan
    centre: Array

    @property
    def weight(self) -> Array:
        """[channels, taps, outputs]: the dense reader's weight."""
        weight = window_weight(self.site, self.reader, self.window)
        return weight.reshape(self.site.size, self.window.taps, -1)

    @property
    def features(self) -> int:
        """Features of the retained channels, marks included."""
        return len(self.planned.kept) * self.window.taps + self.window.marks

    def weights(self) -> Array:
        """[features, outputs]: the weights of the plan, on centred features and marks."""
        window, planned, weight = self.window, self.planned, self.weight
        given = next((w for w in planned.windows if w.reader == window_name(self.reader)), None)
        if given is not None:
            columns, response = given.columns.astype(np.float64), given.response.astype(np.float64)
        else:
            lost = weight[planned.replaced]
            columns = weight[planned.kept]
            if planned.affine is not None:
                columns = columns + np.tensordot(planned.affine.T.astype(np.float64), lost, 1)
            response = self._on_marks(np.tensordot(planned.constants.astype(np.float64), lost, 1))
        response = response + self._on_marks(np.tensordot(self.centre[planned.kept], columns, 1))
        response = response - through_marks(window, self.centre, weight)
        return np.concatenate([columns.reshape(-1, weight.shape[2]), response])

    def plan(self, weights: Array) -> WindowPlan:
        """The reverse of `weights`: a plan for the reader."""
        retained, taps = len(self.planned.kept), self.window.taps
        columns = weights[: retained * taps].reshape(retained, taps, -1)
        response = weights[retained * taps :] + through_marks(self.window, self.centre, self.weight)
        response = response - self._on_marks(np.tensordot(self.centre[self.planned.kept], columns, 1))
        places = None
        if not self.window.kernel:
            places = np.argsort(self.reader.index, kind="stable").reshape(self.site.size, -1)[self.planned.kept]
        return WindowPlan(
            reader=window_name(self.reader),
            places=places,
            columns=columns.astype(np.float32),
            response=response.astype(np.float32),
        )

    def _on_marks(self, by_tap: Array) -> Array:
        return by_tap if self.window.marks == self.window.taps else by_tap.sum(axis=0, keepdims=True)

    def rows(
        self, arrays: Sequence[npt.NDArray[np.generic]], count: int, samples: int, rng: np.random.Generator
    ) -> tuple[list[Rows], Rows]:
        """What the reader sees in several tensors of `count` samples, at the same random places of each.

        Returns
        -------
        list of [samples, places, channels, taps], and [places, marks]
            Centred features, zero in the padding; and the marks. As many places as make about `ROWS_PER_FEATURE` rows per
            feature over `samples` samples.
        """
        wanted = -(-ROWS_PER_FEATURE * self.features // samples)
        layout = layout_of(self.reader.layout or FIRST, arrays[0].shape, count, self.reader.data)
        count = arrays[0].shape[layout.axis] // math.prod((*layout.parts[0], *layout.parts[1]))
        if self.window.kernel:
            seen, marks = self._patches(arrays, wanted, rng)
            parted = [layout.front(one, count).reshape(count, -1, *one.shape[2:]) for one in seen]
            return parted, np.tile(marks, (len(seen[0]) // count, 1))
        order, axis = np.argsort(self.reader.index, kind="stable"), layout.channel(self.reader.data_axis)
        flat = [np.moveaxis(layout.front(a, count), axis, -1).reshape(count, -1, len(order)) for a in arrays]
        chosen = _places(flat[0].shape[1], wanted, rng)
        shape = (len(flat[0]), len(chosen), self.site.size, self.window.taps)
        seen = [
            (a[:, chosen][:, :, order].reshape(shape) - self.centre[:, None].astype(np.float32)).astype(np.float32)
            for a in flat
        ]
        return seen, np.ones((len(chosen), 1), np.float32)

    def _patches(
        self, arrays: Sequence[npt.NDArray[np.generic]], wanted: int, rng: np.random.Generator
    ) -> tuple[list[Rows], Rows]:
        window, rank = self.window, len(self.window.kernel)
        pads = [(window.pads[i], window.pads[rank + i]) for i in range(rank)]
        extents = [
            (n + sum(pad) - d * (k - 1) - 1) // s + 1
            for n, pad, k, s, d in zip(
                arrays[0].shape[2:], pads, window.kernel, window.strides, window.dilations, strict=True
            )
        ]
        chosen = np.stack(np.unravel_index(_places(int(np.prod(extents)), wanted, rng), extents))
        taps = np.stack(np.unravel_index(np.arange(window.taps), window.kernel))
        at = chosen[:, :, None] * np.array(window.strides)[:, None, None]
        at = tuple(at + taps[:, None, :] * np.array(window.dilations)[:, None, None])
        centre = self.centre.astype(np.float32).reshape((-1,) + (1,) * rank)
        seen = []
        for array in arrays:
            padded = np.pad(array.astype(np.float32) - centre, [(0, 0), (0, 0), *pads])
            seen.append(np.ascontiguousarray(padded[(slice(None), slice(None), *at)].transpose(0, 2, 1, 3)))
        inside = np.pad(np.ones(arrays[0].shape[2:], np.float32), pads)[at]
        return seen, inside if window.marks == window.taps else np.ones((inside.shape[0], 1), np.float32)


def _places(count: int, wanted: int, rng: np.random.Generator) -> IntArray:
    return np.arange(count) if wanted >= count else np.sort(rng.choice(count, wanted, replace=False))


@dataclass
class Sums:
    """Second moments of a reader's features and its target under interchange with probability `swap`."""

    target: Target
    swap: float
    features: Array = field(init=False)
    """[features, features]: H."""
    crossed: Array = field(init=False)
    """[outputs, features]: T."""
    spread: float = 0.0
    """Sum of ‖t‖²."""

    def __post_init__(self) -> None:
        """Start from nothing."""
        size = self.target.features
        self.features = np.zeros((size, size))
        self.crossed = np.zeros((self.target.weight.shape[2], size))

    def add(self, compiled: Rows, dense: Rows, marks: Rows) -> None:
        """Add a batch, [samples, places, channels, taps] each; the sample before is each one's source."""
        kept, replaced, p = self.target.planned.kept, self.target.planned.replaced, self.swap
        weight = self.target.weight.astype(np.float32)
        retained, lost = weight[kept], weight[replaced]
        e, d = compiled[:, :, kept], dense[:, :, kept]
        o = np.roll(d, 1, axis=0)
        rows, outputs = e.shape[0] * e.shape[1], weight.shape[2]
        a = ((1 - p) * e + p * o).reshape(rows, -1)
        a = np.concatenate([a, np.broadcast_to(marks, (e.shape[0], *marks.shape)).reshape(rows, -1)], axis=1)
        seen = ((1 - p) * d + p * o).reshape(rows, -1)
        t = seen @ retained.reshape(-1, outputs) + dense[:, :, replaced].reshape(rows, -1) @ lost.reshape(-1, outputs)
        self.features += a.T @ a
        self.crossed += t.T @ a
        self.spread += float(np.square(t, dtype=np.float64).sum())
        if p in (0.0, 1.0):
            return
        taps, both = e.shape[3], np.float32(p * (1 - p))
        by_unit = [x.reshape(rows, len(kept), taps).transpose(1, 2, 0) for x in (e - o, d - o)]
        within = both * (by_unit[0] @ by_unit[0].transpose(0, 2, 1))
        between = both * (by_unit[1] @ by_unit[0].transpose(0, 2, 1))
        for i in range(len(kept)):
            own = slice(i * taps, (i + 1) * taps)
            self.features[own, own] += within[i]
            self.crossed[:, own] += retained[i].T @ between[i]
        dense_within = both * (by_unit[1] @ by_unit[1].transpose(0, 2, 1))
        self.spread += float(np.einsum("kto,kts,kso->", retained, dense_within, retained, optimize=True))

    def error(self, weights: Array) -> float:
        """Sum of ‖t − Wᵀ h‖²."""
        fitted = self.features @ weights
        return self.spread - 2.0 * float(np.sum(self.crossed.T * weights)) + float(np.sum(weights * fitted))

    def solver(self, start: Array) -> Callable[[float], Array]:
        """Weights of least squares near `start`, [features, outputs], by ridge."""
        h = self.features.copy()
        stabilise(h)
        # Scaled to a unit diagonal: features of very different sizes are no ill-conditioning.
        scale = 1.0 / np.sqrt(np.diagonal(h))[:, None]
        h *= scale
        h *= scale.T
        lost = scale * (self.crossed.T - self.features @ start)

        def solve(ridge: float) -> Array:
            raised = h.copy()
            raised[np.diag_indices_from(raised)] += ridge
            factor = scipy.linalg.cho_factor(raised, lower=True, overwrite_a=True, check_finite=False)
            found: Array = start + scale * scipy.linalg.cho_solve(factor, lost, check_finite=False)
            return found

        return solve


def refit(halves: tuple[Sums, Sums]) -> WindowPlan | None:
    """New weights from two halves of the data, at the ridge that does best where each is fitted on the other.

    None where the weights of the plan do about as well.
    """
    target = halves[0].target
    start = target.weights()
    solvers = [half.solver(start) for half in halves]

    @cache
    def error(ridge: float) -> float:
        return sum(half.error(solve(ridge)) for half, solve in zip(halves, solvers[::-1], strict=True))

    best = RIDGES[MIDDLE]
    # From the first on in the direction in which it falls: too little regularisation on one side, too much on the other.
    for others in (RIDGES[MIDDLE + 1 :], RIDGES[:MIDDLE][::-1]):
        for ridge in others:
            if not error(ridge) < error(best):
                break
            best = ridge
        if best != RIDGES[MIDDLE]:
            break
    if not error(best) < PAYS * sum(half.error(start) for half in halves):
        return None
    whole = Sums(target, halves[0].swap)
    whole.features = halves[0].features + halves[1].features
    whole.crossed = halves[0].crossed + halves[1].crossed
    return target.plan(whole.solver(start)(best))
