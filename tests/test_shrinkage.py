"""Covariances of few observations, shrunk as does best on data held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from golden import interchange_error
from small_models import mlp
from test_replacements import correlated, moments_of, split

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.statistics import Statistics
from mscompile.intake.data import read
from mscompile.intake.samples import Samples
from mscompile.network.dense import DenseModel, open_dense
from mscompile.options import Options
from mscompile.planning.preparation import what_to_measure
from mscompile.planning.replacements import Fit, fit_affine, fit_by_row, interchanged
from mscompile.planning.scores import score
from mscompile.planning.shrinkage import SCARCE, SHARES, held_out_risks, shrunk, with_shrinkage

Array = npt.NDArray[np.float64]

ROUNDING = 1e-4
"""Of coefficients of order one: the least ridge, 1e-6, times the condition of these covariances, below 100."""
WIDTH = 64


def related(rng: np.random.Generator, count: int, channels: int) -> tuple[Array, Array]:
    """Rows, and those of other samples at the same positions, which have a part in common."""
    common = correlated(rng, count, channels)
    return common + correlated(rng, count, channels), common + correlated(rng, count, channels)


@pytest.mark.parametrize("swap", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_shrinking_is_a_ridge_of_each_channels_own_variance(swap: float, share: float) -> None:
    rng = np.random.default_rng(0)
    kept, replaced = split(rng, 12, 7)
    moments = moments_of(correlated(rng, 400, 12))
    bracket = interchanged(moments.covariance, moments.common, swap)[np.ix_(kept, kept)]
    cross = (1 - swap) * moments.covariance[np.ix_(kept, replaced)]
    wanted = scipy.linalg.solve(bracket + share * np.diag(np.diagonal(bracket)), cross, assume_a="pos").T
    found = fit_affine(shrunk(moments, share), kept, replaced, swap)
    np.testing.assert_allclose(found.matrix, wanted, rtol=0, atol=ROUNDING)


def test_shrinking_leaves_variances_and_means() -> None:
    moments = moments_of(*related(np.random.default_rng(1), 50, 6))
    found = shrunk(moments, 0.5)
    assert found.shared is not None
    assert moments.shared is not None
    np.testing.assert_array_equal(found.variance, moments.variance)
    np.testing.assert_array_equal(np.diagonal(found.covariance), np.diagonal(moments.covariance))
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(found.covariance[off], moments.covariance[off] / 1.5, rtol=1e-14)
    np.testing.assert_allclose(found.shared[off], moments.shared[off] / 1.5, rtol=1e-14)


def test_without_interchange_the_error_is_that_on_the_data() -> None:
    rng = np.random.default_rng(2)
    kept, replaced = split(rng, 10, 6)
    fit = fit_affine(moments_of(correlated(rng, 300, 10)), kept, replaced, 0.1)
    rows = correlated(rng, 40, 10)
    assert fit.matrix is not None
    error = fit.constants + rows[:, kept] @ fit.matrix.T - rows[:, replaced]
    found = interchange_error(fit, moments_of(rows), kept, replaced, 0.0)
    np.testing.assert_allclose(found, error.T @ error / len(rows), rtol=1e-10)


@pytest.mark.parametrize("swap", [0.1, 0.5, 0.9])
def test_the_error_under_interchange_is_least_at_the_fit_for_it(swap: float) -> None:
    rng = np.random.default_rng(3)
    kept, replaced = split(rng, 10, 6)
    moments = moments_of(*related(rng, 300, 10))
    fit = fit_affine(moments, kept, replaced, swap)
    assert fit.matrix is not None
    least = np.trace(interchange_error(fit, moments, kept, replaced, swap))
    for _ in range(20):
        matrix = fit.matrix + 0.05 * rng.standard_normal(fit.matrix.shape)
        other = Fit(moments.mean[replaced] - matrix @ moments.mean[kept], matrix)
        assert np.trace(interchange_error(other, moments, kept, replaced, swap)) > least


def test_the_error_under_interchange_is_that_of_swapped_rows() -> None:
    rng, swap, draws = np.random.default_rng(4), 0.3, 200_000
    kept, replaced = split(rng, 5, 3)
    mixing = np.eye(5) + 0.4 * rng.standard_normal((5, 5))
    rows, other = (rng.standard_normal((draws, 5)) @ mixing for _ in range(2))
    fit = fit_affine(moments_of(rows[:1000]), kept, replaced, 0.0)
    assert fit.matrix is not None
    swapped = np.where(rng.random((draws, 3)) < swap, other[:, kept], rows[:, kept])
    error = fit.constants + swapped @ fit.matrix.T - rows[:, replaced]
    found = np.diagonal(interchange_error(fit, moments_of(rows), kept, replaced, swap))
    # Five standard errors of a mean of squares.
    np.testing.assert_array_less(np.abs(found - (error**2).mean(axis=0)), 5 * (error**2).std(axis=0) / draws**0.5)


@pytest.mark.parametrize("rows", [None, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("swap", [0.0, 0.1])
def test_held_out_risks_are_those_of_each_fit(swap: float, rows: list[int] | None) -> None:
    rng = np.random.default_rng(6)
    kept, replaced = split(rng, 10, 6)
    moments, seen = moments_of(*related(rng, 40, 10)), moments_of(*related(rng, 30, 10))
    root = rng.standard_normal((10, 10))
    site = replace(open_dense(mlp((WIDTH, 10, 3))).sites[0], rows=None if rows is None else np.array(rows))
    wanted = []
    for share in SHARES:
        if rows is None:
            fit = fit_affine(shrunk(moments, share), kept, replaced, swap)
        else:
            fit = fit_by_row(fit_affine, shrunk(moments, share), kept, replaced, swap, np.array(rows))
        error = interchange_error(fit, seen, kept, replaced, swap)
        wanted.append(0.5 * np.sum((root @ root.T)[np.ix_(replaced, replaced)] * error))
    found = held_out_risks(site, moments, seen, site.units[kept], root @ root.T, swap)
    np.testing.assert_allclose(found, wanted, rtol=ROUNDING)


def measured(dense: DenseModel, x: npt.NDArray[np.float32], options: Options) -> tuple[Statistics, Samples]:
    half = len(x) // 2
    fit, held = (read({"x": part}, dense.specs) for part in (x[:half], x[half:]))
    return calibrate(dense.scm, dense.sites, fit, batch_size=32, measure=what_to_measure(dense, options)), held


def shrink(
    dense: DenseModel, x: npt.NDArray[np.float32], options: Options
) -> tuple[Statistics, Statistics, dict[str, float]]:
    statistics, held = measured(dense, x, options)
    scores = score(dense.scm, dense.sites, statistics, options.objective)
    how = {"replacement": options.replacement, "swap": options.swap, "batch_size": 32}
    found, shares = with_shrinkage(dense, statistics, scores, held, **how)  # type: ignore[arg-type]
    return statistics, found, dict(shares)


def inputs(count: int, rank: int, noise: float) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(5)
    low = rng.standard_normal((count, rank)) @ rng.standard_normal((rank, WIDTH)) / rank**0.5
    return (low + noise * rng.standard_normal((count, WIDTH))).astype(np.float32)


def test_chance_correlations_are_shrunk_and_true_ones_are_not() -> None:
    dense, options = open_dense(mlp((WIDTH, WIDTH, 3))), Options(swap=0.0)
    _, _, noisy = shrink(dense, inputs(160, WIDTH, 1.0), options)
    _, _, clear = shrink(dense, inputs(160, 2, 0.0), options)
    assert noisy["h0"] >= 0.1
    assert clear["h0"] < noisy["h0"]


def test_least_squares_of_few_observations_gain() -> None:
    dense, options, x = open_dense(mlp((WIDTH, WIDTH, 3))), Options(swap=0.0), inputs(160, 8, 0.5)
    plain, found, shares = shrink(dense, x, options)
    assert shares["h0"] > 0
    truth = measured(dense, inputs(20_000, 8, 0.5), options)[0].moments["h0"]
    kept, replaced = np.arange(0, WIDTH, 2), np.arange(1, WIDTH, 2)
    risks = [
        np.trace(interchange_error(fit_affine(s.moments["h0"], kept, replaced, 0.0), truth, kept, replaced, 0.0))
        for s in (plain, found)
    ]
    assert risks[1] < 0.8 * risks[0]


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2 * SCARCE * WIDTH, Options()),
        (160, Options(replacement="constant")),
        (160, Options(replacement="affine-parents")),
    ],
)
def test_nothing_is_shrunk_without_need(count: int, options: Options) -> None:
    dense = open_dense(mlp((WIDTH, WIDTH, 3)))
    plain, found, shares = shrink(dense, inputs(count, 8, 0.5), options)
    assert not shares
    assert found is plain


def test_duplicates_stay_duplicates() -> None:
    model = mlp((WIDTH, 16, 3))
    dense, options = open_dense(model), Options()
    x = inputs(2 * 8 * 16, 8, 0.5)
    statistics, held = measured(dense, x, options)
    moments = statistics.moments["h0"]
    assert moments.scatter is not None
    scatter = moments.scatter.copy()
    scatter[1], scatter[:, 1], scatter[1, 1] = scatter[0], scatter[:, 0], scatter[0, 0]
    statistics = replace(statistics, moments={"h0": replace(moments, scatter=scatter)})
    scores = score(dense.scm, dense.sites, statistics, options.objective)
    found, shares = with_shrinkage(dense, statistics, scores, held, replacement="affine", swap=0.1, batch_size=32)
    assert not shares
    assert found is statistics
