"""Drafts: what a plan makes of the weights that read a site, without the affine map in between.

To choose widths is to try many numbers of channels of one order, and to solve for the map of each costs more than to try it.
Where samples have nothing in common by position, the weights themselves are nested. With the bracket B = L Lᵀ that
`fit_affine` inverts and a reader's weight W, both in that order, and K the first k channels of it, off the diagonal the
cross-covariance is αB, α = (1−p) / ((1−p)² + p²), and so

    W_K + B_KK⁻¹ (αB)_KP W_P = (1−α) W_K + α (L⁻ᵀ)_KK (Lᵀ W)_K,

since a leading block of a triangular inverse is the inverse of the block. From one k to the next it takes a product with as
many rows as lie between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from mscompile.calibration.windows import view_of, window_name
from mscompile.machine import blas_threads
from mscompile.network.scm import Reader, Site
from mscompile.operators import IntArray
from mscompile.planning.replacements import Array, Factor, nested_share
from mscompile.runs.shelf import Shelf

Weight = npt.NDArray[Any]


class Folding:
    """A reader's weight with the channels that go folded in, for any number of the last ones of an order.

    Arrays have the channels first, in that order, and lie in memory as the weight does.

    Parameters
    ----------
    upper
        L⁻ᵀ of the site's factor.
    """

    def __init__(self, factor: Factor, upper: Array, reader: Reader) -> None:
        tensor, linear = reader.weight.const_value, reader.signature.linear
        assert tensor is not None
        assert linear is not None
        dense, self._axis, self._gain = tensor.numpy(), reader.axis, linear.gain
        places = np.argsort(reader.index, kind="stable")[factor.order]
        alpha = nested_share(factor.swap)
        weight = np.moveaxis(np.take(dense, places, self._axis), self._axis, 0)
        self._kind, weight = dense.dtype, weight.astype(np.promote_types(dense.dtype, np.float32), order="K", copy=False)
        self._upper, self._mean, self._back = upper, factor.moments.mean[factor.order], np.argsort(places)
        self._response = self._mean @ weight
        self._kept = (1 - alpha) * weight
        self._products = alpha * self._product(factor.lower.T, weight.astype(np.float64, order="K"))
        self._sum = self._products[:0]

    def _product(self, matrix: Array, rows: Array) -> Array:
        return matrix @ rows if self._axis == 0 else (rows.T @ matrix.T).T

    def arrays(self, count: int) -> tuple[Weight, Weight]:
        """The weight, zero for channels that went, and [outputs] what they add to the reader's output."""
        before = len(self._sum)
        few, most = sorted((count, before))
        change = self._product(self._upper[:most, few:most], self._products[few:most])
        if count < before:
            self._sum = self._sum[:count] - change[:count]
        else:
            change[:before] += self._sum
            self._sum = change
        columns = self._kept[:count] + self._sum
        whole = np.zeros_like(self._kept, self._kind)
        whole[:count] = columns
        response = self._response - self._mean[:count] @ columns
        weight = np.take(np.moveaxis(whole, 0, self._axis), self._back, self._axis)
        return weight, (self._gain * response).astype(weight.dtype)


@dataclass(frozen=True)
class Draft:
    """A plan of one site, to be tried.

    Attributes
    ----------
    tensor, kept, basis
        As of a `SitePlan`.
    foldings
        By reader.
    """

    tensor: str
    kept: IntArray
    basis: str
    foldings: Mapping[str, Folding]

    def on(self, shelf: Shelf) -> Draft:
        """The same: it holds no matrix of its own."""
        del shelf
        return self


def foldings(site: Site, factor: Factor, room: int) -> dict[str, Folding]:
    """By reader; none where weights do not nest, or do not say all that a plan does, or there are too few bytes of room."""
    views = [view_of(site, reader) for reader in site.readers]
    plain = all(view is not None and not view.kernel and view.taps == 1 for view in views) and not site.pairings
    if factor.moments.shared is not None or not plain or folded_bytes(site) > room:
        return {}
    with blas_threads(site.size):
        upper = scipy.linalg.lapack.dtrtri(factor.lower, lower=True)[0].T
        return {window_name(reader): Folding(factor, upper, reader) for reader in site.readers}


def folded_bytes(site: Site) -> int:
    """What the foldings of a site hold."""
    outputs = sum(reader.weight.const_value.size // site.size for reader in site.readers if reader.weight.const_value)
    return 8 * site.size * (site.size + 2 * outputs)
