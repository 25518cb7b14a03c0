"""Reading a graph as a structural causal model: its units, where they are read, and which may be removed.

A *unit* is a class of indices that live and die together: index j of a created axis, and every index that operators link
or move it to. Axes of one unit set form a *group* (one retained set); a *site* is a tensor and channel axis that operators
with a weight read, and its *readers* are those operators. The reading is one forward walk over the axis signatures of
`mscompile.operators` with a union-find over indices; it is linear in the graph and in the number of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.operators import Dim, IntArray, NodeView, Port, Shape, Signature, is_parameter, signature
from mscompile.operators.backward import FLOATS


@dataclass(frozen=True)
class Refusal:
    """Why something is left alone: the node, its operator, and the reason as a clause after the node's name."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node!r} {self.reason}" if self.operator else f"{self.node!r} {self.reason}"


@dataclass(frozen=True)
class Slot:
    """A parameter axis that carries units: axis `axis` of operand `operand` of a node; `units[i]` is index i's unit."""

    node: ir.Node
    operand: int
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Creator:
    """A node at whose output units begin: its weight (and bias) slots and the output axis they label."""

    node: ir.Node
    slots: tuple[Slot, ...]
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Reader:
    """A node that contracts a site with a weight.

    Attributes
    ----------
    node
        The node.
    signature
        Its axis signature; `signature.linear` says how a replacement folds.
    entry
        The node through which the site's tensor enters on its way here: the reader itself, or movement before it.
    data_axis, axis
        Contracted axes of the data and of the weight operand.
    index
        ``index[i]`` is the site's channel that weight column i meets; a channel read at m places occurs m times.
    units
        ``units[i]`` is the unit that weight column i meets.
    """

    node: ir.Node
    signature: Signature
    entry: ir.Node
    data_axis: int
    axis: int
    index: IntArray
    units: IntArray

    @property
    def weight(self) -> ir.Value:
        """The weight operand."""
        value = self.node.inputs[self.signature.linear.weight]  # type: ignore[union-attr]
        assert value is not None
        return value

    def columns(self, size: int) -> npt.NDArray[np.float64]:
        """[channels, places, rest]: the weight in float64, in the order of a site's `size` channels."""
        tensor = self.weight.const_value
        assert tensor is not None
        weight = np.moveaxis(tensor.numpy().astype(np.float64), self.axis, 0)
        return weight[np.argsort(self.index, kind="stable")].reshape(size, -1, *weight.shape[1:])

    @property
    def border(self) -> bool:
        """Whether a constant channel is more than a bias to this reader."""
        return self.signature.linear.border  # type: ignore[union-attr]


@dataclass(frozen=True)
class Site:
    """A tensor and channel axis where one set of units is read.

    `refusal` is set where the units cannot be removed exactly; such a site is left alone.
    """

    tensor: str
    axis: int
    units: IntArray
    readers: tuple[Reader, ...]
    group: int
    refusal: Refusal | None

    @property
    def size(self) -> int:
        """Number of channels of the tensor on the channel axis."""
        return len(self.units)

    @property
    def border(self) -> bool:
        """Whether some reader needs a carrier channel for constants."""
        return any(reader.border for reader in self.readers)


@dataclass(frozen=True)
class Scm:
    """A graph read as a structural causal model.

    Attributes
    ----------
    model
        The graph. It is only read.
    shapes
        Shape of every tensor as far as inference knows it.
    sites
        In topological order of their tensors.
    creators, slots
        Where units begin, and every parameter axis that follows them.
    axes
        Units on each labelled axis of each computed tensor.
    signatures
        Axis signature, or reason for a barrier, of each node.
    frozen
        Units that must stay, with the reason.
    """

    model: ir.Model
    shapes: Mapping[str, Shape]
    sites: tuple[Site, ...]
    creators: tuple[Creator, ...]
    slots: tuple[Slot, ...]
    axes: Mapping[tuple[str, int], IntArray]
    signatures: Mapping[ir.Node, Signature | str]
    frozen: Mapping[int, Refusal]

    def site(self, tensor: str) -> Site:
        """Site of that tensor name; KeyError if there is none."""
        for site in self.sites:
            if site.tensor == tensor:
                return site
        raise KeyError(tensor)

    def creators_of(self, units: IntArray) -> tuple[Creator, ...]:
        """Creators that share a unit with `units`."""
        return tuple(c for c in self.creators if np.isin(c.units, units).any())


