"""tau inferred from weights: which unit of the dense model each unit of the compiled one is.

For pairs that carry no record of it, whoever made them. Linear operators of both models are paired in order; a unit is
known by its weights: the row that produces it and, where the outputs of its reader correspond one to one, the column that
reads it. Rows are compared by the cosine of their angle, sign apart, so that scaling by folded batch normalisation or by
quantisation does not matter; columns into which something was folded still point in nearly the same direction. What is not
clear is left out, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import scipy.optimize

from mscompile.operators import IntArray
from mscompile.runtime import Session
from mscompile.verification.skeletons import Skeleton, weightless

Array = npt.NDArray[np.float64]

LIKE = 0.5
"""Least cosine between a unit's weights in both models: folds turn them, by far less than chance would."""
CLEAR = 0.05
"""Least distance in cosine from the unit that comes second."""
MOST = 0.5
"""Share of a layer's units that must be clear: fewer may be like strangers by chance."""
WEIGHTS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3}
"""Linear operators, and which operand is their weight."""
CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "QLinearConv"})
ALONG = frozenset(
    (
        *("BatchNormalization", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish"),
        *("Tanh", "Softplus", "Softsign", "Gelu", "Erf", "Mish", "Clip", "ThresholdedRelu", "Cast", "Identity", "Dropout"),
        *("QuantizeLinear", "DequantizeLinear", "Add", "Sub", "Mul", "Div"),
    )
)
"""Operators that act on every channel alone, given that their other operands are constants or scales."""
BACK = ALONG | frozenset(
    (
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "ReduceMean", "Pad", "Resize"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "DynamicQuantizeLinear"),
        *("LayerNormalization", "InstanceNormalization", "Softmax"),
    )
)
"""Operators through which the inputs of a linear operator are followed back to the units they come from."""


@dataclass(frozen=True)
class Layer:
    """A linear operator with its weight at hand.

    Attributes
    ----------
    name
        Its first output.
    stored, zero
        [outputs, inputs, taps] as they are kept, and their zero points.
    grouped
        Whether it is a grouped convolution, whose inputs are not those of the whole tensor.
    data
        Tensor read.
    site
        Tensor that holds its outputs after what acts on each channel alone; `axis` counts from the end for products.
    ends
        Whether the site is an output of the model.
    """

    name: str
    stored: npt.NDArray[np.generic]
    zero: Array | float
    grouped: bool
    data: str
    site: str
    axis: int
    ends: bool

    @property
    def weight(self) -> Array:
        """[outputs, inputs, taps]; computed anew each time, so that one at a time is in memory."""
        zero = self.zero.reshape(-1, 1, 1) if isinstance(self.zero, np.ndarray) and self.zero.ndim else self.zero
        weight: Array = self.stored.astype(np.float64) - zero
        return weight


@dataclass(frozen=True)
class Match:
    """One site matched.

    Attributes
    ----------
    dense, compiled
        Tensors.
    axis
        Of the channels, from the end for products.
    kept, places
        Pairs of channels; those that were not clear are left out.
    size, width
        Channels in either model.
    likeness, margin
        Mean cosine of the pairs, and the least distance to the second best.
    """

    dense: str
    compiled: str
    axis: int
    kept: IntArray
    places: IntArray
    size: int
    width: int
    likeness: float
    margin: float


def infer(dense: onnx.ModelProto | Skeleton, compiled: onnx.ModelProto | Skeleton) -> tuple[list[Match], list[str]]:
    """Match sites by weights; also the reasons for what could not be matched."""
    skeletons = weightless(dense), weightless(compiled)
    ours, theirs = (list(_layers(model)) for model in skeletons)
    if len(ours) != len(theirs) or any(
        (a.axis, a.grouped) != (b.axis, b.grouped) for a, b in zip(ours, theirs, strict=False)
    ):
        return [], [f"the models differ in structure: {len(ours)} linear operators with weights, and {len(theirs)}"]
    origins = _origins(skeletons[0].proto, ours), _origins(skeletons[1].proto, theirs)
    found: dict[int, Match | None] = {}
    reasons: list[str] = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.ends or number == len(ours) - 1:
            continue
        inputs = _input_orders(number, origins, ours, theirs, found)
        match = max((_match(a, b, i, _readers(number, origins, ours, theirs)) for i in inputs), key=_trust, default=None)
        found[number] = match if match is not None and len(match.kept) >= MOST * match.width else None
        if not inputs:
            reasons.append(f"{a.name}: its inputs cannot be followed back to units that are matched")
        elif found[number] is None:
            clear = 0 if match is None else len(match.kept)
            reasons.append(f"{a.name}: only {clear} of {len(b.stored)} units of {b.name} are clearly units of it")
        elif match is not None and len(match.kept) < match.width:
            unclear = match.width - len(match.kept)
            reasons.append(f"{a.name}: {unclear} of {match.width} units are not clear, and left out")
    return [match for match in found.values() if match is not None], reasons


