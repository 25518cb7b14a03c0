"""How long each operator takes at each width on this machine: measured once, kept in the user's cache.

Operators that multiply and accumulate are run alone in onnxruntime, at a few widths of the channels they read and of those
they make; between them times are interpolated, and the two shares multiplied. What a model takes is the sum over its nodes
plus what the dense one takes besides. A table is as good as its operators stand alone: a model chosen by it is measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mscompile.errors import ResourceError, UnsupportedError
from mscompile.files import staged
from mscompile.intake.documents import parse
from mscompile.machine import cache_folder, processor
from mscompile.network.costs import Costs, Counts
from mscompile.network.sizes import quickest, times_of
from mscompile.operators import NodeView, Signature, declared, is_parameter, signature
from mscompile.runtime import Session

POINT_SECONDS = 0.02
"""Time spent on one operator at one width, at least."""
POINT_RUNS = 5
"""Fewest runs of it."""
LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the channels at which operators are measured."""
ALIGNED = 16
"""Widths of feature maps at which onnxruntime's convolutions on CPU are at their best: a multiple of it takes no longer
than the widths below it down to the multiple before, and odd depthwise widths take more than twice as long."""


@dataclass
class LatencyTable:
    """Milliseconds by operator, attributes and shapes.

    Attributes
    ----------
    path
        The file it is kept in; None keeps nothing.
    """

    path: Path | None
    entries: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def open(cls, *, cache: bool = True) -> LatencyTable:
        """The table of this machine and version of onnxruntime; a file that cannot be read counts as empty."""
        if not cache:
            return cls(None)
        machine = f"{platform.machine()}-{os.cpu_count()}-{processor()}"
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in f"latency-{machine}-ort{ort.__version__}.json")
        path = cache_folder() / name
        try:
            found = {str(key): float(value) for key, value in parse(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            found = {}
        return cls(path, {key: value for key, value in found.items() if 0.0 < value < math.inf})

    def save(self) -> str | None:
        """Write what was measured; gives the reason where that fails, since a cache is not worth an error."""
        if self.path is None or not self.measured:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with staged(self.path) as draft:
                draft.write_text(json.dumps(self.entries, indent=0, sort_keys=True), encoding="utf-8")
        except (OSError, ResourceError) as error:
            return f"the latency table could not be kept: {error}"
        return None

    def time(self, view: NodeView) -> float:
        """Milliseconds of a node alone at the shapes of its view, measured where that is not known."""
        key = _key(view)
        if key not in self.entries:
            self.entries[key] = _measure(view)
            self.measured += 1
        return self.entries[key]


def _key(view: NodeView) -> str:
    shapes = [view.shape(i) for i in range(len(view.node.inputs))]
    attributes = {k: str(a.value) for k, a in sorted(_attributes(view).items())}
    return f"{view.node.op_type} {shapes} {attributes}"


def _attributes(view: NodeView) -> Mapping[str, ir.Attr]:
    """A node's attributes, those that count channels following their number."""
    found = dict(view.node.attributes.items())
    row = signature(view)
    if isinstance(row, Signature):
        for size in row.sizes:
            shape = view.shape(size.port[0])
            if isinstance(size.holder, str) and size.position is None and size.meaning == "width" and shape is not None:
                found[size.holder] = ir.AttrInt64(size.holder, int(shape[size.port[1]] or 1) // size.share)
    return found


def _measure(view: NodeView) -> float:
    """Milliseconds of a model of this node alone, its weights and inputs random."""
    rng = np.random.default_rng(0)
    inputs, stored, feed = [], [], {}
    for number, value in enumerate(view.node.inputs):
        shape = view.shape(number)
        if value is None or shape is None:
            continue
        array = rng.standard_normal([int(d or 1) for d in shape]).astype(np.float32)
        name = f"x{number}"
        if is_parameter(value):
            stored.append(onnx.numpy_helper.from_array(array, name))
        else:
            inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape))
            feed[name] = array
    names = [f"x{i}" if v is not None else "" for i, v in enumerate(view.node.inputs)]
    node = onnx.helper.make_node(view.node.op_type, names, ["y"])
    node.attribute.extend(ir.serde.serialize_attribute(attribute) for attribute in _attributes(view).values())
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "operator", inputs, [output], stored)
    opsets = [onnx.helper.make_opsetid("", view.opset)]
    session = Session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))
    return quickest(times_of(session, feed, POINT_SECONDS, POINT_RUNS))


@dataclass
class LatencyModel:
    """Predicted milliseconds of a model at given widths.

    Attributes
    ----------
    dense_ms
        Measured time of the dense model on the inputs of `costs`.
    """

    costs: Costs
    table: LatencyTable
    dense_ms: float
    _curves: dict[tuple[int, int, bool], tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict, repr=False)

    def nodes(self, counts: Counts, group: int | None = None) -> float:
        """Milliseconds of the nodes in the table; with `group`, of those alone that depend on it."""
        total = 0.0
        for number, node in enumerate(self.costs.nodes):
            groups = self.costs.groups_of(node)
            if group is None or group in groups:
                total += self._node(number, node, counts)
        return total

    def share(self, counts: Counts) -> float:
        """Share of the dense model's time; what is not in the table takes as long as in the dense model."""
        saved = self.nodes({}) - self.nodes(counts)
        return max(1.0 - saved / max(self.dense_ms, self.nodes({})), 0.0)

    def _node(self, number: int, node: ir.Node, counts: Counts) -> float:
        full = self._time(node, {})
        share = 1.0
        for group in sorted(self.costs.groups_of(node)):
            units = len(self.costs.orders[group])
            levels, shares = self._curve(number, node, group, units, full)
            share *= float(np.interp(counts.get(group, units), levels, shares))
        return full * share

    def _curve(
        self, number: int, node: ir.Node, group: int, units: int, full: float
    ) -> tuple[Sequence[float], Sequence[float]]:
        key = number, group, True
        if key not in self._curves:
            levels = sorted({width(units, share, mapped=True) for share in LEVELS})
            shares = [self._time(node, {group: level}) / full for level in levels]
            self._curves[key] = [0.0, *levels], [0.5 * shares[0], *shares]
        return self._curves[key]

    def _time(self, node: ir.Node, counts: Counts) -> float:
        view = self.costs.view(node, counts)
        row = declared(node)
        shapes = [view.shape(i) for i, v in enumerate(node.inputs) if v is not None]
        known = all(shape is not None and all(isinstance(d, int) for d in shape) for shape in shapes)
        if row is None or not known or node.domain not in ("", "ai.onnx"):
            return 0.0
        try:
            return self.table.time(view)
        except UnsupportedError:
            return 0.0


def width(units: int, share: float, *, mapped: bool) -> int:
    """Channels at about a share of `units`; on feature maps of enough channels a multiple of `ALIGNED`."""
    count = max(1, round(share * units))
    if mapped and units >= 2 * ALIGNED:
        count = max(ALIGNED, round(count / ALIGNED) * ALIGNED)
    return min(count, units)
