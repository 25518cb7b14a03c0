"""Digests of a model's content: the same wherever and however it is stored, another for any change of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mscompile.files import save_model
from mscompile.intake.loading import from_proto, load_model
from mscompile.intake.provenance import PARTS, changed_parts, digests, seal


def varied() -> onnx.ModelProto:
    """Weights of three types, attributes of every kind that holds content, and subgraphs with weights of their own."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        made = [helper.make_node("Mul", ["a", f"{name}_w"], [name])]
        stored = [numpy_helper.from_array(np.float32([factor]), f"{name}_w")]
        return helper.make_graph(made, name, [], [helper.make_tensor_value_info(name, 1, None)], stored)

    nodes = [
        helper.make_node("Constant", [], ["shift"], value=numpy_helper.from_array(np.float32([0.25]), "")),
        helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["x", "w", "wide"], ["g"], alpha=0.1),
        helper.make_node("Add", ["g", "shift"], ["s"]),
        helper.make_node("LeakyRelu", ["s"], ["a"], alpha=0.3),
        helper.make_node("ReduceSum", ["a", "axes"], ["r"], keepdims=0),
        helper.make_node("Greater", ["r", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["b"], then_branch=branch("then", 2.0), else_branch=branch("other", 3.0)),
        helper.make_node("Einsum", ["b"], ["y"], equation="ij->ij"),
    ]
    stored = [
        numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w"),
        numpy_helper.from_array(np.arange(3).astype(ml_dtypes.bfloat16), "narrow"),
        numpy_helper.from_array(np.array([0, 1]), "axes"),
        numpy_helper.from_array(np.float32(0.0), "zero"),
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["N", size]) for name, size in (("x", 2), ("y", 3))]
    graph = helper.make_graph(nodes, "varied", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"pkg.mscompile.version": "1", "owner": "somebody"})
    return model


def sealed() -> ir.Model:
    model = from_proto(varied())
    seal(model)
    return model


@pytest.mark.parametrize("external", [False, True])
def test_digests_survive_the_file(tmp_path: Path, external: bool) -> None:
    save_model(sealed(), tmp_path / "m.onnx", external=external)
    assert changed_parts(load_model(tmp_path / "m.onnx")[0]) == ()
    again = onnx.load(tmp_path / "m.onnx")
    onnx.save(again, tmp_path / "again.onnx")
    assert changed_parts(load_model(tmp_path / "again.onnx")[0]) == ()


def test_a_file_that_claims_nothing() -> None:
    model = from_proto(varied())
    del model.metadata_props["pkg.mscompile.version"]
    assert changed_parts(model) is None


def node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


def replaced(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


CHANGES: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "a weight": (lambda m: replaced(m.graph.initializer[0], np.float32([[0, 1, 2], [3, 4, 5.000001]])), "weights"),
    "its type": (lambda m: replaced(m.graph.initializer[1], np.arange(3).astype(np.float16)), "weights graph"),
    "a constant": (lambda m: replaced(node(m, "Constant").attribute[0].t, np.float32([0.5])), "weights"),
    "a branch's weight": (lambda m: replaced(node(m, "If").attribute[0].g.initializer[0], np.float32([9])), "weights"),
    "a number": (lambda m: setattr(node(m, "LeakyRelu").attribute[0], "f", 0.300001), "graph"),
    "a whole number": (lambda m: setattr(node(m, "ReduceSum").attribute[0], "i", 1), "graph"),
    "a text": (lambda m: setattr(node(m, "Einsum").attribute[0], "s", b"ij->ji"), "graph"),
    "an operator": (lambda m: setattr(node(m, "Add"), "op_type", "Sub"), "graph"),
    "an operator of a branch": (lambda m: setattr(node(m, "If").attribute[1].g.node[0], "op_type", "Add"), "graph"),
    "a wire": (lambda m: node(m, "Add").input.__setitem__(1, "zero"), "graph"),
    "an entry": (lambda m: setattr(m.metadata_props[0], "value", "2"), "metadata"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_in_its_part(change: str) -> None:
    edit, part = CHANGES[change]
    before, model = digests(from_proto(varied())), varied()
    edit(model)
    after = digests(from_proto(model))
    assert [name for name in PARTS if before[name] != after[name]] == part.split()
