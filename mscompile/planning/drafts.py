"""Drafts: what a plan makes of the weights that read a site, without the affine map in between.

To choose widths is to try many numbers of channels of one order, and to solve for the map of each costs more than to try it.
Where samples have nothing in common by position, the weights themselves are nested. With the bracket B = L Lᵀ that
`fit_affine` inverts and a reader's weight W, both in that order, and K the first k channels of it, off the diagonal the
cross-covariance is αB, α = (1−p) / ((1−p)² + p²), and so

    W_K + B_KK⁻¹ (αB)_KP W_P = (1−α) W_K + α (L⁻ᵀ)_KK (Lᵀ W)_K,

since a leading block of a triangular inverse is the inverse of the block. From one k to the next it takes a product with as
many rows as lie between. Where activations a are known, less their mean, what the reader gives is a sum along the order,

    a_K ((1−α) W_K + α (L⁻ᵀ)_KK (Lᵀ W)_K) = Σ_{i<k} (1−α) a_i W_i + (a L⁻ᵀ)_i α (Lᵀ W)_i,

and all numbers of channels together cost little more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    factor
        Of the site.
    """

    def __init__(self, factor: Factor, reader: Reader) -> None:
        tensor, linear = reader.weight.const_value, reader.signature.linear
        assert tensor is not None
        assert linear is not None
        dense, self._axis, self._gain = tensor.numpy(), reader.axis, linear.gain
        self._factor, places = factor, np.argsort(reader.index, kind="stable")[factor.order]
        alpha = nested_share(factor.swap)
        weight = np.moveaxis(np.take(dense, places, self._axis), self._axis, 0)
        self._kind, weight = dense.dtype, weight.astype(np.promote_types(dense.dtype, np.float32), order="K", copy=False)
        self._mean, self._back = factor.moments.mean[factor.order], np.argsort(places)
        self._response = self._mean @ weight
        self._alpha, self._dense = alpha, weight
        rows = np.array(weight, np.float64, order="K")
        if self._axis == 0:
            self._products = scipy.linalg.blas.dtrmm(alpha, factor.lower, rows.T, side=1, lower=1, overwrite_b=1).T
        else:
            self._products = scipy.linalg.blas.dtrmm(alpha, factor.lower, rows, trans_a=1, lower=1, overwrite_b=1)
        self._sum = self._products[:0]

    def _product(self, matrix: Array, rows: Array) -> Array:
        return matrix @ rows if self._axis == 0 else (rows.T @ matrix.T).T

    def arrays(self, count: int) -> tuple[Weight, Weight]:
        """The weight, zero for channels that went, and [outputs] what they add to the reader's output."""
        before = len(self._sum)
        few, most = sorted((count, before))
        change = self._product(self._factor.upper[:most, few:most], self._products[few:most])
        if count < before:
            self._sum = self._sum[:count] - change[:count]
        else:
            change[:before] += self._sum
            self._sum = change
        columns = (1 - self._alpha) * self._dense[:count] + self._sum
        whole = np.zeros_like(self._dense, self._kind)
        whole[:count] = columns
        response = self._response - self._mean[:count] @ columns
        weight = np.take(np.moveaxis(whole, 0, self._axis), self._back, self._axis)
        return weight, (self._gain * response).astype(weight.dtype)

    @property
    def outputs(self) -> int:
        """How many the reader has."""
        return int(self._dense.shape[1])

    def columns(self, activations: Weight) -> tuple[Weight, Weight]:
        """What the rows of the weight, and those of Lᵀ W, are multiplied by under a draft: (1−α) a and a L⁻ᵀ, a centred."""
        centred = np.take(activations, self._factor.order, -1) - self._mean
        ahead = scipy.linalg.blas.dtrsm(1.0, self._factor.lower, centred.reshape(-1, centred.shape[-1]).T, lower=1).T
        return (1 - self._alpha) * centred, ahead.reshape(centred.shape)

    def drafted(self, columns: tuple[Weight, Weight], dense: Weight) -> Reading:
        """What the reader gives under a draft, from `dense`, what it gives where all channels are left."""
        return Reading(dense, self._gain, zip(columns, (self._dense, self._products), strict=True))

    def changed(self, change: Weight, dense: Weight) -> Reading:
        """What the dense reader gives: `dense`, and what a change of [samples, …, channels] does in the channels left."""
        columns = np.take(change, self._factor.order, -1).astype(np.float32, copy=False)
        return Reading(dense + self._gain * (columns @ self._dense), self._gain, [(columns, self._dense)])


class Reading:
    """What a reader gives for activations that are known, for any number of channels left: sums of products that go on.

    Parameters
    ----------
    whole
        [samples, …, outputs]: where all are left.
    terms
        [samples, …, channels] and [channels, outputs], in an order.
    """

    def __init__(self, whole: Weight, gain: float, terms: Iterable[tuple[Weight, Weight]]) -> None:
        self.whole, self._gain, self._sum = whole, gain, whole.astype(np.float32)
        self._terms = [(columns.astype(np.float32, copy=False), rows) for columns, rows in terms]
        self._count = len(self._terms[0][1])

    def at(self, count: int) -> Weight:
        """[samples, …, outputs], `count` channels left."""
        few, most = sorted((count, self._count))
        if few < most:
            change = sum(columns[..., few:most] @ rows[few:most].astype(np.float32) for columns, rows in self._terms)
            self._sum += (self._gain if count == most else -self._gain) * change
        self._count = count
        return self._sum.astype(self.whole.dtype)


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


def drafted(foldings: Mapping[str, Folding], activations: Weight, dense: Mapping[str, Weight]) -> dict[str, Reading]:
    """What readers of [samples, …, channels] give under drafts, by reader, from what they give in the dense network."""
    factored, *_ = foldings.values()
    with blas_threads(activations.shape[-1]):
        columns = factored.columns(activations)
    return {name: folding.drafted(columns, dense[name]) for name, folding in foldings.items()}


def reads_rows(site: Site, rank: int) -> bool:
    """Whether readers multiply the site itself, of so many axes, along its last one."""
    return site.axis == rank - 1 and all(reader.data == site.tensor for reader in site.readers)


def foldings(site: Site, factor: Factor, room: int) -> dict[str, Folding]:
    """By reader; none where weights do not nest, or do not say all that a plan does, or there are too few bytes of room."""
    views = [view_of(site, reader) for reader in site.readers]
    plain = all(view is not None and not view.kernel and view.taps == 1 for view in views) and not site.pairings
    if factor.moments.shared is not None or not plain or folded_bytes(site) > room:
        return {}
    with blas_threads(site.size):
        return {window_name(reader): Folding(factor, reader) for reader in site.readers}


def folded_bytes(site: Site) -> int:
    """What the foldings of a site hold."""
    outputs = sum(reader.weight.const_value.size // site.size for reader in site.readers if reader.weight.const_value)
    return 8 * site.size * (site.size + 2 * outputs)
