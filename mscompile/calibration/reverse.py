"""Reverse mode as graph rewriting: λ = Jᵀv at any tensors of a graph, as nodes of the same graph.

The rules stand beside the operators' declarations (`mscompile.operators`). Only activations are differentiated, never
weights, so that a reverse pass costs about what the forward pass costs. Where an operator has no rule, the gradients of
everything before it would be incomplete: those tensors are refused, with the operator named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.errors import UnsupportedError
from mscompile.network.scm import Refusal, captured, infer_shapes, label
from mscompile.operators import NodeView, Shape, declared
from mscompile.operators.backward import OLDEST, PREFIX, Backward, Builder, NoRuleError, nothing
from mscompile.runtime import Arrays, Session


@dataclass(frozen=True)
class Gradients:
    """Gradients of ``Σ_outputs vᵀ output`` with respect to tensors.

    Attributes
    ----------
    values
        Gradient by tensor name, for those that have one. A tensor that no output depends on has none and is not refused.
    refused
        Why a tensor has no complete gradient.
    """

    values: Mapping[str, ir.Value]
    refused: Mapping[str, Refusal]


def sample_shapes(model: ir.Model, feed: Arrays) -> dict[str, Shape]:
    """Shapes of all tensors on a sample batch: inferred, and what inference cannot tell by running the model."""
    shapes = infer_shapes(model, {name: array.shape for name, array in feed.items()})
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs if v.name}
    missing = [name for name in values if any(not isinstance(d, int) for d in shapes.get(name, (None,)))]
    if not missing:
        return shapes
    copy.graph.outputs.clear()
    for name in missing:
        shape = ir.Value(name=f"{PREFIX}shape:{name}", shape=ir.Shape([None]), type=ir.TensorType(ir.DataType.INT64))
        copy.graph.append(ir.node("Shape", [values[name]], outputs=[shape]))
        copy.graph.outputs.append(shape)
    try:
        found = Session(copy).run(feed)
    except UnsupportedError:  # sequences have no shape
        return shapes
    return shapes | {name: tuple(found[f"{PREFIX}shape:{name}"].tolist()) for name in missing}


@dataclass
class _Pass:
    build: Builder
    shapes: Mapping[str, Shape]
    dtype: np.dtype[np.generic]
    wanted: frozenset[ir.Value]
    declared: Mapping[str, Shape]
    parts: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    refused: dict[ir.Value, Refusal] = field(default_factory=dict)

    def _arrive(self, value: ir.Value, gradient: ir.Value) -> None:
        """Note a part of a value's gradient, and that it is of its shape: onnxruntime fuses what it sees to agree."""
        shape = self.declared.get(value.name or "")
        if gradient.shape is None and shape is not None:
            gradient.shape, gradient.dtype = ir.Shape(shape), ir.DataType.from_numpy(self.dtype)
        if (known := self.shapes.get(value.name or "")) is not None:
            self.build.shapes.setdefault(gradient, known)
        self.parts.setdefault(value, []).append(gradient)

    def total(self, value: ir.Value) -> ir.Value | None:
        """Sum of the contributions to a value's gradient."""
        parts = self.parts.get(value)
        if not parts:
            return None
        total, *others = self._merged(parts, self.shapes.get(value.name or ""))
        for part in others:
            total = self.build.op("Add", total, part)
        self.parts[value] = [total]
        return total

    def _merged(self, parts: Sequence[ir.Value], shape: Shape | None) -> Sequence[ir.Value]:
        """Summands with all products with stored matrices as one: of the factors side by side and the matrices stacked."""
        products = self.build.products
        known = [products[part] for part in parts if part in products]
        if shape is None or len(known) < 2:
            return parts
        factors, matrices = zip(*known, strict=True)
        beside = self.build.op("Concat", *factors, axis=len(shape) - 1)
        joined = self.build.project(beside, self.build.op("Concat", *matrices, axis=0))
        return [joined, *(part for part in parts if part not in products)]

    def rule(
        self, node: ir.Node, gradients: tuple[ir.Value | None, ...], targets: Iterable[int]
    ) -> Mapping[int, ir.Value] | str:
        """Gradients of a node's inputs, or the reason why there are none."""
        row = declared(node)
        if row is None or row.reverse is None:
            return "has no reverse-mode rule"
        if self.build.opset < OLDEST:
            return f"is of opset {self.build.opset}: reverse-mode rules begin with {OLDEST}"
        view = NodeView(node, self.shapes, self.build.opset)
        try:
            return row.reverse(Backward(view, self.build, gradients, frozenset(targets), self.dtype, self.declared))
        except NoRuleError as reason:
            return str(reason)

    def visit(self, node: ir.Node) -> None:
        """Carry the gradients of a node's outputs to its inputs."""
        targets = {i: v for i, v in enumerate(node.inputs) if v is not None and v in self.wanted}
        hidden = [v for v in captured(node) if v in self.wanted]
        refusal = next((self.refused[v] for v in node.outputs if v in self.refused), None)
        gradients = tuple(self.total(v) for v in node.outputs)
        if refusal is None:
            if not (targets or hidden) or all(g is None for g in gradients):
                return
            found = "uses them inside a subgraph" if hidden else self.rule(node, gradients, targets)
            if not isinstance(found, str):
                for operand in targets.keys() & found.keys():
                    self._arrive(targets[operand], found[operand])
                return
            refusal = Refusal(label(node), node.op_type, found)
        for value in (*targets.values(), *hidden):
            self.refused.setdefault(value, refusal)


