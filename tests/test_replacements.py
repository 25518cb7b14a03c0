"""Affine replacements against least squares and simulated interchanges; sums of statistics against one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mscompile.calibration.statistics import Curvature, Moments, Statistics, Window, WindowMoments
from mscompile.calibration.windows import FEWEST_ROWS, determined, fit_window
from mscompile.planning.replacements import PARENTS, RIDGE, Factor, Fit, fit_affine, fit_parents

Array = npt.NDArray[np.float64]

RIDGES = 100 * RIDGE
"""Absolute, for coefficients of order one: the ridge times the condition of the covariances used here, below 100."""
DRAWS = 400_000
SIMULATED = 5 * (3.0 / DRAWS) ** 0.5
"""Five standard errors of a simulated coefficient, whose residual and inverse variance are of order one."""
ONE_PASS = 1e-12
"""Relative; both sides are float64 sums of the same numbers."""


def moments_of(rows: Array, other: Array | None = None) -> Moments:
    """Moments of [observations, channels]; `other` are the rows that stand at the same positions in other samples."""
    mean = rows.mean(axis=0)
    centred = rows - mean
    shared = None if other is None else 0.5 * (centred.T @ (other - mean) + (other - mean).T @ centred)
    low, high = rows.min(axis=0), rows.max(axis=0)
    return Moments(len(rows), mean, np.square(centred).sum(axis=0), centred.T @ centred, shared, low, high)


def correlated(rng: np.random.Generator, count: int, channels: int) -> Array:
    mixing = np.eye(channels) + rng.standard_normal((channels, channels)) / channels**0.5 / 2
    return rng.standard_normal((count, channels)) @ mixing.T + rng.standard_normal(channels)


def least_squares(x: Array, y: Array) -> tuple[Array, Array]:
    """Intercept [outputs] and matrix [outputs, inputs]."""
    found = np.linalg.lstsq(np.hstack([np.ones((len(x), 1)), x]), y, rcond=None)[0]
    return found[0], found[1:].T


def split(rng: np.random.Generator, channels: int, keep: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    order = rng.permutation(channels)
    return np.sort(order[:keep]), np.sort(order[keep:])


def close(found: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("swap", [0.0, 0.1, 1.0])
def test_one_factor_gives_the_fits_of_an_order(swap: float, positions: int) -> None:
    rng = np.random.default_rng(0)
    moments = moments_of(*(correlated(rng, 400, 12) for _ in range(positions)))
    assert (moments.shared is None) == (positions == 1)
    order = rng.permutation(12)
    factor = Factor.make(moments, swap, order)
    assert factor is not None
    for count in (1, 5, 11):
        kept, replaced = np.sort(order[:count]), np.sort(order[count:])
        assert factor.fits(kept, swap)
        assert not factor.fits(kept, 0.5)
        found, wanted = factor.fit(kept, replaced), fit_affine(moments, kept, replaced, swap)
        close(found.matrix, wanted.matrix, RIDGES)
        close(found.constants, wanted.constants, RIDGES)
    assert not factor.fits(np.sort(order[1:6]), swap)


# --- channels at one position -----------------------------------------------------------------------------------------


def test_without_interchange_it_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    rows = correlated(rng, 900, 12)
    kept, replaced = split(rng, 12, 7)
    fit = fit_affine(moments_of(rows), kept, replaced, 0.0)
    constants, matrix = least_squares(rows[:, kept], rows[:, replaced])
    close(fit.matrix, matrix, RIDGES)
    close(fit.constants, constants, RIDGES)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("swap", [0.3, 1.0])
def test_under_interchange_it_is_least_squares_on_swapped_units(positions: bool, swap: float) -> None:
    """Each retained unit takes, with the swap probability, its value in another sample at the same position."""
    rng, channels = np.random.default_rng(1), 8
    mixing = np.eye(channels) + 0.6 * rng.standard_normal((channels, channels)) / channels**0.5
    places = rng.standard_normal((25, channels)) * positions
    places -= places.mean(axis=0)
    common, mean = places.T @ places / len(places), rng.standard_normal(channels)
    sigma = mixing @ mixing.T + common
    inf = np.full(channels, np.inf)
    moments = Moments(1, mean, np.diagonal(sigma), sigma, common if positions else None, -inf, inf)
    kept, replaced = split(rng, channels, 5)

    at = rng.integers(len(places), size=DRAWS)
    base, source = (rng.standard_normal((DRAWS, channels)) @ mixing.T + places[at] + mean for _ in range(2))
    swapped = np.where(rng.random((DRAWS, channels)) < swap, source, base)
    constants, matrix = least_squares(swapped[:, kept], base[:, replaced])
    fit = fit_affine(moments, kept, replaced, swap)
    close(fit.matrix, matrix, SIMULATED)
    close(fit.constants, constants, 3 * SIMULATED)  # the means of five units add to its error
    apart = fit_affine(moments, kept, replaced, 0.0).matrix
    assert apart is not None
    assert np.abs(apart - matrix).max() > 5 * SIMULATED


def test_where_all_is_swapped_nothing_but_the_constant_is_left() -> None:
    rng = np.random.default_rng(2)
    moments, (kept, replaced) = moments_of(correlated(rng, 300, 9)), split(rng, 9, 4)
    fit = fit_affine(moments, kept, replaced, 1.0)
    np.testing.assert_array_equal(fit.matrix, np.zeros((5, 4)))
    np.testing.assert_array_equal(fit.constants, moments.mean[replaced])


@pytest.mark.parametrize("keep", [3, PARENTS, 20])
def test_sparse_fits_use_the_most_correlated_parents(keep: int) -> None:
    rng = np.random.default_rng(3)
    rows = correlated(rng, 2000, keep + 4)
    kept, replaced = split(rng, keep + 4, keep)
    fit = fit_parents(moments_of(rows), kept, replaced, 0.3)
    assert fit.matrix is not None
    correlation = np.abs(np.corrcoef(rows.T))
    for row, channel in enumerate(replaced):
        parents = np.argsort(-correlation[channel, kept])[:PARENTS]
        assert set(np.flatnonzero(fit.matrix[row])) == set(parents)
        constant, matrix = least_squares(rows[:, kept[parents]], rows[:, [channel]])
        close(fit.matrix[row, parents], matrix[0], RIDGES)
        close(fit.constants[row], constant[0], RIDGES)


@pytest.mark.parametrize("affine", [False, True])
def test_error_moment_is_that_of_the_errors(affine: bool) -> None:
    rng = np.random.default_rng(4)
    rows = correlated(rng, 200, 10)
    kept, replaced = split(rng, 10, 6)
    matrix = rng.standard_normal((4, 6)) if affine else None
    fit = Fit(rng.standard_normal(4), matrix)
    errors = fit.constants - rows[:, replaced] + (0.0 if matrix is None else rows[:, kept] @ matrix.T)
    moments = moments_of(rows)
    close(fit.error_moment(moments, kept, replaced), errors.T @ errors / len(rows), 1e-11)
    if matrix is None:  # without covariance errors are taken as uncorrelated
        alone = Moments(**{**vars(moments), "scatter": None})
        close(np.diagonal(fit.error_moment(alone, kept, replaced)), np.square(errors).mean(axis=0), 1e-11)


@pytest.mark.parametrize("fit", [fit_affine, fit_parents])
def test_dependent_and_constant_channels_do_no_harm(fit: Any) -> None:
    rng = np.random.default_rng(5)
    rows = correlated(rng, 500, 6)
    rows = np.hstack([rows, rows[:, :2], np.full((500, 1), 3.0), np.zeros((500, 1))])
    kept, replaced = np.array([0, 1, 2, 6, 8, 9]), np.array([3, 4, 5, 7])
    found = fit(moments_of(rows), kept, replaced, 0.0)
    assert np.isfinite(found.matrix).all()
    assert np.abs(found.matrix).max() < 10
    residual = found.constants + rows[:, kept] @ found.matrix.T - rows[:, replaced]
    constants, matrix = least_squares(rows[:, [0, 1, 2]], rows[:, replaced])
    best = constants + rows[:, [0, 1, 2]] @ matrix.T - rows[:, replaced]
    close(np.square(residual).mean(axis=0), np.square(best).mean(axis=0), RIDGES)


# --- windows ----------------------------------------------------------------------------------------------------------

PADDED = Window(5, 9, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
WINDOWS: Mapping[str, Window] = {
    "padded": PADDED,
    "one-sided": Window(5, 6, (2, 3), (1, 2), (1, 1), (1, 0, 0, 1)),
    "dilated": Window(5, 4, (2, 2), (2, 1), (1, 2), (0, 0, 0, 0)),
    "line": Window(5, 3, (3,), (1,), (1,), (1, 1)),
    "product": Window(5, 6),
}


def windows_of(window: Window, maps: Array) -> tuple[Array, Array]:
    """Raw features [windows, channels · taps] and marks [windows, marks] of maps [samples, channels, …]."""
    if not window.kernel:
        return maps.reshape(len(maps), -1), np.ones((len(maps), 1))
    rank = len(window.kernel)
    pads = [(0, 0), (0, 0), *zip(window.pads[:rank], window.pads[rank:], strict=True)]
    stacked = np.pad(np.concatenate([maps, np.ones_like(maps[:, :1])], axis=1), pads)
    extent = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(stacked.shape[2:], window.kernel, window.strides, window.dilations, strict=True)
    ]
    taps = []
    for tap in np.ndindex(*window.kernel):
        cut = tuple(
            slice(t * d, t * d + s * (e - 1) + 1, s)
            for t, d, s, e in zip(tap, window.dilations, window.strides, extent, strict=True)
        )
        taps.append(np.moveaxis(stacked[:, :, *cut], 1, -1).reshape(-1, window.channels + 1))
    seen = np.stack(taps, axis=2)  # [windows, channels and one, taps]
    return seen[:, :-1].reshape(len(seen), -1), seen[:, -1, : window.marks]


def maps_of(rng: np.random.Generator, window: Window, count: int) -> Array:
    """Maps whose channels and neighbours are correlated."""
    extent = (7, 6)[: len(window.kernel)] if window.kernel else (window.taps,)
    noise = rng.standard_normal((count, window.channels, *extent))
    mixing = np.eye(window.channels) + 0.3 * rng.standard_normal((window.channels,) * 2)
    return np.einsum("ij,nj...->ni...", mixing, noise + 0.4 * np.roll(noise, 1, axis=-1)) + rng.standard_normal(
        (window.channels,) + (1,) * len(extent)
    )


def window_moments(window: Window, maps: Array, centre: Array) -> WindowMoments:
    raw, marks = windows_of(window, maps)
    other, _ = windows_of(window, np.roll(maps, -1, axis=0))
    inside = np.tile(marks, window.channels * window.taps // window.marks)
    z, y = (np.hstack([values - np.repeat(centre, window.taps) * inside, marks]) for values in (raw, other))
    return WindowMoments(window, centre, len(z), z.T @ z, z.T @ y)


@pytest.mark.parametrize("name", WINDOWS)
def test_readers_are_fitted_to_their_own_outputs(name: str) -> None:
    """Least squares of what the dense reader returns, on all that the compiled one sees."""
    rng, window = np.random.default_rng(6), WINDOWS[name]
    maps = maps_of(rng, window, 600)
    weight = rng.standard_normal((window.channels, window.taps, 4))
    centre = maps.mean(axis=(0, *range(2, maps.ndim))) + 0.1
    kept, replaced = np.array([0, 2, 3]), np.array([1, 4])
    refit = fit_window(window_moments(window, maps, centre), weight, kept, replaced, 0.0)
    raw, marks = windows_of(window, maps)
    seen = raw.reshape(len(raw), window.channels, window.taps)[:, kept].reshape(len(raw), -1)
    wanted = np.linalg.lstsq(np.hstack([seen, marks]), raw @ weight.reshape(-1, 4), rcond=None)[0]
    close(refit.columns, wanted[: seen.shape[1]].reshape(3, window.taps, 4), 10 * RIDGES)
    # Marks of taps that meet the border alike are the same number: what they say together is determined.
    close(marks @ refit.response, marks @ wanted[seen.shape[1] :], 10 * RIDGES)
    assert np.abs(refit.columns - weight[kept]).max() > 0.1


@pytest.mark.parametrize("swap", [0.0, 0.3])
@pytest.mark.parametrize("name", WINDOWS)
def test_where_all_stay_the_reader_stays(name: str, swap: float) -> None:
    rng, window = np.random.default_rng(7), WINDOWS[name]
    maps, weight = maps_of(rng, window, 200), rng.standard_normal((window.channels, window.taps, 4))
    moments = window_moments(window, maps, rng.standard_normal(window.channels))
    refit = fit_window(moments, weight, np.arange(5), np.arange(0), swap)
    np.testing.assert_array_equal(refit.columns, weight)
    close(refit.response, np.zeros((window.marks, 4)), 1e-12)


def test_units_are_swapped_at_all_their_taps_together() -> None:
    rng, window, swap = np.random.default_rng(8), Window(4, 2), 0.3
    mixing = np.eye(8) + 0.6 * rng.standard_normal((8, 8)) / 8**0.5
    offset, weight = rng.standard_normal(8), rng.standard_normal((4, 2, 3))
    product, other = np.eye(9), np.outer([*offset, 1.0], [*offset, 1.0])
    product[:8, :8] = mixing @ mixing.T
    product = product + other
    product[8, 8] = 1.0
    moments = WindowMoments(window, np.zeros(4), 1, product, other)
    kept, replaced = np.array([0, 1, 3]), np.array([2])
    base, source = (rng.standard_normal((DRAWS, 8)) @ mixing.T + offset for _ in range(2))
    mixed = np.where(np.repeat(rng.random((DRAWS, 4)) < swap, 2, axis=1), source, base).reshape(DRAWS, 4, 2)
    outputs = mixed[:, kept].reshape(DRAWS, -1) @ weight[kept].reshape(-1, 3)
    outputs += base.reshape(DRAWS, 4, 2)[:, 2] @ weight[2]
    constants, matrix = least_squares(mixed[:, kept].reshape(DRAWS, -1), outputs)
    refit = fit_window(moments, weight, kept, replaced, swap)
    scale = np.abs(weight[2]).sum(axis=0).max()  # errors of the two replaced features are weighted by it
    close(refit.columns.reshape(-1, 3), matrix.T, scale * SIMULATED)
    close(refit.response[0], constants, 3 * scale * SIMULATED)


def test_a_fit_needs_windows_to_hold_beyond_them() -> None:
    needed = FEWEST_ROWS * (3 * 9 + 9)
    blank = np.zeros((PADDED.features, PADDED.features))
    assert determined(WindowMoments(PADDED, np.zeros(5), needed, blank, None), 3)
    assert not determined(WindowMoments(PADDED, np.zeros(5), needed - 1, blank, None), 3)


# --- sums -------------------------------------------------------------------------------------------------------------


def same(found: Any, wanted: Any) -> None:
    """Equal field by field, arrays to rounding."""
    for name in (field.name for field in fields(wanted)):
        a, b = getattr(found, name), getattr(wanted, name)
        if isinstance(b, np.ndarray):
            close(a, b, ONE_PASS * max(float(np.abs(b).max()), 1.0))
        else:
            assert a == b


def moments_in_shards(rows: Array, bounds: list[int]) -> list[Moments]:
    """[samples, positions, channels]; samples are paired with others of their shard."""
    shards = [rows[a:b] for a, b in pairwise(bounds)]
    return [moments_of(s.reshape(-1, s.shape[-1]), np.roll(s, -1, axis=0).reshape(-1, s.shape[-1])) for s in shards]


def test_moments_add_up() -> None:
    rows = correlated(np.random.default_rng(9), 60 * 4, 5).reshape(60, 4, 5) + np.arange(60)[:, None, None] / 10
    a, b, c = moments_in_shards(rows, [0, 7, 20, 60])
    other = np.concatenate([np.roll(part, -1, axis=0) for part in np.split(rows, [7, 20])])
    whole = moments_of(rows.reshape(-1, 5), other.reshape(-1, 5))
    same(a + b + c, whole)
    same(a + (b + c), whole)
    bare = Moments(**{**vars(a), "scatter": None, "shared": None})
    assert (bare + b).scatter is None
    assert (bare + b).shared is None


@pytest.mark.parametrize("name", WINDOWS)
def test_moments_of_windows_move_and_add_up(name: str) -> None:
    rng, window = np.random.default_rng(10), WINDOWS[name]
    maps = maps_of(rng, window, 40)
    here, there = rng.standard_normal((2, window.channels))
    whole = window_moments(window, maps, here)
    same(window_moments(window, maps, there).recentred(here), whole)
    assert whole.recentred(here) is whole
    first, second = window_moments(window, maps[:15], here), window_moments(window, maps[15:], there)
    direct = window_moments(window, maps[15:], here)
    assert first.shared is not None
    assert direct.shared is not None
    same(first + second, WindowMoments(window, here, whole.count, whole.products, first.shared + direct.shared))
    assert (first + WindowMoments(**{**vars(second), "shared": None})).shared is None


def curvature_of(slopes: Array, rows: Array) -> Curvature:
    """From λ and a, [samples, positions, channels]."""
    s1, s2 = slopes.sum(axis=1), (slopes * rows).sum(axis=1)
    second = np.einsum("npi,npj->ij", slopes, slopes)
    sums = ((s1 * s1).sum(0), (s1 * s2).sum(0), (s2 * s2).sum(0), s1.sum(0), s2.sum(0))
    return Curvature(len(rows), *sums, second)


def test_curvature_adds_up() -> None:
    rng = np.random.default_rng(11)
    slopes, rows = rng.standard_normal((2, 30, 4, 5))
    a, b = curvature_of(slopes[:11], rows[:11]), curvature_of(slopes[11:], rows[11:])
    same(a + b, curvature_of(slopes, rows))
    assert (a + Curvature(**{**vars(b), "second": None})).second is None


def test_statistics_add_up() -> None:
    rng = np.random.default_rng(12)
    rows, slopes, maps = rng.standard_normal((30, 4, 5)), rng.standard_normal((30, 4, 5)), maps_of(rng, PADDED, 30)

    def over(part: slice, *digests: str) -> Statistics:
        moments = {"h": moments_of(rows[part].reshape(-1, 5))}
        windows = {"y": window_moments(PADDED, maps[part], np.ones(5))}
        windows["y"] = WindowMoments(**{**vars(windows["y"]), "shared": None})
        curvature = {"h": curvature_of(slopes[part], rows[part])}
        return Statistics(moments, curvature, {"g": "why"}, windows, len(rows[part]), digests, "1.0")

    found, whole = over(slice(0, 12), "a") + over(slice(12, 30), "b"), over(slice(0, 30), "a", "b")
    for name in ("moments", "curvature", "windows"):
        (one,), (other,) = getattr(found, name).values(), getattr(whole, name).values()
        same(one, other)
    assert (found.samples, found.data_sha256, found.refused) == (30, ("a", "b"), {"g": "why"})
    strange = Statistics({}, {}, {}, {}, 3, ("c",), "1.0")
    with pytest.raises(ValueError, match="different sites"):
        found + strange
