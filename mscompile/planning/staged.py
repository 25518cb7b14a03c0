"""A forward pass in stages: what leads to one place is computed once, and the next place reached from there.

To go through a network site by site, running it from the start up to each, costs the square of its depth; in stages, as much
as one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx

from mscompile.intake.samples import Samples
from mscompile.runs.work import NOWHERE, Work
from mscompile.runtime import Arrays, Session
from mscompile.verification.skeletons import Skeleton, Weights

NO_ARRAYS = ("Sequence", "Optional")
"""What operators are called that give or take something else than arrays, which cannot be held: such graphs run in one."""

NONE: Weights = MappingProxyType({})


@dataclass(frozen=True)
class Ahead:
    """What lies between the place that a pass has reached and some tensors, opened to be run."""

    names: Sequence[str]
    _session: Session | None
    _held: Sequence[Arrays]
    _weights: Weights

    def run(self, number: int, given: Arrays | None = None) -> Arrays:
        """The tensors for one batch; `given` are the graph's inputs that neither samples nor weights hold."""
        batch = {**self._held[number], **self._weights, **(given or {})}
        found = {} if self._session is None else self._session.run({name: batch[name] for name in self._session.inputs})
        return {name: found[name] if name in found else batch[name] for name in self.names}


class StagedPass:
    """Samples on their way through a graph.

    Weights may be others from stage to stage, as long as those before the places reached stay. Where they are inputs of the
    graph, what lies ahead is opened once for all of them.

    Parameters
    ----------
    samples
        What goes in. Between stages the arrays that are still needed are held, put aside where there are many.
    """

    def __init__(self, graph: Skeleton, samples: Samples, batch_size: int, work: Work = NOWHERE) -> None:
        self._graph, self._work = graph, work
        nodes = self._nodes = list(graph.proto.graph.node)
        self._reads = [set(_reads(node)) for node in nodes]
        self._maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
        self._held: list[Arrays] = [dict(batch) for batch in samples.batches(batch_size)]
        self._inputs = {value.name: value for value in graph.proto.graph.input}
        self._given = self._inputs.keys() - self._held[0].keys() - {tensor.name for tensor in graph.proto.graph.initializer}
        self._varying = self._behind_inputs()
        self._done: set[int] = set()
        self._sessions: dict[tuple[tuple[str, ...], ...], Session] = {}
        self._arrays = not any(word in node.op_type for node in nodes for word in NO_ARRAYS)

    def advance(self, names: Sequence[str], weights: Weights) -> Iterator[Arrays]:
        """The named tensors, batch by batch. To be taken to the end."""
        needed = self._needed(names)
        done = self._done | (needed & self._varying if self._arrays else set())
        later = {name for i in self._varying - done for name in self._reads[i]}
        later |= {value.name for value in self._graph.proto.graph.output}
        made = {name for i in needed & done for name in self._nodes[i].output if name in later}
        stage, shelf = self._open(needed, sorted(made | {*names}), weights), None
        for number, batch in enumerate(self._held):
            found = stage.run(number)
            if shelf is None:
                shelf = self._work.shelf(len(self._held) * sum(found[name].nbytes for name in made))
            left = {name: array for name, array in batch.items() if name in later}
            self._held[number] = left | {name: shelf.put(found[name]) for name in made}
            yield {name: found[name] for name in names}
        self._done = done
        self._sessions.clear()

    def follows(self, name: str, weights: Weights) -> bool:
        """Whether a tensor takes no inputs but the samples and weights."""
        given = self._given - weights.keys()
        return given.isdisjoint(name for i in self._needed([name]) for name in self._reads[i])

    def ahead(self, names: Sequence[str], weights: Weights, given: Weights = NONE) -> Ahead:
        """What leads from the place reached to the named tensors.

        Parameters
        ----------
        given
            Tensors that every run is to be given, as they are in any batch: what leads to them alone is not run.
        """
        return self._open(self._needed(names, given), names, weights, given)

    def outputs(self, names: Sequence[str], weights: Weights, given: Sequence[Arrays] = ()) -> Arrays:
        """Outputs of the graph for all samples, from the place reached and what is given, batch by batch."""
        ahead = self.ahead(names, weights, given[0] if given else NONE)
        found = [ahead.run(number, given[number] if given else None) for number in range(len(self._held))]
        return {name: np.concatenate([part[name] for part in found]) for name in names}

    def _behind_inputs(self) -> set[int]:
        """Numbers of nodes that depend on what goes in; the others are computed wherever they are needed."""
        names, found = {*self._inputs}, set()
        for i, node in enumerate(self._nodes):
            if self._reads[i] & names:
                found.add(i)
                names.update(node.output)
        return found

    def _needed(self, names: Iterable[str], given: Weights = NONE) -> set[int]:
        """Numbers of nodes between what is held or given and the named tensors."""
        found, known = set[int](), self._held[0].keys() | given.keys()
        ahead = [name for name in names if name not in known]
        while ahead:
            maker = self._maker.get(ahead.pop())
            if maker is not None and maker not in found:
                found.add(maker)
                ahead += [name for name in self._reads[maker] if name not in known]
        return found

    def _open(self, numbers: set[int], names: Sequence[str], weights: Weights, given: Weights = NONE) -> Ahead:
        """These nodes as a graph of their own, whose session serves other weights as well where all of them are inputs."""
        wanted = tuple(name for name in names if name not in self._held[0] and name not in given)
        read = {name for i in numbers for name in self._reads[i]}
        serves = read.isdisjoint(weights.keys() - self._given)
        key = wanted, tuple(given)
        session = self._sessions.get(key) if serves else None
        if wanted and session is None:
            session = self._session(numbers, read, wanted, weights, given)
            if serves:
                self._sessions[key] = session
        return Ahead(names, session, self._held, weights)

    def _session(self, numbers: set[int], read: set[str], names: Iterable[str], weights: Weights, given: Weights) -> Session:
        whole, held, part = self._graph.proto, {**self._held[0], **given}, onnx.ModelProto()
        part.CopyFrom(
            onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        )
        part.graph.name = whole.graph.name
        part.graph.node.extend(self._nodes[i] for i in sorted(numbers))
        part.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in read)
        part.graph.sparse_initializer.extend(t for t in whole.graph.sparse_initializer if t.values.name in read)
        for name in sorted(read & (self._inputs.keys() | held.keys())):
            if name not in self._inputs:
                kind = onnx.helper.np_dtype_to_tensor_dtype(held[name].dtype)
                part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * held[name].ndim))
            else:
                part.graph.input.append(self._inputs[name])
        part.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        return Session(self._graph.with_graph(part, weights), spin=False)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs take from around it among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inside |= {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in _reads(inner) if name not in inside)
            yield from (value.name for value in graph.output if value.name not in inside)
