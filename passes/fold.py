"""Fold replacements into the readers' weights and biases.

A reader with weight W over the channels of a site, ``y = Σ_k W_k a_k + b``, sees replaced channels ``a_P = c + B a_K``:

    ``y = Σ_K (W_K + W_P B) a_K + (b + W_P c)``

so W takes ``W_K + W_P B`` on retained columns and zeros on replaced ones, and b takes ``W_P c``. Where the reader pads with
zeros, W_P c is no bias but a weight on a channel of ones, which a Carry node provides. Nothing reads a replaced channel
then, and `passes.narrow` may take it away. Keys meet no weight but queries: see `network.sites.Pairing`. All sums are in
float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Pairing, Reader, Scm, read_scm
from mscompile.passes.readers import array_of, owned, rewrite_reader
from mscompile.passes.replace import Replacement, replacements


@dataclass(frozen=True)
class FoldReplacements(ir.passes.InPlacePass):
    """Fold every Replace node whose readers all take it; the others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        scm = read_scm(model)
        sites = {site.tensor: site for site in scm.sites}
        found = [(r, sites[r.tensor]) for r in replacements(model.graph) if r.tensor in sites]
        found = [(r, s) for r, s in found if s.axis == r.axis and {use.node for use in r.value.uses()} <= s.entries]
        for (
            replacement,
            site,
        ) in found:  # queries first: what is folded into a reader may give it a bias that they do not know of
            for pairing in site.pairings:
                fold_into_queries(model.graph, pairing, replacement)
        for replacement, site in found:
            for reader in site.readers:
                fold_into(model.graph, scm, reader, replacement)
            replacement.value.replace_all_uses_with(replacement.node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove(replacement.node, safe=True)
        return ir.passes.PassResult(model, bool(found))


def fold_into(graph: ir.Graph, scm: Scm, reader: Reader, replacement: Replacement) -> None:
    """Fold one replacement into one reader."""
    columns = reader.columns(replacement.size)
    away = columns[replacement.replaced]
    group = np.zeros(replacement.size, dtype=np.int64)
    if reader.groups > 1:
        group[reader.index] = np.repeat(np.arange(reader.groups), len(reader.index) // reader.groups)
    response = np.zeros((reader.groups, *columns.shape[1:]))
    np.add.at(response, group[replacement.replaced], replacement.constants.reshape(-1, *[1] * (away.ndim - 1)) * away)
    if replacement.matrix is not None:
        columns[replacement.kept] += np.tensordot(replacement.matrix.T, away, axes=1)
    columns[replacement.replaced] = 0.0
    rewrite_reader(graph, scm, reader, columns, response)


def fold_into_queries(graph: ir.Graph, pairing: Pairing, replacement: Replacement) -> None:
    """Fold a replacement of keys into the queries they meet, head by head; constants fall out under the softmax."""
    for slot, index, heads in zip(pairing.slots, pairing.index, pairing.heads, strict=True):
        array = np.moveaxis(array_of(slot.node.inputs[slot.operand]).astype(np.float64), slot.axis, 0)
        kept, replaced = (np.isin(index, channels) for channels in (replacement.kept, replacement.replaced))
        for head in np.unique(heads) if replacement.matrix is not None else ():
            to, away = np.flatnonzero(kept & (heads == head)), np.flatnonzero(replaced & (heads == head))
            rows, columns = (np.searchsorted(c, index[i]) for c, i in ((replacement.replaced, away), (replacement.kept, to)))
            array[to] += np.tensordot(replacement.matrix[np.ix_(rows, columns)].T, array[away], axes=1)  # type: ignore[index]
        array[replaced] = 0.0
        owned(graph, slot.node, slot.operand, np.moveaxis(array, 0, slot.axis))
