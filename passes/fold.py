"""Fold replacements into the readers' weights and biases.

A reader with weight W over the channels of a site, ``y = Σ_k W_k a_k + b``, sees replaced channels ``a_P = c + B a_K``:

    ``y = Σ_K (W_K + W_P B) a_K + (b + W_P c)``

so W takes ``W_K + W_P B`` on retained columns and zeros on replaced ones, and b takes ``W_P c``. Where the reader pads with
zeros, W_P c is carried by a constant channel instead (see `mscompile.constants`). Nothing reads a replaced channel then,
and `passes.narrow` may take it away. All sums are in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mscompile.constants import Carrier, carrier
from mscompile.passes.replace import Replacement, add_parameter, array_of, replacements
from mscompile.scm import Reader, Scm, Site, read_scm


@dataclass(frozen=True)
class FoldReplacements(ir.passes.InPlacePass):
    """Fold every Replace node whose readers all take it; the others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        found = replacements(model.graph)
        scm = read_scm(model)
        groups: dict[int, list[tuple[Replacement, Site]]] = {}
        for replacement in found:
            site = next((s for s in scm.sites if s.tensor == replacement.node.outputs[0].name), None)
            if site is not None and all(
                use.node in {r.entry for r in site.readers} for use in site_value(replacement).uses()
            ):
                groups.setdefault(site.group, []).append((replacement, site))
        folded = [self._fold_group(model.graph, scm, members) for members in groups.values()]
        return ir.passes.PassResult(model, any(folded))

    def _fold_group(self, graph: ir.Graph, scm: Scm, members: Sequence[tuple[Replacement, Site]]) -> bool:
        bordered = [(r, s) for r, s in members if s.border and r.constants.any()]
        constant: Carrier | None = None
        if bordered:
            shared = bordered[0][1].units[bordered[0][0].replaced]
            for replacement, site in bordered[1:]:
                shared = np.intersect1d(shared, site.units[replacement.replaced])
            first = bordered[0][1]
            before = [replace(s, tensor=_name(r.node.inputs[0])) for r, s in bordered]
            constant = carrier(scm, before, np.flatnonzero(np.isin(first.units, shared)))
            if constant is None:
                return False
            make_constant(graph, scm, first, constant)
        values = {} if constant is None else {s.tensor: v for (_, s), v in zip(bordered, constant.values, strict=True)}
        for replacement, site in members:
            place = None
            if constant is not None and site.tensor in values:
                place = (int(np.flatnonzero(site.units == constant.unit)[0]), values[site.tensor])
            for reader in site.readers:
                fold_into(graph, scm, reader, replacement, place)
            site_value(replacement).replace_all_uses_with(replacement.node.inputs[0])  # type: ignore[arg-type]
            graph.remove(replacement.node, safe=True)
        return True


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or ""


def site_value(replacement: Replacement) -> ir.Value:
    """The tensor with the replacements in it."""
    return replacement.node.outputs[0]


def owned(graph: ir.Graph, node: ir.Node, operand: int, array: np.ndarray) -> None:
    """Give a node `array` as its parameter at `operand`; other users of the old parameter keep theirs."""
    old = node.inputs[operand]
    assert old is not None
    assert old.const_value is not None
    dtype = old.const_value.dtype
    tensor = ir.tensor(np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype, name=old.name)
    if len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = tensor
        old.shape = ir.Shape(array.shape)
    else:
        node.replace_input_with(operand, add_parameter(graph, old.name or "weight", tensor.numpy(), dtype))


def fold_into(
    graph: ir.Graph, scm: Scm, reader: Reader, replacement: Replacement, carried: tuple[int, float] | None
) -> None:
    """Fold one replacement into one reader.

    Parameters
    ----------
    carried
        Channel and value of the carrier, for readers that see a border.
    """
    linear = reader.signature.linear
    assert linear is not None
    weight = np.moveaxis(array_of(reader.weight).astype(np.float64), reader.axis, 0)
    order = np.argsort(reader.index, kind="stable")
    columns = weight[order].reshape(replacement.size, -1, *weight.shape[1:])  # [channel, place, rest of the weight]
    away = columns[replacement.replaced]
    response = np.tensordot(replacement.constants, away, axes=1)  # [place, rest of the weight]
    if replacement.matrix is not None:
        columns[replacement.kept] += np.tensordot(replacement.matrix.T, away, axes=1)
    columns[replacement.replaced] = 0.0
    if reader.border and carried is not None:
        channel, value = carried
        columns[channel] = response / value
    folded = np.empty_like(weight)
    folded[order] = columns.reshape(weight.shape)
    owned(graph, reader.node, linear.weight, np.moveaxis(folded, 0, reader.axis))
    if not reader.border and replacement.constants.any():
        created, out_axis = created_axis(reader)
        rest = [a for a in range(weight.ndim) if a != reader.axis]
        over = tuple(i for i, a in enumerate(rest) if a != created)
        rank = len(scm.shapes[reader.node.outputs[0].name or ""])
        add_bias(graph, reader, response.sum(axis=0).sum(axis=over) * linear.gain, rank - 1 - out_axis)