def differentiate(
    graph: ir.Graph,
    build: Builder,
    seeds: Mapping[str, ir.Value],
    tensors: Sequence[str],
    *,
    shapes: Mapping[str, Shape],
    dtype: npt.DTypeLike = np.float32,
    declared: Mapping[str, Shape] | None = None,
) -> Gradients:
    """Append the reverse pass of a graph to it.

    Parameters
    ----------
    graph
        A sorted graph; nodes are appended.
    build
        Where the nodes go. One builder for several seeds computes what they share once.
    seeds
        v by name of the output it is for, each of its output's shape.
    tensors
        Names of the tensors whose gradients are asked for.
    shapes
        Shapes for a sample batch, as concrete as can be.
    dtype
        Element type of seeds and gradients.
    declared
        Shapes as the model states them, with names for what varies; a number there spares work that only varying sizes need.
    """
    nodes = [node for node in graph if not (node.name or "").startswith(build.prefix)]
    values = {v.name: v for node in nodes for v in node.outputs}
    wanted = frozenset(_between(nodes, [values[t] for t in tensors], [values[o] for o in seeds]))
    state = _Pass(build, shapes, np.dtype(dtype), wanted, declared or {})
    for output, seed in seeds.items():
        state.parts.setdefault(values[output], []).append(seed)
    for node in reversed(nodes):
        state.visit(node)
    asked = [values[t] for t in tensors]
    return Gradients(
        {v.name or "": g for v in asked if v not in state.refused and (g := state.total(v)) is not None},
        {v.name or "": state.refused[v] for v in asked if v in state.refused},
    )


def _between(nodes: Sequence[ir.Node], starts: Sequence[ir.Value], ends: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """Values that depend on a start, more than stepwise, and on which an end depends; both included."""
    below = set(starts)
    for node in nodes:
        row = declared(node)
        if row is not None and row.reverse is nothing:
            continue
        if any(v in below for v in (*node.inputs, *captured(node)) if v is not None):
            below.update(node.outputs)
    above = set(ends)
    for node in reversed(nodes):
        if any(v in above for v in node.outputs):
            above.update(v for v in (*node.inputs, *captured(node)) if v is not None)
    return (v for v in below if v in above)


NONDECREASING = frozenset({"Relu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign"})
"""Operators of one operand with which a maximum commutes, to the bit."""


def pool_first(graph: ir.Graph, kept: Collection[str | None]) -> dict[str, str]:
    """Turn max(f(x)) into f(max(x)) where f never decreases and f(x) is not among `kept`: the way back is shorter.

    The values keep their names but for f(x), whose name goes to max(x). Gives, by that name, the tensor of the same shape.
    """
    moved: dict[str, str] = {}
    for pool in [node for node in graph if node.op_type == "MaxPool" and node.domain == "" and len(node.outputs) == 1]:
        value, pooled = pool.inputs[0], pool.outputs[0]
        act = None if value is None else value.producer()
        if value is None or act is None or act.op_type not in NONDECREASING or act.domain != "" or act.graph is not graph:
            continue
        if value.name in kept or value.is_graph_output() or len(value.uses()) > 1:
            continue
        pool.replace_input_with(0, act.inputs[0])
        ir.convenience.replace_all_uses_with(pooled, value, replace_graph_outputs=True)
        act.replace_input_with(0, pooled)
        graph.remove(act)
        graph.insert_after(pool, act)
        value.name, pooled.name = pooled.name, value.name
        value.shape = pooled.shape
        moved[pooled.name or ""] = value.name or ""
    return moved
