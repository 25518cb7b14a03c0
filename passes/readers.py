"""Rewriting the weights and biases of readers, shared by the passes. A parameter used elsewhere is never touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Reader, Scm
from mscompile.operators import DIALECT, Linear, Signature, is_parameter

SHELF = "mscompile.shelf"
"""Key in a graph's `meta` of the `Shelf` that its new weights are put on."""


def new_weight(
    graph: ir.Graph, array: np.ndarray, dtype: ir.DataType | None = None, name: str | None = None
) -> ir.TensorProtocol:
    """An array as a new weight of a graph."""
    shelf = graph.meta.get(SHELF)
    return ir.tensor(array if shelf is None else shelf.put(array), dtype=dtype, name=name)


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name` with a number where that is taken."""
    taken, unique, number = {v.name for v in (*graph.inputs, *graph.initializers.values())}, name, 0
    taken.update(v.name for node in graph for v in node.outputs)
    while unique in taken:
        number += 1
        unique = f"{name}.{number}"
    return unique


def add_parameter(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Store an array as an initializer under `name`, numbered where that is taken."""
    unique = free_name(graph, name)
    tensor = new_weight(graph, array, dtype, unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def name_outputs(graph: ir.Graph, nodes: Sequence[ir.Node], prefix: str) -> None:
    """Name the outputs of new nodes; onnx-ir would number them, and exporters number theirs alike."""
    for place, node in enumerate(nodes):
        for value in node.outputs:
            number = f"{place}.{value.index()}" if len(node.outputs) > 1 else f"{place}"
            value.name = free_name(graph, f"{prefix}.{node.op_type.lower()}.{number}")


def array_of(value: ir.Value | None) -> np.ndarray:
    """The stored array of a parameter."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def owned(graph: ir.Graph, node: ir.Node, operand: int, array: np.ndarray) -> None:
    """Give a node `array` as its parameter at `operand`; other users of the old parameter keep theirs."""
    old = node.inputs[operand]
    assert old is not None
    assert old.const_value is not None
    dtype = old.const_value.dtype
    tensor = new_weight(graph, np.ascontiguousarray(array.astype(dtype.numpy())), dtype, old.name)
    if len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = tensor
        old.shape = ir.Shape(array.shape)
    else:
        node.replace_input_with(operand, add_parameter(graph, old.name or "weight", tensor.numpy(), dtype))


def rewrite_reader(graph: ir.Graph, scm: Scm, reader: Reader, columns: np.ndarray, response: np.ndarray) -> None:
    """Give a reader new weights and what constants contribute.

    Parameters
    ----------
    columns
        [channels, places, rest], as of `Reader.columns`.
    response
        [groups, places, rest]: the weight on a channel of ones, per group of the reader. To a reader that pads it is just
        that, and a Carry node provides the channels; to others it is a bias.
    """
    linear = reader.signature.linear
    assert linear is not None
    rows = np.empty((len(reader.index), *columns.shape[2:]))
    rows[np.argsort(reader.index, kind="stable")] = columns.reshape(rows.shape)
    together = response.sum(axis=1)
    there = reader.ones(array_of(reader.weight))  # what a Carry node that is there already brings
    carried = reader.border and bool(response.any())
    ones = (together if there is None else together + there) if carried or there is not None else None
    owned(graph, reader.node, linear.weight, reader.from_rows(rows, ones))
    if there is not None:
        return
    if carried:
        _carry(graph, scm, reader, linear)
    elif response.any():
        created, out_axis = created_axis(reader.signature)
        rest = [a for a in range(rows.ndim) if a != reader.axis]
        over = tuple(i for i, a in enumerate(rest, start=1) if a != created)
        rank = len(scm.shapes[reader.node.outputs[0].name or ""])
        add_bias(graph, reader.node, linear, together.sum(axis=over).ravel() * linear.gain, rank - 1 - out_axis)


def _carry(graph: ir.Graph, scm: Scm, reader: Reader, linear: Linear) -> None:
    """Put ``mscompile::Carry(x; axis, groups)`` before a reader: x with one more channel, of ones, behind each group."""
    source = reader.node.inputs[linear.data]
    assert source is not None
    dims = list(scm.shapes[source.name or ""])
    dims[reader.data_axis] = len(reader.index) + reader.groups
    tensor = reader.node.inputs[linear.weight]
    assert tensor is not None
    assert tensor.const_value is not None
    stacked = ir.Value(
        name=f"{reader.node.outputs[0].name}.carried", shape=ir.Shape(dims), type=ir.TensorType(tensor.const_value.dtype)
    )
    attributes = {"axis": reader.data_axis, "groups": reader.groups}
    node = ir.node("Carry", [source], attributes, domain=DIALECT, outputs=[stacked])
    graph.insert_before(reader.node, node)
    reader.node.replace_input_with(linear.data, stacked)


def created_axis(found: Signature) -> tuple[int, int]:
    """Weight axis and output axis of the units that a linear operator creates."""
    linear = found.linear
    assert linear is not None
    for link in found.links:
        ports = dict(link)
        if linear.weight in ports and ~0 in ports:
            return ports[linear.weight], ports[~0]
    raise AssertionError("a linear operator creates channels")


def add_bias(graph: ir.Graph, node: ir.Node, linear: Linear, shift: np.ndarray, trailing: int) -> None:
    """Add a vector over the created channels to a node's output: into its bias, the addition behind it, or a new one.

    `trailing` counts the output axes behind the created one.
    """
    weight, output = node.inputs[linear.weight], node.outputs[0]
    assert weight is not None
    assert weight.const_value is not None
    dtype = weight.const_value.dtype
    if linear.bias is not None and linear.bias_gain != 0:
        if len(node.inputs) <= linear.bias:
            node.resize_inputs(linear.bias + 1)
        held = node.inputs[linear.bias]
        if held is None:
            added = add_parameter(graph, f"{weight.name}.bias", (shift / linear.bias_gain).astype(dtype.numpy()), dtype)
            node.replace_input_with(linear.bias, added)
            return
        if is_parameter(held):
            bias = array_of(held).astype(np.float64)
            owned(graph, node, linear.bias, bias + (shift / linear.bias_gain).reshape((1,) * (bias.ndim - 1) + (-1,)))
            return
    shaped = shift.reshape((-1,) + (1,) * trailing)
    adder = _adder(output, len(shift), trailing)
    if adder is not None:
        use, operand = adder
        owned(graph, use, operand, array_of(use.inputs[operand]).astype(np.float64) + shaped)
        return
    # The sum takes the name: it is what other nodes, callers and interventions know by it.
    total = ir.Value(name=output.name, shape=output.shape, type=output.type)
    stored = add_parameter(graph, f"{output.name}.bias", shaped.astype(dtype.numpy()), dtype)
    output.name = free_name(graph, f"{output.name}.unbiased")
    addition = ir.node("Add", [output, stored], outputs=[total])
    graph.outputs[:] = [total if value is output else value for value in graph.outputs]
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
        if value is not None and is_parameter(value):
            shape = array_of(value).shape
            axis = len(shape) - 1 - trailing
            if axis >= 0 and shape[axis] == size and all(d == 1 for a, d in enumerate(shape) if a != axis):
                return node, operand
    return None
