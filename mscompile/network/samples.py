"""The samples, followed through a graph: where every tensor holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from mscompile.network.layout import FIRST, ROWS, Layout, reshaped
from mscompile.operators import Barrier, NodeView, Shape, Signature, declared


@dataclass
class Following:
    """State of the walk.

    Attributes
    ----------
    layouts
        Where a value holds the samples; None where they went to another axis than the first, and were lost sight of there.
        A value that is not in it is taken to hold them on its first axis, if it holds any.
    one
        Whether there is one sample at a time: all of a tensor is of that one, wherever it is counted.
    met
        Whether somewhere they seem to be on two axes at once, as they would where they are taken for positions.
    """

    shapes: Mapping[str, Shape]
    layouts: dict[ir.Value, Layout | None] = field(default_factory=dict)
    one: bool = False
    met: bool = False

    def begin(self, inputs: Sequence[ir.Value]) -> None:
        """Samples are on axis 0 of the inputs, where that is free; of all, where it is of none."""
        found = {value: self.shapes.get(value.name or "", ()) for value in inputs if not value.is_initializer()}
        free = {value for value, shape in found.items() if shape and not (isinstance(shape[0], int) and shape[0] >= 0)}
        self.one = not free and next((shape[0] for shape in found.values() if shape), None) == 1
        self.layouts = {value: FIRST for value, shape in found.items() if shape and (value in free or not free)}

    def of(self, value: ir.Value) -> Layout | None:
        """Where a value holds them; None where that is not known."""
        return ROWS if self.one else self.layouts.get(value, ROWS)

    def visit(self, view: NodeView, found: Signature | str) -> None:
        """Follow them through a node."""
        given = {operand: self.layouts[v] for operand in view.live if (v := view.value(operand)) in self.layouts}
        if isinstance(found, str):
            row = declared(view.node)
            alike = row.declare.samples(view) if row is not None and isinstance(row.declare, Barrier) else ()
            self._through(view, given, dict(alike))
            return
        for target, value in enumerate(view.node.outputs):
            said = [one for operand in given for one in self._passed(view, found, operand, ~target, given[operand])]
            known = {layout for layout in said if layout is not None}
            self.met |= len(known) > 1
            if said:
                self.layouts[value] = known.pop() if len(known) == 1 else None

    def _through(self, view: NodeView, given: Mapping[int, Layout | None], alike: Mapping[int, int]) -> None:
        """Follow them through a node of which it is known at most which axes count them."""
        known = any(layout is not None and layout.axis == alike.get(operand) for operand, layout in given.items())
        moved = any(layout is None or not layout.first for layout in given.values())
        for target, value in enumerate(view.node.outputs):
            if known and ~target in alike:
                self.layouts[value] = Layout(alike[~target], 1, 1)
            elif moved:
                self.layouts[value] = None

    def _passed(
        self, view: NodeView, found: Signature, operand: int, target: int, layout: Layout | None
    ) -> Iterator[Layout | None]:
        """Where the samples of an operand go in an output, if anything is said of that."""
        source, into = view.shape(operand), view.shape(target)
        if layout is None or source is None or into is None:
            yield layout
            return
        link = next((link for link in found.links if (operand, layout.axis) in link), ())
        axes = [axis for other, axis in link if other == target]
        if axes:
            yield replace(layout, axis=axes[0])
        elif found.moving and not link:
            yield reshaped(layout, source, into)
        elif not link and len(source) == len(into):  # that sizes are not known to agree moves nothing
            yield layout
        elif not layout.first:
            yield None
