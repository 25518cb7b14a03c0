"""Where readings begin: the tensor furthest up from which only movement leads to what reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.sites import Pairing, Reader
from mscompile.network.walk import Walk
from mscompile.operators import IntArray, Signature


@dataclass(frozen=True)
class Found:
    """A reading traced back to the tensor where it begins: raw units of that tensor, and the channel each column meets."""

    tensor: ir.Value
    axis: int
    units: IntArray
    reader: Callable[[IntArray], Reader] | None
    pairing: Pairing | None
    rows: IntArray | None


@dataclass(frozen=True)
class Origins:
    """Finds where readings begin."""

    walk: Walk

    def origin(
        self, value: ir.Value, axis: int, units: IntArray, reader: ir.Node, through: Callable[[ir.Node], bool] | None = None
    ) -> tuple[ir.Value, int, IntArray, ir.Node]:
        """The tensor furthest up from which only movement leads to `value`, with all `units` on one axis, each once.

        `through` admits nodes besides movement. Returns tensor, axis, its units and the node that takes it in.
        """
        found = value, axis, units, reader
        passes = through if through is not None else lambda _: False
        while (node := value.producer()) is not None:
            signature = self.walk.signatures[node]
            if not isinstance(signature, Signature) or not (signature.moving or signature.copies or passes(node)):
                break
            if not self._only_read(value, passes):
                break
            labelled = [v for v in node.inputs if v is not None and self.walk.labels.get(v)]
            carrying = [(v, a, u) for v in labelled for a, u in self.walk.labels[v].items() if np.isin(units, u).all()]
            if len(carrying) != 1:
                break
            ((value, axes, above),) = carrying
            if len(axes) == 1 and len(np.unique(above)) == above.size and np.isin(above, units).all():
                found = value, axes[0], above, node
        return found

    def _only_read(self, value: ir.Value, passes: Callable[[ir.Node], bool]) -> bool:
        """Whether movement and contraction are all that happens to a value."""
        if value.is_graph_output():
            return False
        for node, operand in value.uses():
            found = self.walk.signatures.get(node)
            if any(read.node is node and read.signature.linear.data == operand for read in self.walk.reads):  # type: ignore[union-attr]
                continue
            if any(meeting.node is node for meeting in self.walk.meetings):
                continue
            moving = isinstance(found, Signature) and (found.moving or found.copies or passes(node))
            if not (moving and all(self._only_read(out, passes) for out in node.outputs)):
                return False
        return True
