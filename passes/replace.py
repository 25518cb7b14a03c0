"""The one pass that approximates, and the one that spells out what it wrote.

`WriteReplacements` puts ``do(a_P := constants + matrix · a_K)`` into the graph at each planned site, as a node

    ``mscompile::Replace(activation, kept, constants[, matrix]; axis)``

between the tensor and its readers. Every pass behind it preserves the function. `LowerReplacements` writes such nodes in
standard operators, so that a graph can be run at any stage, and a replacement that could not be folded stays correct.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.calibration.windows import window_name
from mscompile.network.scm import Reader, Scm, Site, read_scm
from mscompile.operators import DIALECT
from mscompile.passes.readers import add_parameter, array_of, name_outputs, rewrite_reader
from mscompile.planning.plan import Plan, SitePlan, WindowPlan


@dataclass(frozen=True)
class Replacement:
    """A Replace node, read back."""

    node: ir.Node

    @property
    def value(self) -> ir.Value:
        """What the readers read."""
        return self.node.outputs[0]

    @property
    def tensor(self) -> str:
        """Its name."""
        return self.value.name or ""

    @property
    def axis(self) -> int:
        """Channel axis."""
        return self.node.attributes["axis"].as_int()

    @property
    def kept(self) -> np.ndarray:
        """Retained channels."""
        return array_of(self.node.inputs[1])

    @property
    def constants(self) -> np.ndarray:
        """[replaced] values or intercepts, float64."""
        return array_of(self.node.inputs[2]).astype(np.float64)

    @property
    def matrix(self) -> np.ndarray | None:
        """[replaced, retained] coefficients, float64."""
        return array_of(self.node.inputs[3]).astype(np.float64) if len(self.node.inputs) > 3 else None

    @property
    def size(self) -> int:
        """Channels of the site."""
        return len(self.kept) + len(self.constants)

    @property
    def replaced(self) -> np.ndarray:
        """Replaced channels."""
        return np.setdiff1d(np.arange(self.size), self.kept)


def replacements(graph: ir.Graph) -> list[Replacement]:
    """All Replace nodes of a graph, in order."""
    return [Replacement(node) for node in graph if node.domain == DIALECT and node.op_type == "Replace"]


@dataclass(frozen=True)
class WriteReplacements(ir.passes.InPlacePass):
    """Write the plan's do() into the graph, in front of the readers of each planned site."""

    plan: Plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        scm = read_scm(model)
        for planned in self.plan.sites:
            site = scm.site(planned.tensor)
            self._write(model.graph, scm, site, planned)
        if self.plan.sites:
            model.opset_imports[DIALECT] = 1
        return ir.passes.PassResult(model, bool(self.plan.sites))

    def _write(self, graph: ir.Graph, scm: Scm, site: Site, planned: SitePlan) -> None:
        refitted = {window.reader: window for window in planned.windows}
        pointwise = [reader for reader in site.readers if window_name(reader) not in refitted] + [*site.pairings]
        for reader in site.readers:
            if window_name(reader) in refitted:
                _refit(graph, scm, site, reader, planned, refitted[window_name(reader)])
        if not pointwise:
            return
        shape = ir.Shape(scm.shapes[site.tensor])
        entries = {reader.entry for reader in pointwise}
        tensor = next(v for entry in site.entries for v in entry.inputs if v is not None and v.name == site.tensor)
        fixed = [
            add_parameter(graph, f"{site.tensor}.kept", planned.kept),
            add_parameter(graph, f"{site.tensor}.constants", planned.constants),
        ]
        if planned.affine is not None:
            fixed.append(add_parameter(graph, f"{site.tensor}.matrix", planned.affine))
        replaced = ir.Value(name=f"{site.tensor}.replaced", shape=shape, type=ir.TensorType(_dtype(site)))
        node = ir.node("Replace", [tensor, *fixed], {"axis": site.axis}, domain=DIALECT, outputs=[replaced])
        producer = tensor.producer()
        assert producer is not None
        for use, operand in list(tensor.uses()):
            if use in entries:
                use.replace_input_with(operand, replaced)
        graph.insert_after(producer, node)


def _dtype(site: Site) -> ir.DataType:
    """Element type of a site: exporters need not declare it, but that of the weights which meet it is the same."""
    met = [r.weight for r in site.readers] + [s.node.inputs[s.operand] for p in site.pairings for s in p.slots]
    (weight, *_) = (value.const_value for value in met if value is not None)
    assert weight is not None
    return weight.dtype


