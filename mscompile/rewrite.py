"""Carrying out a plan: the passes in order, on a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mscompile.files import weight_bytes
from mscompile.operators import DIALECT, IntArray
from mscompile.passes import RemoveDeadUnits, compiling
from mscompile.passes.readers import SHELF
from mscompile.planning.plan import Plan
from mscompile.runs.work import NOWHERE, Work


@dataclass(frozen=True)
class Compiled:
    """A rewritten model.

    Attributes
    ----------
    model
        The smaller graph.
    alignment
        For each narrowed site, the dense channel of each channel left.
    unfolded
        What could not be folded and stands in the graph in standard operators: right, but not as small as planned.
    """

    model: ir.Model
    alignment: Mapping[str, IntArray]
    unfolded: tuple[str, ...] = ()


def rewrite(model: ir.Model, plan: Plan, work: Work = NOWHERE) -> Compiled:
    """Apply a plan to a canonical model; the model itself stays as it is. New weights of a large one are put aside."""
    copy = model.clone()
    copy.graph.meta[SHELF] = work.shelf(weight_bytes(model))
    alignment: Mapping[str, IntArray] = {}
    unfolded: tuple[str, ...] = ()
    if plan.sites:
        for step in compiling(plan):
            step(copy)
            if isinstance(step, RemoveDeadUnits):
                alignment = step.alignment
                unfolded = tuple(node.outputs[0].name or "" for node in copy.graph if node.domain == DIALECT)
    del copy.graph.meta[SHELF]
    return Compiled(copy, alignment, unfolded)
