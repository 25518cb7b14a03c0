"""Graph rewriting: the passes, in the order they run.

A pass is a frozen dataclass; its fields are its options. `WriteReplacements` approximates, as planned; every other pass
preserves the function, which the tests check by running the graph before and after.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.passes.canonicalise import CANONICALISE
from mscompile.passes.carry import FoldCarriers
from mscompile.passes.fold import FoldReplacements
from mscompile.passes.narrow import RemoveDeadUnits
from mscompile.passes.replace import LowerReplacements, WriteReplacements
from mscompile.planning.plan import Plan

__all__ = [
    "CANONICALISE",
    "FoldCarriers",
    "FoldReplacements",
    "LowerReplacements",
    "RemoveDeadUnits",
    "WriteReplacements",
    "compiling",
]


def compiling(plan: Plan) -> tuple[ir.passes.PassBase, ...]:
    """The passes that carry out a plan on a canonical model, in order."""
    return (
        WriteReplacements(plan),
        FoldReplacements(),
        FoldCarriers(),
        RemoveDeadUnits(tensors=frozenset(site.tensor for site in plan.sites)),
        LowerReplacements(),
        common.RemoveUnusedNodesPass(),
    )