def _trust(match: Match) -> float:
    return match.likeness * len(match.kept)


def _match(a: Layer, b: Layer, inputs: IntArray, readers: Iterable[tuple[Array, Array]]) -> Match:
    """Pair the units of two layers; `inputs` are the dense inputs that the compiled ones are."""
    left = a.weight if a.grouped or len(inputs) == 0 else a.weight[:, inputs]
    likeness = _cosines(b.weight.reshape(len(b.stored), -1), left.reshape(len(a.stored), -1))
    columns = [_cosines(y, x) for x, y in readers]
    if columns:
        likeness = (likeness + np.mean(columns, axis=0)) / 2
    size, width = len(a.stored), len(b.stored)
    if width > size:
        return Match(a.site, b.site, a.axis, np.zeros(0, np.int64), np.zeros(0, np.int64), size, width, 0.0, 0.0)
    places, kept = scipy.optimize.linear_sum_assignment(likeness, maximize=True)
    if width == size and (np.diag(likeness) >= likeness.max(axis=1) - CLEAR).all():
        kept = np.arange(size)  # nothing was taken out and nothing speaks for another order
    best = likeness[places, kept]
    rest = likeness.copy()
    rest[places, kept] = -1.0
    margin = best - np.maximum(rest.max(axis=1), rest.max(axis=0)[kept]) if size > 1 else best
    clear = (best >= LIKE) & (margin >= CLEAR)
    order = np.argsort(kept[clear])
    return Match(
        a.site,
        b.site,
        a.axis,
        kept[clear][order].astype(np.int64),
        places[clear][order].astype(np.int64),
        size,
        width,
        float(best[clear].mean()) if clear.any() else 0.0,
        float(margin[clear].min()) if clear.any() else 0.0,
    )


def _cosines(x: Array, y: Array) -> Array:
    """[rows of x, rows of y] cosine of the angle between rows, sign apart; 0 for rows of zeros."""
    norms = [np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float64).tiny) for z in (x, y)]
    cosines: Array = np.abs((x / norms[0]) @ (y / norms[1]).T)
    return cosines


def _input_orders(
    number: int,
    origins: tuple[dict[int, int], dict[int, int]],
    ours: list[Layer],
    theirs: list[Layer],
    found: Mapping[int, Match | None],
) -> list[IntArray]:
    """Ways in which the compiled layer's inputs may be inputs of the dense one; an empty list where none is known."""
    wide, narrow = ours[number].stored.shape[1], theirs[number].stored.shape[1]
    if ours[number].grouped:
        return [np.zeros(0, np.int64)] if wide == narrow else []
    source = origins[0].get(number)
    match = found.get(source) if source is not None and source == origins[1].get(number) else None
    if match is None or len(match.kept) < match.width:
        return [np.arange(wide)] if wide == narrow else []
    positions, rest = divmod(wide, match.size)
    if rest or narrow != positions * match.width:
        return []
    channels = np.empty(match.width, dtype=np.int64)
    channels[match.places] = match.kept
    steps = np.arange(positions)
    first = (channels[:, None] * positions + steps).ravel()  # channels before positions
    last = (steps[:, None] * match.size + channels).ravel()  # and behind them
    return [first] if positions == 1 else [first, last]


def _readers(
    number: int, origins: tuple[dict[int, int], dict[int, int]], ours: list[Layer], theirs: list[Layer]
) -> Iterator[tuple[Array, Array]]:
    """Weights [units, …] that read the units of a layer, in both models, where the readers' outputs are all there."""
    size, width = len(ours[number].stored), len(theirs[number].stored)
    for reader, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same = origins[0].get(reader) == number == origins[1].get(reader) and len(a.stored) == len(b.stored)
        if same and not a.grouped and (a.stored.shape[1], b.stored.shape[1]) == (size, width):
            yield tuple(layer.weight.transpose(1, 0, 2).reshape(layer.stored.shape[1], -1) for layer in (a, b))  # type: ignore[misc]


