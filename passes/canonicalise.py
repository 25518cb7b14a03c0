"""Canonical form: what exporters write in many ways is brought into one, without changing a single output bit.

Weights in Constant nodes become initializers; Identity nodes vanish; movement of a weight is carried out; unused nodes and
initializers are dropped; nodes are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.operators import is_parameter


@dataclass(frozen=True)
class RemoveIdentities(ir.passes.InPlacePass):
    """Users of an Identity use its input. Where it makes a model output, that name goes to its input, if it is free to.

    onnx-ir's own pass of this kind takes away the name of an output that is passed on as another one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            source = node.inputs[0] if node.op_type == "Identity" and node.domain in ("", "ai.onnx") else None
            if source is None or node.graph is None:
                continue
            target, producer = node.outputs[0], source.producer()
            if target.is_graph_output():
                if source.is_graph_output() or producer is None or producer.graph is not node.graph:
                    continue
                source.name, source.shape, source.type = target.name, target.shape or source.shape, target.type
            ir.convenience.replace_all_uses_with(target, source, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class FoldWeightTranspose(ir.passes.InPlacePass):
    """``Transpose(weight)`` becomes a stored weight: the readers' axis signatures want weights at hand."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
                continue
            source, target = node.inputs[0], node.outputs[0]
            if source is None or not is_parameter(source) or target.is_graph_output():
                continue
            assert source.const_value is not None
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            turned = np.ascontiguousarray(np.transpose(source.const_value.numpy(), order))
            name = target.name
            target.name = None
            tensor = ir.tensor(turned, dtype=source.const_value.dtype, name=name)
            stored = ir.Value(name=name, shape=ir.Shape(turned.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(stored)
            target.replace_all_uses_with(stored)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


CANONICALISE = ir.passes.Sequential(
    common.TopologicalSortPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    RemoveIdentities(),
    FoldWeightTranspose(),
    common.RemoveUnusedNodesPass(),
)