def _refit(graph: ir.Graph, scm: Scm, site: Site, reader: Reader, planned: SitePlan, window: WindowPlan) -> None:
    """Give a reader the weights fitted over its window: on retained channels, on ones, and zeros on the others."""
    dense = reader.columns(site.size)
    columns, response = np.zeros_like(dense), np.zeros_like(dense[0])
    retained, taps, outputs = window.columns.shape
    if window.places is None:  # [channels, 1, outputs, kernel]
        columns[planned.kept] = window.columns.transpose(0, 2, 1).reshape(retained, *dense.shape[1:])
        if reader.border:
            response += window.response.T.reshape(response.shape)
        else:
            response.reshape(outputs, taps)[:, 0] = window.response[0]
    else:  # [channels, places, outputs]
        columns[planned.kept] = window.columns
        response[0] = window.response[0]
    rewrite_reader(graph, scm, reader, columns, response[None])


@dataclass(frozen=True)
class LowerReplacements(ir.passes.InPlacePass):
    """Spell out the dialect.

    Replace: ``Gather(Concat(a_K, matrix · a_K + constants), places)``. Carry: ``Concat(a, a_0⁰)``, since 0⁰ is 1, of which a
    Gather puts the last channel behind each group.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        found = replacements(model.graph)
        for replacement in found:
            self._lower(model.graph, replacement)
        carries = [node for node in model.graph if node.domain == DIALECT and node.op_type == "Carry"]
        for node in carries:
            _lower_carry(model.graph, node)
        model.opset_imports.pop(DIALECT, None)
        return ir.passes.PassResult(model, bool(found or carries))

    def _lower(self, graph: ir.Graph, replacement: Replacement) -> None:
        node, axis = replacement.node, replacement.axis
        tensor, target = node.inputs[0], node.outputs[0]
        assert tensor is not None
        assert target.shape is not None
        rank = len(target.shape)
        dtype = target.dtype or ir.DataType.FLOAT
        last = [a for a in range(rank) if a != axis] + [axis]
        back = [int(a) for a in np.argsort(last)]
        tape = ir.tape.Tape()

        def stored(suffix: str, array: np.ndarray, kind: ir.DataType | None = None) -> ir.Value:
            return add_parameter(graph, f"{target.name}.{suffix}", array, kind)

        rows = tape.op("Transpose", [tensor], {"perm": last})
        kept = tape.op("Gather", [rows, stored("kept", replacement.kept)], {"axis": -1})
        matrix = replacement.matrix
        if matrix is None:
            matrix = np.zeros((len(replacement.constants), len(replacement.kept)))
        mapped = tape.op("MatMul", [kept, stored("matrix", np.ascontiguousarray(matrix.T.astype(dtype.numpy())))])
        shifted = tape.op("Add", [mapped, stored("constants", replacement.constants.astype(dtype.numpy()))])
        joined = tape.op("Concat", [kept, shifted], {"axis": -1})
        places = np.argsort(np.concatenate([replacement.kept, replacement.replaced]))
        ordered = tape.op("Gather", [joined, stored("places", places)], {"axis": -1})
        lowered = tape.op("Transpose", [ordered], {"perm": back})
        name_outputs(graph, tape.nodes, f"{target.name}.lowered")
        target.name, name = None, target.name
        graph.insert_after(node, tape.nodes)
        target.replace_all_uses_with(lowered)
        graph.remove(node, safe=True)
        lowered.name = name


def _lower_carry(graph: ir.Graph, node: ir.Node) -> None:
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    axis, groups = node.attributes["axis"].as_int(), node.attributes["groups"].as_int()
    dtype = target.dtype or ir.DataType.FLOAT
    tape = ir.tape.Tape()
    first = tape.op("Gather", [source, add_parameter(graph, f"{target.name}.first", np.zeros(1, np.int64))], {"axis": axis})
    ones = tape.op("Pow", [first, add_parameter(graph, f"{target.name}.nought", np.zeros((), dtype.numpy()), dtype)])
    stacked = tape.op("Concat", [source, ones], {"axis": axis})
    if groups > 1:
        channels = (0 if target.shape is None else int(target.shape.numpy()[axis])) - groups
        places = np.insert(np.arange(channels), np.arange(1, groups + 1) * (channels // groups), channels)
        stacked = tape.op("Gather", [stacked, add_parameter(graph, f"{target.name}.places", places)], {"axis": axis})
    name_outputs(graph, tape.nodes, f"{target.name}.lowered")
    target.name, name = None, target.name
    graph.insert_after(node, tape.nodes)
    target.replace_all_uses_with(stacked)
    graph.remove(node, safe=True)
    stacked.name = name
