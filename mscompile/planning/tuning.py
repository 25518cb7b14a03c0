"""A network whose readers take their weights from plans: one graph for all candidates, and no rewriting.

What a candidate does here is what its compiled file does, to rounding: replaced channels are there, and are multiplied by
zeros. It serves to choose and to fit; what is chosen is compiled, proved and measured as a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.calibration.windows import view_of, window_name
from mscompile.network.dense import DenseModel
from mscompile.network.scm import Reader, Site
from mscompile.planning.drafts import Draft
from mscompile.planning.plan import SitePlan
from mscompile.planning.refits import Target
from mscompile.runtime import Arrays
from mscompile.verification.skeletons import skeleton_of
from mscompile.verification.surgery import MATRIX, SHIFT, WEIGHT, tunable
from mscompile.verification.verify import patches_of


class Tunable:
    """A dense model whose weights of readers are plans'.

    Attributes
    ----------
    graph
        With weights under the names that `weights` gives: of convolutions the dense model's, of products as inputs.
    """

    def __init__(self, source: DenseModel) -> None:
        self._source = source
        self._fed: dict[str, tuple[SitePlan | Draft, Arrays]] = {}
        self._whole: Arrays = {}
        for site in source.sites:
            self._whole |= _feed(site, None)
        patches = patches_of(source.scm)
        mixed = [patches[site.tensor] for site in source.sites if not _by_weights(site)]
        names = [
            window_name(reader) for site in source.sites for reader in site.readers if view_of(site, reader) is not None
        ]
        # Weights that are no inputs let onnxruntime lay convolutions out for speed, worth far more than a session costs.
        laid_out = {name: array for name, array in self._whole.items() if array.ndim > 2}
        self.graph = tunable(skeleton_of(source.model), names, mixed).with_weights(laid_out)

    def weights(self, plans: Iterable[SitePlan | Draft]) -> Arrays:
        """Weights by name in the graph; sites without a plan are as in the dense model."""
        given, fed = dict(self._whole), dict[str, tuple[SitePlan | Draft, Arrays]]()
        for plan in plans:
            known = self._fed.get(plan.tensor)
            if known is None or known[0] is not plan:
                known = plan, _feed(self._source.scm.site(plan.tensor), plan)
            fed[plan.tensor] = known
            given |= fed[plan.tensor][1]
        self._fed = fed or self._fed  # those of other plans make way: of all sites they come to the size of the model
        return given


def _by_weights(site: Site) -> bool:
    """Whether weights of readers say all that a plan does at a site; else its tensor is mixed before they see it."""
    return not site.pairings and all(view_of(site, reader) is not None for reader in site.readers)


def _feed(site: Site, plan: SitePlan | Draft | None) -> Arrays:
    """Inputs of `tunable` for one site under a plan; what makes no difference where there is none."""
    found: Arrays = {}
    if isinstance(plan, Draft):
        for name, folding in plan.foldings.items():
            found[WEIGHT + name], found[SHIFT + name] = folding.arrays(len(plan.kept))
        return found
    folded = _by_weights(site)
    given = set() if plan is None else {window.reader for window in plan.windows}
    for reader in site.readers:
        if view_of(site, reader) is not None:
            told = folded or window_name(reader) in given
            found |= _weights(site, reader, plan if told else None)
    if folded:
        return found
    dtype = _array(site.readers[0].weight).dtype if site.readers else np.dtype(np.float32)
    matrix, shift = _identity(site.size, dtype), np.zeros(site.size, dtype)
    if plan is not None:
        matrix = matrix.copy()
        matrix[:, plan.replaced] = 0.0
        shift[plan.replaced] = plan.constants
        if plan.affine is not None:
            matrix[np.ix_(plan.kept, plan.replaced)] = plan.affine.T
    return found | {MATRIX + site.tensor: matrix, SHIFT + site.tensor: shift}


@lru_cache(maxsize=8)
def _identity(size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """One for all sites as wide: many are as large as the weights."""
    found = np.eye(size, dtype=dtype)
    found.setflags(write=False)
    return found


def _array(value: ir.Value) -> npt.NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _weights(site: Site, reader: Reader, plan: SitePlan | None) -> Arrays:
    """Inputs of `tunable` for one reader under a plan; what it has in the dense model where there is none."""
    window, linear = view_of(site, reader), reader.signature.linear
    assert window is not None
    assert linear is not None
    name, dense = window_name(reader), _array(reader.weight)
    if plan is None:
        if window.kernel:
            return {WEIGHT + name: dense, SHIFT + name: np.zeros_like(dense[:, :1])}
        return {WEIGHT + name: dense, SHIFT + name: np.zeros(dense.shape[1 - reader.axis], dense.dtype)}
    if not window.kernel and all(given.reader != name for given in plan.windows):
        # As below, in no more than single precision, and in the order that the weight lies in.
        places, axis = np.argsort(reader.index, kind="stable").reshape(site.size, window.taps), reader.axis
        left, lost = (np.take(dense, places[channels], axis) for channels in (plan.kept, plan.replaced))
        if plan.affine is not None:
            kind = np.promote_types(dense.dtype, np.float32)
            gone, affine = lost.astype(kind, copy=False), plan.affine.astype(kind)
            gone = np.moveaxis(np.tensordot(gone, affine, (1, 0)), -1, 1) if axis else np.tensordot(affine.T, gone, 1)
            left += gone.astype(dense.dtype, copy=False)
        shift = linear.gain * np.tensordot(plan.constants, lost, (0, axis)).sum(axis=axis)
        flat = [*dense.shape[:axis], -1, *dense.shape[axis + 1 :]]
        back = np.argsort(np.concatenate([places[plan.kept], places[plan.replaced]]).ravel())
        weight = np.take(np.concatenate([left, np.zeros_like(lost)], axis).reshape(flat), back, axis)
        return {WEIGHT + name: weight, SHIFT + name: shift.astype(dense.dtype)}
    target = Target(site, reader, window, plan, np.zeros(site.size))
    weights, taps, retained = target.weights(), window.taps, len(plan.kept)
    columns, response = weights[: retained * taps], weights[retained * taps :]
    outputs = weights.shape[1]
    if window.kernel:
        full = np.zeros((site.size + 1, taps, outputs))
        full[plan.kept] = columns.reshape(retained, taps, outputs)
        if window.marks == taps:
            full[-1] = response
        else:  # without padding ones are everywhere: any tap carries them
            full[-1, 0] = response[0]
        filters = full.transpose(2, 0, 1).reshape(outputs, site.size + 1, *window.kernel).astype(dense.dtype)
        return {WEIGHT + name: filters[:, :-1], SHIFT + name: filters[:, -1:]}
    places = np.argsort(reader.index, kind="stable").reshape(site.size, taps)
    matrix = np.zeros((len(reader.index), outputs))
    matrix[places[plan.kept].ravel()] = columns
    oriented = matrix if reader.axis == 0 else matrix.T
    shift = (response[0] * linear.gain).astype(dense.dtype)
    return {WEIGHT + name: np.ascontiguousarray(oriented.astype(dense.dtype)), SHIFT + name: shift}
