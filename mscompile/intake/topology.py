"""The order of a model's nodes: single assignment, no cycle, nothing dangling, nothing that explodes once written out."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from mscompile.intake.vetting import quoted, rejected, too_large

MOST_NODES = 1_000_000
"""Nodes of a model with its functions written out, at most."""
DEEPEST = 64
"""Functions and branches within each other, at most."""

Key = tuple[str, str, str]


def check_expansion(proto: onnx.ModelProto, where: Path) -> None:
    """Count the nodes of the graph with all functions written out: libraries inline them before anything else.

    Raises
    ------
    ModelError
        A function calls itself, or is defined twice.
    ResourceError
        There are too many nodes, or calls within calls.
    """
    functions = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    if len(functions) < len(proto.functions):
        raise rejected(where, "a function is defined twice")
    sizes: dict[Key, int] = {}

    def size(nodes: Iterable[onnx.NodeProto], path: tuple[Key, ...], depth: int) -> int:
        if depth > DEEPEST:
            why = f"functions and branches lie within each other more than {DEEPEST} deep"
            raise too_large(where, why, "export it without nested functions")
        total = 0
        for node in nodes:
            total += 1 + sum(size(graph.node, path, depth + 1) for graph in branches(node))
            key = (node.domain, node.op_type, node.overload)
            if key in path:
                raise rejected(where, f"function {quoted(node.op_type)} calls itself", "export it without recursion")
            if key in functions:
                if key not in sizes:
                    sizes[key] = size(functions[key], (*path, key), depth + 1)
                total += sizes[key]
        return total

    total = size(proto.graph.node, (), 0)
    for key, nodes in functions.items():
        size(nodes, (key,), 0)
    if total > MOST_NODES:
        why = f"its functions expand to {total:,} nodes; at most {MOST_NODES:,} are taken"
        raise too_large(where, why, "export it without nested functions")


def branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def sort_nodes(proto: onnx.ModelProto, where: Path) -> bool:
    """Sort the nodes of all graphs and functions where they are not; returns whether any was.

    Raises
    ------
    ModelError
        A name is given twice, or read and given nowhere, or nodes depend on each other in a circle.
    """
    changed = _sort_graph(proto.graph, [], where)
    for function in proto.functions:
        changed |= _sort(function, set(function.input), list(function.output), [], where)
    return changed


def _sort_graph(graph: onnx.GraphProto, outer: list[set[str]], where: Path) -> bool:
    stored = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    inputs = [value.name for value in graph.input]
    for names, kind in ((stored, "initializer"), (inputs, "input")):
        if len(set(names)) < len(names):
            raise rejected(where, f"{kind} {quoted(_twice(names))} is there more than once")
    return _sort(graph, {*stored, *inputs}, [value.name for value in graph.output], outer, where)


def _twice(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _sort(
    graph: onnx.GraphProto | onnx.FunctionProto, given: set[str], results: Sequence[str], outer: list[set[str]], where: Path
) -> bool:
    """Sort one graph and those within it, which may read what the `outer` ones have."""
    nodes = list(graph.node)
    producer: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in producer or name in given:
                raise rejected(where, f"{_title(node)} gives {quoted(name)}, which is given already")
            producer[name] = i
    scopes = [*outer, given | producer.keys()]
    needed: list[set[int]] = []
    for i, node in enumerate(nodes):
        names = _reads(node)
        for name in names:
            if not any(name in scope for scope in reversed(scopes)):
                raise rejected(where, f"{_title(node)} reads {quoted(name)}, which nothing gives")
        needed.append({producer[name] for name in names if name in producer})
        if i in needed[i]:
            raise rejected(where, f"{_title(node)} reads what it gives itself", "export it without cycles")
    for name in results:
        if not any(name in scope for scope in reversed(scopes)):
            raise rejected(where, f"output {quoted(name)} is given by nothing")
    changed = False
    if any(max(before, default=-1) > i for i, before in enumerate(needed)):
        order = _order(needed)
        if len(order) < len(nodes):
            stuck = nodes[min(set(range(len(nodes))).difference(order))]
            raise rejected(where, f"{_title(stuck)} is in a cycle or behind one", "export it without cycles")
        copies = [onnx.NodeProto.FromString(nodes[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(copies)
        changed = True
    for node in graph.node:
        for branch in branches(node) if node.attribute else ():
            changed |= _sort_graph(branch, scopes, where)
    return changed


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node needs: its inputs, and what graphs within it take from around them."""
    names = set(filter(None, node.input))
    for branch in branches(node) if node.attribute else ():
        own = {v.name for v in branch.input} | {t.name for t in branch.initializer}
        own |= {t.values.name for t in branch.sparse_initializer}
        own |= {name for inner in branch.node for name in inner.output}
        used = {v.name for v in branch.output}.union(*(_reads(inner) for inner in branch.node))
        names |= used - own
    return names


def _order(needed: Sequence[set[int]]) -> list[int]:
    """Indices so that each comes after those it needs, otherwise as they were; those in cycles are missing."""
    users: dict[int, list[int]] = {}
    for i, before in enumerate(needed):
        for j in before:
            users.setdefault(j, []).append(i)
    open_inputs = [len(before) for before in needed]
    ready = [i for i, count in enumerate(open_inputs) if not count]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for user in users.get(i, ()):
            open_inputs[user] -= 1
            if not open_inputs[user]:
                heapq.heappush(ready, user)
    return order


def _title(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {quoted(node.name or next(filter(None, node.output), ''))}"


def name_nodes(model: ir.Model) -> list[str]:
    """Give every node of a graph a name of its own, as onnxruntime requires; returns what was changed, in sentences."""
    renamed: list[str] = []
    unnamed = 0
    for graph in model.graphs():
        taken = {node.name for node in graph}
        met: set[str] = set()
        numbers: dict[str, Iterator[int]] = {}
        for node in graph:
            if not node.name or node.name in met:
                stem = node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type
                name = stem
                while name in taken:
                    name = f"{stem}.{next(numbers.setdefault(stem, itertools.count(1)))}"
                if node.name:
                    renamed.append(f"{quoted(node.name)} → {quoted(name)}")
                else:
                    unnamed += 1
                taken.add(name)
                node.name = name
            met.add(node.name)
    notes = []
    if renamed:
        more = f" and {len(renamed) - 3} more" if len(renamed) > 3 else ""
        notes.append(f"nodes of the same name were renamed: {', '.join(renamed[:3])}{more}")
    if unnamed:
        notes.append(f"{unnamed} nodes without a name were named after their outputs")
    return notes