# --- reading a graph --------------------------------------------------------------------------------------------------


def _layers(skeleton: Skeleton) -> Iterator[Layer]:
    """Linear operators with constant weights, in the order of the graph."""
    model = skeleton.proto
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {output.name for output in model.graph.output}
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTS]
    constant = _constant_names(model)
    steady = constant | _scales(model, constant)
    operands = {name for node in nodes for name in node.input if name in constant}
    values = _evaluate(skeleton, operands)
    for node in nodes:
        name = node.input[WEIGHTS[node.op_type]]
        if name not in values or node.input[0] in constant:
            continue
        attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        weight = values[name]
        convolution = node.op_type in CONVOLUTIONS
        if not convolution:
            if weight.ndim != 2:
                continue
            weight = weight if attributes.get("transB", 0) else weight.T
        site = _follow(node.output[0], users, steady, outputs)
        yield Layer(
            node.output[0],
            weight.reshape(*weight.shape[:2], -1),
            _zero_point(node, values),
            convolution and attributes.get("group", 1) != 1,
            node.input[0],
            site,
            1 if convolution else -1,
            site in outputs,
        )


def _zero_point(node: onnx.NodeProto, values: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float64] | float:
    place = {"ConvInteger": 3, "MatMulInteger": 3, "QLinearConv": 5, "QLinearMatMul": 5}.get(node.op_type)
    if place is None or len(node.input) <= place or node.input[place] not in values:
        return 0.0
    return values[node.input[place]].astype(np.float64)


def _constant_names(model: onnx.ModelProto) -> set[str]:
    """Tensors that depend on no input."""
    names = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        plain = not any(a.HasField("g") or a.graphs for a in node.attribute) and not node.op_type.startswith("Random")
        if plain and all(name in names or not name for name in node.input):
            names.update(node.output)
    return names


def _evaluate(skeleton: Skeleton, names: Iterable[str]) -> dict[str, npt.NDArray[np.generic]]:
    """Values of constant tensors, computed by onnxruntime where they are not stored."""
    model = skeleton.proto
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {name: skeleton.array(stored[name]) for name in names if name in stored}
    asked = [name for name in names if name not in stored]
    if asked:
        producers = {name: node for node in model.graph.node for name in node.output}
        needed, waiting = set(), list(asked)
        while waiting:
            name = waiting.pop()
            if name in producers and name not in needed:
                needed.add(name)
                waiting += [i for i in producers[name].input if i]
        nodes = [node for node in model.graph.node if needed & set(node.output)]
        read = {name for node in nodes for name in node.input}
        graph = onnx.helper.make_graph(
            nodes,
            "constants",
            [],
            [onnx.ValueInfoProto(name=name) for name in asked],
            [tensor for tensor in model.graph.initializer if tensor.name in read],
        )
        alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        values |= Session(skeleton.with_graph(alone), optimise=False).run({})
    return values


def _follow(name: str, users: Mapping[str, list[onnx.NodeProto]], steady: set[str], outputs: set[str]) -> str:
    """The last tensor on the way from a linear operator along operators that act on each channel alone."""
    while name not in outputs and len(users.get(name, [])) == 1:
        node = users[name][0]
        others = [i for i in node.input if i and i != name and i not in steady]
        if node.op_type not in ALONG or others or not node.output:
            break
        name = node.output[0]
    return name


def _scales(model: onnx.ModelProto, constant: set[str]) -> set[str]:
    """Scales and zero points of dynamic quantisers, alone or times constants."""
    names: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            names.update(node.output[1:])
        elif node.op_type in ("Mul", "Cast") and set(node.input) <= names | constant and set(node.input) & names:
            names.update(node.output)
    return names


def _origins(model: onnx.ModelProto, layers: list[Layer]) -> dict[int, int]:
    """For each layer, the layer whose units it reads, where that can be followed."""
    producers = {name: node for node in model.graph.node for name in node.output}
    made_by = {layer.name: number for number, layer in enumerate(layers)}
    constant = _constant_names(model)
    found = {}
    for number, layer in enumerate(layers):
        waiting, seen = [layer.data], set()
        while waiting:
            name = waiting.pop()
            if name in made_by:
                found[number] = made_by[name]
                break
            node = producers.get(name)
            if name in seen or node is None or node.op_type not in BACK:
                continue
            seen.add(name)
            live = [i for i in node.input if i and i not in constant]
            waiting += live[::-1] if node.op_type in ("Add", "Mul", "Sub", "Div") else live[:1]
    return found