def created_axis(reader: Reader) -> tuple[int, int]:
    """Weight axis and output axis of the units that a reader creates."""
    linear = reader.signature.linear
    assert linear is not None
    for link in reader.signature.links:
        ports = dict(link)
        if linear.weight in ports and ~0 in ports:
            return ports[linear.weight], ports[~0]
    raise AssertionError("a linear operator creates channels")


def add_bias(graph: ir.Graph, reader: Reader, shift: np.ndarray, trailing: int) -> None:
    """Add a vector over the created channels to a reader's output: into its bias, the addition behind it, or a new one.

    `trailing` counts the output axes behind the created one.
    """
    node, linear = reader.node, reader.signature.linear
    assert linear is not None
    dtype = reader.weight.const_value.dtype  # type: ignore[union-attr]
    if linear.bias is not None and linear.bias < len(node.inputs) and node.inputs[linear.bias] is not None:
        bias = array_of(node.inputs[linear.bias]).astype(np.float64)
        owned(graph, node, linear.bias, bias + (shift / linear.bias_gain).reshape((1,) * (bias.ndim - 1) + (-1,)))
        return
    output = node.outputs[0]
    if linear.bias is not None:
        if len(node.inputs) <= linear.bias:
            node.resize_inputs(linear.bias + 1)
        name = f"{reader.weight.name}.bias"
        node.replace_input_with(linear.bias, add_parameter(graph, name, shift.astype(dtype.numpy()), dtype))
        return
    shaped = shift.reshape((-1,) + (1,) * trailing)
    adder = _adder(output, len(shift), trailing)
    if adder is not None:
        use, operand = adder
        owned(graph, use, operand, array_of(use.inputs[operand]).astype(np.float64) + shaped)
        return
    total = ir.Value(name=None, shape=output.shape, type=output.type)
    stored = add_parameter(graph, f"{output.name}.bias", shaped.astype(dtype.numpy()), dtype)
    addition = ir.node("Add", [output, stored], outputs=[total])
    if output.is_graph_output():
        name = output.name  # type: ignore[assignment]
        output.name = None
        graph.outputs[list(graph.outputs).index(output)] = total
        total.name = name
    for use, operand in list(output.uses()):
        if use is not addition:
            use.replace_input_with(operand, total)
    graph.insert_after(node, addition)


def _adder(output: ir.Value, size: int, trailing: int) -> tuple[ir.Node, int] | None:
    """The addition of a fitting parameter vector that alone uses a value, and the parameter's operand."""
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    node = uses[0].node
    for operand, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and value.is_initializer() and not value.is_graph_input():
            shape = tuple(value.const_value.shape.numpy())
            axis = len(shape) - 1 - trailing
            if axis >= 0 and shape[axis] == size and all(d == 1 for a, d in enumerate(shape) if a != axis):
                return node, operand
    return None


def make_constant(graph: ir.Graph, scm: Scm, site: Site, constant: Carrier) -> None:
    """Give the carrier's producers zero weights and its bias."""
    for creator in scm.creators_of(site.units):
        rows = np.flatnonzero(creator.units == constant.unit)
        if not len(rows):
            continue
        biased = False
        for slot in creator.slots:
            array = array_of(creator.node.inputs[slot.operand]).copy()
            view = np.moveaxis(array, slot.axis, 0)
            is_bias = view.size == len(view)
            view[rows] = constant.bias if is_bias else 0
            biased |= is_bias
            owned(graph, creator.node, slot.operand, array)
        if not biased:
            raise AssertionError("a carrier needs a producer with a bias")