def infer_shapes(model: ir.Model, bound: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Shape]:
    """Shape of every tensor of the main graph, by onnx shape inference on a copy.

    Parameters
    ----------
    model
        Left as it is.
    bound
        Concrete shapes of graph inputs; with them every inferable dimension comes out as a number.
    """
    copy = model.clone()
    if bound is not None:
        kept = {id(v) for v in copy.graph.inputs} | {id(v) for v in copy.graph.initializers.values()}
        for value in _values(copy.graph):
            if id(value) not in kept:
                value.shape = None
        for value in copy.graph.inputs:
            if value.name is not None and value.name in bound:
                value.shape = ir.Shape(bound[value.name])
    copy = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy).model
    shapes: dict[str, Shape] = {}
    for value in _values(copy.graph):
        shape = value.shape if value.const_value is None else value.const_value.shape
        if value.name and shape is not None:
            shapes[value.name] = tuple(size_of(d) for d in shape)
    return shapes


def size_of(dim: int | ir.SymbolicDimProtocol) -> Dim:
    """A dimension as a number or name; some exporters write -1 where it is free."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def label(node: ir.Node) -> str:
    """A node's name, or that of its first output where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), "") or "?"


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of a node take in, from wherever they come; most nodes have none."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs: Iterable[ir.Graph] = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        else:
            continue
        for graph in graphs:
            yield from graph.outputs
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (v for v in inner.inputs if v is not None)


def read_scm(model: ir.Model) -> Scm:
    """Read a canonical model (nodes sorted, weights in initializers) as a structural causal model."""
    shapes = infer_shapes(model)
    walk = _Walk(shapes, model.graph.opset_imports.get("", 1))
    for node in model.graph:
        walk.visit(node)
    for value in model.graph.outputs:
        walk.freeze_value(value, Refusal(value.name or "?", "", "is a model output"))
    return walk.result(model)


@dataclass
class _Read:
    """A contraction met on the walk."""

    node: ir.Node
    signature: Signature
    data: Port
    weight_axis: int


@dataclass
class _Walk:
    """The state of the forward walk: units per axis, a union-find over units, and what is frozen."""

    shapes: Mapping[str, Shape]
    opset: int
    parent: list[int] = field(default_factory=list)
    axes: dict[ir.Value, dict[int, IntArray]] = field(default_factory=dict)
    frozen: dict[int, Refusal] = field(default_factory=dict)
    creators: list[Creator] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)
    signatures: dict[ir.Node, Signature | str] = field(default_factory=dict)

    # -- union-find --

    def find(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def unite(self, a: IntArray, b: IntArray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.find(i), self.find(j)))
            self.parent[high] = low

    def roots(self, units: IntArray) -> IntArray:
        return np.array([self.find(u) for u in units.tolist()], dtype=np.int64)

    # -- freezing --

    def freeze(self, units: IntArray, refusal: Refusal) -> None:
        for unit in units.tolist():
            self.frozen.setdefault(unit, refusal)

    def freeze_value(self, value: ir.Value, refusal: Refusal) -> None:
        for units in self.labels(value).values():
            self.freeze(units, refusal)

    # -- the walk --

    def labels(self, value: ir.Value | None) -> dict[int, IntArray]:
        """Units by axis of a value."""
        return {} if value is None else self.axes.get(value, {})

    def visit(self, node: ir.Node) -> None:
        view = NodeView(node, self.shapes, self.opset)
        found = signature(view)
        if isinstance(found, Signature) and _says_too_little(node, found):
            found = "has a further output that is used"
        self.signatures[node] = found
        self._freeze_captured(node)
        if isinstance(found, str):
            for operand in view.live:
                self.freeze_value(node.inputs[operand], Refusal(label(node), node.op_type, found))  # type: ignore[arg-type]
            return
        covered: set[Port] = set()
        for link in found.links:
            covered.update(link)
            self._follow(view, found, link)
        for move in found.moves:
            covered.add(move.source)
            source = self.labels(view.value(move.source[0])).get(move.source[1])
            if source is None:
                continue
            target = self.axes.setdefault(node.outputs[~move.target[0]], {})
            if move.target[1] in target:
                self.freeze(source, Refusal(label(node), node.op_type, "merges two channel axes"))
            else:
                target[move.target[1]] = source[move.index]
        for operand in view.live:
            for axis, units in self.labels(node.inputs[operand]).items():
                if (operand, axis) not in covered:
                    self.freeze(units, Refusal(label(node), node.op_type, found.mixes))

    def _follow(self, view: NodeView, found: Signature, link: tuple[Port, ...]) -> None:
        node = view.node
        live = [(o, a) for o, a in link if o >= 0 and o in view.live]
        fixed = [(o, a) for o, a in link if o >= 0 and o not in view.live]
        outs = [(o, a) for o, a in link if o < 0]
        arrays = [self.labels(view.value(o)).get(a) for o, a in live]
        known = [a for a in arrays if a is not None]
        if not live and outs and fixed:
            self._create(view, fixed, outs)
        elif not known:
            return
        elif not outs:
            self._contract(view, found, live, fixed, known)
        elif len(known) < len(live) or len({len(a) for a in known}) > 1:
            refusal = Refusal(label(node), node.op_type, "joins them with a computed tensor that has no units there")
            for units in known:
                self.freeze(units, refusal)
        else:
            for other in known[1:]:
                self.unite(known[0], other)
            for out, axis in outs:
                self.axes.setdefault(node.outputs[~out], {})[axis] = known[0]
            self.slots += [Slot(node, o, a, known[0]) for o, a in fixed]

    def _create(self, view: NodeView, fixed: list[Port], outs: list[Port]) -> None:
        shape = view.shape(fixed[0][0])
        size = shape[fixed[0][1]] if shape is not None else None
        if not isinstance(size, int):
            return
        units = np.arange(len(self.parent), len(self.parent) + size, dtype=np.int64)
        self.parent.extend(units.tolist())
        slots = tuple(Slot(view.node, o, a, units) for o, a in fixed)
        self.slots += slots
        for out, axis in outs:
            self.axes.setdefault(view.node.outputs[~out], {})[axis] = units
            self.creators.append(Creator(view.node, slots, axis, units))

    def _contract(
        self, view: NodeView, found: Signature, live: list[Port], fixed: list[Port], known: list[IntArray]
    ) -> None:
        node, linear = view.node, found.linear
        reason = "contracts two computed tensors" if len(live) > 1 else "contracts in a way that nothing folds into"
        if linear is not None and len(live) == len(fixed) == 1 and (live[0][0], fixed[0][0]) == (linear.data, linear.weight):
            weight = node.inputs[linear.weight]
            assert weight is not None
            assert weight.const_value is not None
            if node.inputs.count(node.inputs[linear.data]) > 1:
                reason = "reads them twice"
            elif weight.const_value.dtype in FLOATS:
                self.reads.append(_Read(node, found, live[0], fixed[0][1]))
                self.slots.append(Slot(node, *fixed[0], known[0]))
                return
            else:
                reason = f"has a weight of type {weight.const_value.dtype.name}"
        for units in known:
            self.freeze(units, Refusal(label(node), node.op_type, reason))

    def _freeze_captured(self, node: ir.Node) -> None:
        refusal = Refusal(label(node), node.op_type, "uses them inside a subgraph")
        for value in captured(node):
            self.freeze_value(value, refusal)

    # -- the result --

    def result(self, model: ir.Model) -> Scm:
        root = self.roots(np.arange(len(self.parent), dtype=np.int64))
        frozen: dict[int, Refusal] = {}
        for unit, refusal in self.frozen.items():
            frozen.setdefault(int(root[unit]), refusal)
        axes = {(v.name or "", axis): root[units] for v, labels in self.axes.items() for axis, units in labels.items()}
        slots = tuple(Slot(s.node, s.operand, s.axis, root[s.units]) for s in self.slots)
        creators = tuple(
            Creator(c.node, tuple(Slot(s.node, s.operand, s.axis, root[s.units]) for s in c.slots), c.axis, root[c.units])
            for c in self.creators
        )
        return Scm(model, self.shapes, self._sites(root, axes, frozen), creators, slots, axes, self.signatures, frozen)

    def _sites(
        self, root: IntArray, axes: Mapping[tuple[str, int], IntArray], frozen: Mapping[int, Refusal]
    ) -> tuple[Site, ...]:
        groups = _components(axes.values(), len(root))
        readers: dict[tuple[ir.Value, int], list[Reader]] = {}
        for read in self.reads:
            value = read.node.inputs[read.data[0]]
            assert value is not None
            tensor, axis, index, entry = self._origin(value, read.data[1], read.node)
            units = root[self.axes[value][read.data[1]]]
            readers.setdefault((tensor, axis), []).append(
                Reader(read.node, read.signature, entry, read.data[1], read.weight_axis, index, units)
            )
        order = {node: i for i, node in enumerate(self.signatures)}
        sites = []
        for (tensor, axis), found in sorted(readers.items(), key=lambda kv: order[kv[0][0].producer()]):  # type: ignore[index]
            units = axes[tensor.name or "", axis]
            refusal = next((frozen[u] for u in units.tolist() if u in frozen), None)
            reason = self._irregular(tensor, axis, units, [a for t, a in readers if t is tensor])
            if refusal is None and reason is not None:
                refusal = Refusal(tensor.name or "?", "", reason)
            sites.append(Site(tensor.name or "?", axis, units, tuple(found), int(groups[units[0]]), refusal))
        return tuple(sites)

    def _irregular(self, tensor: ir.Value, axis: int, units: IntArray, axes: Sequence[int]) -> str | None:
        """Why units cannot be replaced at a tensor, if so."""
        if axis == 0:
            return "holds units on axis 0, which is taken for the samples"
        if len(axes) > 1:
            return "is read on several of its axes"
        if tensor.name not in self.shapes:
            return "has no known rank"
        if len(set(units.tolist())) < len(units):
            return "holds a unit at several places"
        return None

    def _origin(self, value: ir.Value, axis: int, reader: ir.Node) -> tuple[ir.Value, int, IntArray, ir.Node]:
        """The tensor furthest up from which only movement leads to `value`, where each unit has one channel.

        Returns the tensor, its channel axis, for each index of `value` on `axis` its channel there, and the node that
        takes the tensor in.
        """
        index, entry = np.arange(len(self.axes[value][axis]), dtype=np.int64), reader
        while (node := value.producer()) is not None:
            found = self.signatures[node]
            if not isinstance(found, Signature) or not found.moving or not self._only_read(value):
                break
            step = self._step_up(node, found, axis)
            if step is None:
                break
            value, axis, places = step
            index, entry = places[index], node
        return value, axis, index, entry

    def _step_up(self, node: ir.Node, found: Signature, axis: int) -> tuple[ir.Value, int, IntArray] | None:
        """The labelled input axis that a moving node's output axis comes from."""
        for move in found.moves:
            source = node.inputs[move.source[0]]
            if move.target == (~0, axis) and source is not None and move.source[1] in self.labels(source):
                return source, move.source[1], move.index
        for link in found.links:
            if (~0, axis) in link:
                for operand, source_axis in link:
                    source = node.inputs[operand] if operand >= 0 else None
                    if source is not None and source_axis in self.labels(source):
                        size = len(self.labels(source)[source_axis])
                        return source, source_axis, np.arange(size, dtype=np.int64)
        return None

    def _only_read(self, value: ir.Value) -> bool:
        """Whether movement and contraction with a weight are all that happens to a value."""
        if value.is_graph_output():
            return False
        reading = {read.node for read in self.reads if read.node.inputs[read.data[0]] is value}
        for node, _ in value.uses():
            found = self.signatures.get(node)
            moving = isinstance(found, Signature) and found.moving
            if node not in reading and not (moving and all(self._only_read(out) for out in node.outputs)):
                return False
        return True


def _says_too_little(node: ir.Node, found: Signature) -> bool:
    """Whether something uses an output behind the first that the signature does not speak of."""
    spoken_of = {operand for link in found.links for operand, _ in link} | {move.target[0] for move in found.moves}
    return any(
        ~i not in spoken_of and (value.uses() or value.is_graph_output()) for i, value in enumerate(node.outputs) if i > 0
    )


def _components(arrays: Iterable[IntArray], count: int) -> IntArray:
    """Connected components of units that share an axis, numbered by their first unit."""
    parent = np.arange(count, dtype=np.int64)

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for units in arrays:
        first = find(int(units[0]))
        for unit in units[1:].tolist():
            other = find(unit)
            if other != first:
                low, first_high = sorted((first, other))
                parent[first_high] = low
                first = low
    return np.array([find(i) for i in range(count)], dtype=np.int64)


def parameters(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers that no caller can override."""
    return (v for v in model.graph.initializers.values() if is_parameter(v))
