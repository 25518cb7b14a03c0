"""Hostile and broken inputs: each ends in its exit code with one reason, quickly, in little memory, and leaves nothing.

All cases run in one process of their own, by the command line, under an audit hook that records what is opened; this file is
also the script of that process. Numbers such as B07 are those of the list of cases.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import mlp, samples, set_weight

import mscompile
from mscompile.errors import ModelError

SECONDS = 5.0
"""Time that a refusal may take, on a machine that does other things as well."""
MEMORY = 512 << 20
"""Bytes that a refusal may take beyond what the process has."""

Make = Callable[[Path], "list[str] | None"]
Case = tuple[Make, int, str]
COMPILE = ["m.onnx", "--keep", "0.5", "--calib", "data.npz"]
DRY = [*COMPILE, "--dry-run", "--replacement", "constant"]
CASES: dict[str, Case] = {}


def case(name: str, make: Make, code: int, words: str = "") -> None:
    """Add a case: `make` writes files into the model's folder and may return other arguments; `words` are in the message."""
    assert name not in CASES
    CASES[name] = (make, code, words)


def raw(content: bytes, name: str = "m.onnx") -> Make:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def edited(change: Callable[[onnx.ModelProto], object], *arguments: str, **options: Any) -> Make:
    """A small model after a change."""

    def make(folder: Path) -> list[str] | None:
        model = mlp(**options)
        change(model)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        return list(arguments) or None

    return make


def stored(tensor: TensorProto, location: str, **keys: object) -> None:
    """Move a tensor's data to another file."""
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))


def outside(location: str, prepare: Callable[[Path], object] = lambda _: None, *arguments: str, **keys: object) -> Make:
    """A model whose first weights lie at `location`."""

    def make(folder: Path) -> list[str] | None:
        prepare(folder)
        edited(lambda m: stored(m.graph.initializer[0], location, **keys))(folder)
        return list(arguments) or None

    return make


def weights(folder: Path, size: int = 384, name: str = "w.bin") -> None:
    """A file of weights; those of the first layer take 384 bytes."""
    (folder / name).write_bytes(np.ones(size // 4, np.float32).tobytes() + bytes(size % 4))


def secret(folder: Path) -> Path:
    return folder.parent / "outside" / "secret.bin"


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def first(model: onnx.ModelProto) -> TensorProto:
    return model.graph.initializer[0]


# --- B01-B03: files that are no models ------------------------------------------------------------------------------------


OK = mlp().SerializeToString()
with io.BytesIO() as _buffer:
    with zipfile.ZipFile(_buffer, "w") as _archive:
        _archive.writestr("model.onnx", b"x")
    ZIP = _buffer.getvalue()

case("B01 empty", raw(b""), 3, "empty")
case("B02 garbage", raw(np.random.default_rng(0).bytes(3000)), 3, "protobuf")
case("B02 truncated", raw(OK[: len(OK) // 2]), 3, "protobuf")
case("B02 html", raw(b"<!DOCTYPE html><html><title>404</title></html>"), 3, "HTML")
case("B02 pickle", raw(pickle.dumps({"a": 1})), 3, "pickle")
case("B02 zip", raw(ZIP), 3, "zip")
case("B02 lfs", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), 3, "git lfs pull")
case("B02 ort", raw(b"\x20\0\0\0ORTM" + bytes(99)), 3, "ORT format")
case("B03 missing", lambda _: None, 2, "no such")
case("B03 directory", lambda folder: (folder / "m.onnx").mkdir(), 3, "regular file")
case("B03 fifo", lambda folder: os.mkfifo(folder / "m.onnx"), 3, "regular file")
case("B03 stdin", lambda _: ["/dev/stdin"], 3, "regular file")
case("B03 device", lambda _: ["/dev/zero"], 3, "regular file")

# --- B04-B18: external data -------------------------------------------------------------------------------------------

case("B04 parent", outside("../outside/secret.bin"), 3, "'w0'")
case("B04 parent twice", outside("a/../../outside/secret.bin"), 3, "outside the model's folder")
case("B04 absolute", outside("/etc/passwd"), 3, "outside the model's folder")
case("B04 marked", outside("#../outside/secret.bin"), 3, "'w0'")
case("B04 backslashes", outside("..\\outside\\secret.bin"), 3, "no path")
case("B04 drive", outside("C:/secret.bin"), 3, "no path")
case("B05 symlink", outside("w.bin", lambda f: (f / "w.bin").symlink_to("../outside/secret.bin")), 3, "symbolic link")
case("B06 parent symlink", outside("d/secret.bin", lambda f: (f / "d").symlink_to("../outside")), 3, "symbolic link")
case("B07 hard link", outside("w.bin", lambda f: os.link(secret(f), f / "w.bin")), 3, "hard link")
case("B08 empty location", outside(""), 3, "no path")
case("B08 nul", outside("a\0b"), 3, "no path")
case("B08 directory", outside("d", lambda f: (f / "d").mkdir()), 3, "regular file")
case("B08 folder itself", outside("."), 3, "regular file")
case("B08 missing", outside("w.bin"), 3, "No such file")


def hub(folder: Path) -> list[str]:
    """The cache of the Hugging Face hub: both files are links into a folder of blobs."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    weights(blobs, name="5678")
    outside("m.onnx.data")(blobs)
    (blobs / "m.onnx").rename(blobs / "1234")
    (snapshot / "m.onnx").symlink_to("../../blobs/1234")
    (snapshot / "m.onnx.data").symlink_to("../../blobs/5678")
    return ["models--a--b/snapshots/1/m.onnx", *DRY[1:]]


def hub_out(folder: Path) -> list[str]:
    arguments = hub(folder)
    link = folder / "models--a--b" / "snapshots" / "1" / "m.onnx.data"
    link.unlink()
    link.symlink_to(secret(folder))
    return arguments


case("B09 hub", hub, 0)
case("B09 hub, link outside", hub_out, 3, "symbolic link")
case("B10 fifo", outside("w.bin", lambda f: os.mkfifo(f / "w.bin")), 3, "regular file")
case("B10 device", outside("w.bin", lambda f: (f / "w.bin").symlink_to("/dev/zero")), 3, "symbolic link")
for _name, _keys in {
    "B11 offset -1": {"offset": -1},
    "B11 offset nan": {"offset": "nan"},
    "B11 offset 2^64-8": {"offset": 2**64 - 8},
    "B11 offset past the end": {"offset": 1000},
    "B12 length -1": {"length": -1},
    "B12 length 2^50": {"length": 2**50},
    "B13 length": {"length": 380},
    "B13 other length": {"length": 388},
    "B15 unknown key": {"name": "x"},
    "B15 dunder key": {"__class__": "x"},
}.items():
    case(_name, outside("w.bin", lambda f: weights(f, 2000 if "other" in str(f) else 384), **_keys), 3, "'w0'")
case("B13 short file", outside("w.bin", lambda f: weights(f, 200)), 3, "'w0' takes 384 bytes")
case(
    "B15 key twice", edited(lambda m: [stored(first(m), "w.bin"), first(m).external_data.add(key="location", value="v")]), 3
)
case("B16 memory", outside("*/_ORT_MEM_ADDR_/*", offset=4096, length=384), 3, "no path")


def sharing(count: int, size: int, step: int = 0) -> Make:
    """Many unused tensors of `size` bytes on the same file, each `step` bytes further on."""

    def make(folder: Path) -> list[str]:
        weights(folder, size + step * count)
        model = mlp()
        for i in range(count):
            tensor = TensorProto(name=f"s{i}", data_type=TensorProto.FLOAT, dims=[size // 4])
            stored(tensor, "w.bin", offset=step * i, length=size)
            model.graph.initializer.append(tensor)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        return DRY

    return make


case("B14 sharing", sharing(3, 400), 0)
case("B14 partial overlap", sharing(3, 400, 100), 3, "overlap in part")
case("B14 2000 times", sharing(2000, 1 << 20), 8, "share")


def in_attribute(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "c")
    stored(tensor, "../outside/secret.bin")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_place(folder: Path) -> list[str]:
    """Weights of the first layer in a Constant, whose data lies beside the model as it should."""
    weights(folder)

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.pop(0)
        stored(tensor, "w.bin")
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w0"], value=tensor))

    edited(change)(folder)
    return DRY


def in_branch(model: onnx.ModelProto, tensor: TensorProto | None = None) -> None:
    tensor = tensor or numpy_helper.from_array(np.ones(3, np.float32), "c")
    stored(tensor, "../outside/secret.bin")
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [3])
    branch = helper.make_graph([], "branch", [], [out], [tensor])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "if"))
    model.graph.node.append(helper.make_node("If", ["if"], ["z"], then_branch=branch, else_branch=branch))


def in_function(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "c")
    stored(tensor, "../outside/secret.bin")
    body = [helper.make_node("Constant", [], ["c"], value=tensor)]
    model.functions.append(helper.make_function("local", "f", [], ["c"], body, [helper.make_opsetid("", 18)]))


def sparse(model: onnx.ModelProto, location: str | None = None) -> None:
    dense = numpy_helper.to_array(model.graph.initializer.pop(1))
    values = numpy_helper.from_array(dense, "b0")
    if location is not None:
        stored(values, location)
    indices = numpy_helper.from_array(np.arange(16), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16]))


case("B17 attribute", edited(in_attribute), 3, "attribute 'value'")
case("B17 attribute, in place", in_place, 0)
case("B17 branch", edited(in_branch), 3, "initializer 'c'")
case("B17 function", edited(in_function), 3, "attribute 'value'")
case("B17 sparse", edited(lambda m: sparse(m, "../outside/secret.bin")), 3, "sparse initializer 'b0'")

# --- B19-B25: tensors that are not what they say, or grow ---------------------------------------------------------------


def shaped(*dims: int, kind: int | None = None, data: bytes | None = None) -> Make:
    def change(model: onnx.ModelProto) -> None:
        first(model).dims[:] = dims
        first(model).data_type = first(model).data_type if kind is None else kind
        first(model).raw_data = first(model).raw_data if data is None else data

    return edited(change)


case("B19 huge", shaped(2**40, 2**20), 3, "'w0'")
case("B19 overflow", shaped(2**32, 2**32), 3, "'w0'")
case("B20 negative", shaped(-6, 16), 3, "negative dimension -6")
case("B21 short", shaped(6, 16, data=bytes(380)), 3, "'w0' has 380 bytes")
case("B21 long", shaped(6, 16, data=bytes(388)), 3, "'w0' has 388 bytes")
case("B22 int4", shaped(700_000_000, kind=TensorProto.INT4, data=b"1"), 3, "'w0' has 1 bytes")
case("B22 no data", shaped(700_000_000, data=b""), 3, "'w0' has 0 entries")
case("B23 type 0", shaped(6, 16, kind=0), 3, "no element type")
case("B23 type 99", shaped(6, 16, kind=99), 3, "99")
case("B23 text", shaped(6, 16, kind=TensorProto.STRING), 3, "'w0'")
case("B24 nan", edited(lambda m: set_weight(m, "w0", np.full((6, 16), np.nan, np.float32)), *DRY), 6, "NaN or infinite")


def bomb(operator: str, inputs: list[str], declared: tuple[int, ...] = (), **parameters: Any) -> Make:
    """A model that adds up what an operator makes of parameters, and adds it to its output.

    The parameter `root` is squared to give `size`; `declared` is what the file says of the shape.
    """

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in parameters.items())
        model.graph.node[-1].output[0] = "y0"
        if "root" in parameters:
            model.graph.node.append(helper.make_node("Mul", ["root", "root"], ["size"]))
        model.graph.node.extend(
            [
                helper.make_node(operator, inputs, ["blown"], name="bomb"),
                helper.make_node("ReduceSum", ["blown"], ["sum"], keepdims=0),
                helper.make_node("Cast", ["sum"], ["total"], to=TensorProto.FLOAT),
                helper.make_node("Add", ["y0", "total"], ["y"]),
            ]
        )
        if declared:
            model.graph.value_info.append(helper.make_tensor_value_info("blown", TensorProto.FLOAT, declared))

    return edited(change)


ONE, HUGE = np.ones(1, np.float32), np.int64(2**36)
for _name, _make in {
    "0.4 GB": bomb("ConstantOfShape", ["size"], size=np.array([100_000_000])),
    "4 TB": bomb("ConstantOfShape", ["size"], size=np.array([2**40])),
    "tile": bomb("Tile", ["a", "size"], a=ONE, size=[HUGE]),
    "range": bomb("Range", ["from", "size", "step"], size=HUGE, step=np.int64(1), **{"from": np.int64(0)}),
    "one-hot": bomb("OneHot", ["a", "size", "values"], a=np.zeros(4, np.int64), size=HUGE, values=np.zeros(2, np.float32)),
    "pad": bomb("Pad", ["a", "size"], a=ONE, size=np.array([0, HUGE])),
    "resize": bomb("Resize", ["a", "", "", "size"], a=ONE, size=[HUGE]),
    "computed": bomb("Expand", ["a", "size"], a=ONE, root=np.array([2**18])),
    "declared small": bomb("Expand", ["a", "size"], declared=(1,), a=ONE, root=np.array([2**18])),
}.items():
    case(f"B25 {_name}", _make, 8, "'bomb'")
case(
    "B25 small",
    lambda folder: bomb("Expand", ["a", "size"], a=ONE, root=np.array([8]))(folder) or DRY,
    0,
)

# --- B26-B41: graphs ----------------------------------------------------------------------------------------------------

case("B26 empty nodes", raw(b"\x08\x08" + field(7, b"\x0a\x00" * 5_000_000) + b"\x42\x02\x10\x12"), 8, "fields")
case("B27 cycle", edited(lambda m: m.graph.node[1].input.__setitem__(0, "h1")), 3, "cycle")
case("B27 dangling", edited(lambda m: m.graph.node[0].input.__setitem__(1, "nowhere")), 3, "'nowhere'")
case("B27 given twice", edited(lambda m: m.graph.node.append(m.graph.node[0])), 3, "'p0'")
case("B27 output", edited(lambda m: m.graph.output.add(name="nowhere")), 3, "'nowhere'")


def reverse(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


case("B28 unsorted", edited(reverse, *DRY), 0, "nodes were sorted")
case("B29 initializer twice", edited(lambda m: m.graph.initializer.append(first(m))), 3, "'w0'")
case("B30 same names", edited(lambda m: [setattr(n, "name", "same") for n in m.graph.node], *DRY), 0, "'same' → 'same.1'")
case("B30 no names", edited(lambda m: [n.ClearField("name") for n in m.graph.node], *DRY), 0, "without a name")
case(
    "B31 initializer is an input",
    edited(lambda m: m.graph.input.append(helper.make_tensor_value_info("w2", 1, [8, 3])), *DRY),
    0,
)


def foreign(domain: str, operator: str = "Frobnicate") -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].domain, model.graph.node[1].op_type = domain, operator
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


case("B32 operator", edited(foreign("")), 7, "Frobnicate")
case("B32 domain", edited(foreign("my.domain")), 7, "my.domain")
case("B33 context", edited(foreign("com.microsoft", "EPContext")), 3, "EPContext")
case("B34 no opset", edited(lambda m: m.ClearField("opset_import")), 3, "opset")
case("B34 opset 9999", edited(lambda _: None, opset=9999, annotated=False), 7, "9999")
case("B34 opset 1", edited(lambda _: None, opset=1, annotated=False), 7, "opset 1")
case("B34 ir 9999", edited(lambda _: None, ir=9999), 7, "9999")
case("B34 ir 0", edited(lambda _: None, ir=0), 3, "m.onnx")
case("B35 no graph", edited(lambda m: m.ClearField("graph")), 3, "no graph")
case("B35 no outputs", edited(lambda m: m.graph.ClearField("output")), 3, "no outputs")


def no_inputs(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(samples(4), "x"))
    model.graph.ClearField("input")


case("B35 no inputs", edited(no_inputs, "m.onnx", "--keep", "0.5"), 6, "nothing to do")
case(
    "B36 shape",
    edited(lambda m: m.graph.output[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 7), *DRY),
    0,
    "shape",
)
case("B36 type", edited(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.INT64)), 3, "'y'")


def calling(depth: int, times: int, last: str = "Relu") -> Make:
    """The model with an activation in functions that each call the next one some times."""

    def change(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        for level in range(depth):
            name, domain = (f"f{level - 1}", "local") if level else (last, "local" if last != "Relu" else "")
            calls = [helper.make_node(name, [f"a{i}"], [f"a{i + 1}"], domain=domain) for i in range(times)]
            model.functions.append(helper.make_function("local", f"f{level}", ["a0"], [f"a{times}"], calls, opsets))
        model.opset_import.append(opsets[1])
        model.graph.node[1].op_type, model.graph.node[1].domain = f"f{depth - 1}", "local"

    return edited(change)


case("B37 recursion", calling(2, 1, last="f1"), 3, "calls itself")
case("B38 bomb", calling(30, 2), 8, "expand to")
case("B38 chain", calling(3000, 1), 8, "deep")


def nested(depth: int) -> Make:
    """Branches within branches; written byte by byte, for libraries refuse to serialise what they refuse to parse."""
    out = field(12, field(1, b"y"))
    graph = field(1, field(2, b"y") + field(4, b"Identity") + field(1, b"x")) + out
    for _ in range(depth):
        branch = field(5, field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05")
        graph = field(1, field(1, b"x") + field(2, b"y") + field(4, b"If") + branch) + out
    return raw(b"\x08\x08" + field(7, graph + field(11, field(1, b"x"))) + field(8, b"\x10\x12"))


case("B39 deep", nested(40), 3, "protobuf")
case("B39 deeper", nested(3000), 3, "protobuf")
case("B39 deep, parsed", nested(31), 3, "m.onnx")
case("B39 json", raw(b'{"graph": {"node": []}}'), 3, "JSON")
case("B39 text", raw(b'ir_version: 8\ngraph { node { op_type: "Relu" } }\n'), 3, "protobuf")


def endless(model: onnx.ModelProto) -> None:
    """A loop without a bound behind the output."""
    values = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("c", "d")]
    states = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("s", "t")]
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("c", "d"), ("s", "t"))]
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph(nodes, "body", [count, values[0], states[0]], [values[1], states[1]])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    model.graph.node[-1].output[0] = "y0"
    model.graph.node.append(helper.make_node("Loop", ["", "on", "y0"], ["y"], name="loop", body=body))


case("B40 endless", edited(endless), 8, "has not ended")


def activation(operator: str, *more: str, **attributes: Any) -> Callable[[onnx.ModelProto], object]:
    """Something else in place of the first activation."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(False), "off"))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), "one"))
        model.graph.node[1].CopyFrom(helper.make_node(operator, ["p0", *more], ["h0"], name="it", **attributes))

    return change


case("B41 random", edited(activation("RandomNormalLike")), 7, "RandomNormalLike 'it'")
case("B41 bernoulli", edited(activation("Bernoulli")), 7, "'it'")
case("B41 dropout", edited(activation("Dropout", "", "on")), 7, "Dropout 'it'")
case("B41 dropout, off", edited(activation("Dropout", "", "off"), *DRY), 0)
case(
    "B41 normalisation",
    edited(
        lambda m: [activation("BatchNormalization", *["one"] * 4, training_mode=1)(m), m.graph.node[1].output.extend("uv")]
    ),
    7,
    "'it'",
)
case("B42 long name", edited(lambda m: [setattr(first(m), "name", "w" * 2**20), first(m).dims.insert(0, -1)]), 3, "wwww…")


def many(folder: Path) -> list[str]:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(5000)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("t0", "t5000")]
    unread = [numpy_helper.from_array(np.ones(4, np.float32), f"w{i}") for i in range(2000)]
    graph = helper.make_graph(nodes, "many", ends[:1], ends[1:], unread)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")
    return ["inspect", "m.onnx"]


case("B43 many nodes", many, 0)


def past_protobuf(folder: Path) -> None:
    with (folder / "m.onnx").open("wb") as file:
        file.truncate((1 << 31) + 10)


case("B44 above 2 GB", past_protobuf, 3, "external file")

# --- B45-B48: models that are odd, and fine -----------------------------------------------------------------------------


def single(folder: Path) -> list[str]:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 6]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")
    return ["inspect", "m.onnx"]


def unused(*shape: int) -> Make:
    tensor = numpy_helper.from_array(np.zeros(shape, np.float32), "unused")
    return edited(lambda m: m.graph.initializer.append(tensor), *DRY)


for _dtype in (np.float16, np.float64):
    case(f"B45 {_dtype.__name__}", edited(lambda _: None, "inspect", "m.onnx", dtype=_dtype), 0)
case("B46 one node", single, 0)
case("B46 no elements", unused(0, 4), 0)
case("B46 scalar", unused(), 0)
case("B46 unused weights", unused(1000, 1000), 0)
case("B47 sparse", edited(sparse), 7, "dense weights")
case("B48 training", edited(lambda m: m.training_info.add(), *DRY), 0, "training information")
case("B48 annotation", edited(lambda m: m.graph.quantization_annotation.add(tensor_name="h0"), *DRY), 0, "annotations")

# --- C01-C14: data ------------------------------------------------------------------------------------------------------

X = samples()
DATA = ["m.onnx", "--keep", "0.5", "--dry-run", "--calib"]


def given(name: str, content: bytes, *arguments: str) -> Make:
    """The small model, and a file of data."""

    def make(folder: Path) -> list[str]:
        raw(OK)(folder)
        (folder / name).write_bytes(content)
        return [*DATA, name, *arguments]

    return make


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def members(*names: str) -> bytes:
    """An archive with an array under each of the names."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name in names:
            archive.writestr(name, npy(X))
    return buffer.getvalue()


def zip_bomb(folder: Path) -> list[str]:
    raw(OK)(folder)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 26}, 6), }}\n"
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(header(text))
        for _ in range(6 * 4):
            file.write(bytes(1 << 26))
    return [*DATA, "bomb.npz"]


def tensors(text: str, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def script(body: str, *arguments: str) -> Make:
    return given("s.py", f"import os, sys, numpy as np\n{body}\n".encode(), *arguments)


_F4 = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}\n"
_X = '"x":{"dtype":"F32","shape":[1,6],"data_offsets":[0,24]}'
case("C01 objects", given("x.npy", npy(np.array([{}], dtype=object))), 4, "pickled")
case("C01 pickle", given("x.npy", pickle.dumps([1])), 4, "x.npy")
case("C02 bomb", zip_bomb, 4, "expand")
case("C03 elements", given("x.npy", header(_F4.format(f"({1 << 60},)"))), 4, "declares")
case("C03 body", given("x.npy", header(_F4.format(f"({1 << 29},)"))), 4, "declares")
case("C03 header", given("x.npy", header(_F4.format("(1,)").strip() + " " * 18000 + "\n")), 4, "x.npy")
case("C03 shape", given("x.npy", header(_F4.format("(-1, 6)")) + bytes(24)), 4, "x.npy")
case("C04 truncated", given("x.npz", npz(x=X)[:-100]), 4, "x.npz")
case("C04 checksum", given("x.npz", npz(x=X)[:500] + b"\1\2\3\4" + npz(x=X)[504:]), 4, "x.npz")
case("C04 twice", given("x.npz", members("x.npy", "x.npy")), 4, "more than once")
case("C04 path", given("x.npz", members("../../evil.npy")), 4, "name of an array")
case("C04 no array", given("x.npz", members("x.txt")), 4, "name of an array")
case("C05 big-endian", given("x.npz", npz(x=X.astype(">f4"))), 0, "byte order")
case("C06 float64", given("x.npz", npz(x=X.astype(np.float64))), 0, "rounded")
case("C06 lossy", given("x.npz", npz(x=np.full(X.shape, 2**31 - 1))), 4, "without loss")
case("C07 case", given("x.npz", npz(X=X)), 4, "rename 'X' to 'x'")
case("C07 rank", given("x.npz", npz(x=X[0])), 4, "x[None]")
case("C07 dimension", given("x.npz", npz(x=X[:, :5])), 4, "(400, 5)")
case("C07 extra", given("x.npz", npz(x=X, z=X)), 4, "'z'")
case("C08 none", given("x.npz", npz(x=X[:0])), 4, "no samples")


def fixed(folder: Path) -> list[str]:
    onnx.save(mlp(batch=8), folder / "m.onnx")
    (folder / "x.npz").write_bytes(npz(x=X[:397]))
    return [*DATA, "x.npz"]


case("C08 tail", fixed, 0, "left out")
case("C09 nan", given("x.npz", npz(x=np.where(X > 2, np.nan, X))), 4, "NaN or infinite")
case("C09 one", given("x.npz", npz(x=X[:1])), 4, "few")
case("C09 constant", given("x.npz", npz(x=np.zeros_like(X))), 0, "all samples are identical")
case("C10 complex", given("x.npz", npz(x=X.astype(complex))), 4, "complex128")
case("C10 text", given("x.npz", npz(x=np.full(X.shape, "a"))), 4, "real numbers")
case("C10 structured", given("x.npz", npz(x=np.zeros(400, dtype=[("a", "f4")]))), 4, "real numbers")
case("C10 Fortran", given("x.npz", npz(x=np.asfortranarray(X))), 0)
case("C11 raises", script("def load_data():\n    raise RuntimeError('mine')"), 4, "mine")
case("C11 none", script("def load_data():\n    return None"), 4, "s.py")
case("C11 exits", script("def load_data():\n    sys.exit(0)"), 4, "SystemExit")
case("C11 no function", script(""), 4, "load_data")
case(
    "C11 endless",
    script(
        "def load_data():\n    os.chdir('/')\n    print('loud')\n    r = np.random.default_rng(0)\n"
        "    while True:\n        yield {'x': r.standard_normal((8, 6)).astype('f')}",
        "--samples",
        "400",
    ),
    0,
    "loud",
)
case(
    "C12 one buffer",
    script(
        "def load_data():\n    r, b = np.random.default_rng(0), np.empty((8, 6), 'f')\n    for _ in range(50):\n"
        "        b[...] = r.standard_normal(b.shape)\n        yield {'x': b}"
    ),
    0,
)
case("C13 header", given("x.safetensors", (100 << 20).to_bytes(8, "little") + b"{}"), 4, "x.safetensors")
case("C13 twice", given("x.safetensors", tensors(f"{{{_X},{_X}}}", bytes(24))), 4, "x.safetensors")
case("C13 gap", given("x.safetensors", tensors(f"{{{_X}}}", bytes(48))), 4, "x.safetensors")
case("C13 overlap", given("x.safetensors", tensors(f"{{{_X},{_X.replace('x', 'z')}}}", bytes(24))), 4, "x.safetensors")

# --- E05, E06: other files ----------------------------------------------------------------------------------------------


def plan(**changes: Any) -> Make:
    """A plan of another model, or of none."""

    def make(folder: Path) -> list[str]:
        raw(OK)(folder)
        fields = {"schema_version": 1, "model_sha256": "0" * 64, "objective": "variance", "replacement": "constant"}
        (folder / "p.json").write_text(json.dumps({**fields, "swap": 0.1, "sites": [], **changes}))
        return ["apply", "m.onnx", "p.json"]

    return make


def statistics(folder: Path) -> list[str]:
    raw(OK)(folder)
    text = json.dumps({"__metadata__": {"mscompile": json.dumps({"schema_version": 2, "model_sha256": "0" * 64})}})
    (folder / "s.safetensors").write_bytes(tensors(text, b""))
    return ["plan", "m.onnx", "s.safetensors", "--keep", "0.5"]


def configured(folder: Path) -> list[str]:
    raw(OK)(folder)
    (folder / "mscompile.toml").write_text('calib = "s.py"\ncustom-op-lib = "evil.so"\nallow-symlinks = true\n')
    return DRY


def locked(name: str, *arguments: str) -> Make:
    """Another process holds a lock."""

    def make(folder: Path) -> list[str]:
        raw(OK)(folder)
        lock = folder / name
        lock.parent.mkdir(exist_ok=True)
        held = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(99)"
        HOLDERS.append(subprocess.Popen([sys.executable, "-c", held, str(lock)], stdout=subprocess.PIPE))
        assert HOLDERS[-1].stdout is not None
        HOLDERS[-1].stdout.readline()
        return [*COMPILE, *arguments]

    return make


HOLDERS: list[subprocess.Popen[bytes]] = []
"""Processes that hold locks."""

case("E03 output", locked(".out.onnx.lock", "-o", "out.onnx"), 2, "another run writes this output")
case("E03 work folder", locked("w/.lock", "-o", "out.onnx", "--work", "w"), 2, "another run works in this folder")
case("E05 plan of another model", plan(), 2, "another model")
case("E05 plan of another version", plan(schema_version=99), 2, "p.json")
case("E05 tampered plan", plan(sites=[{"name": "h0", "kept": "__import__('os')"}]), 2, "p.json")
case("E05 statistics of another model", statistics, 2, "s.safetensors")
case("E06 configuration", configured, 0)

# --- the process that runs them -----------------------------------------------------------------------------------------


def peak(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def run_all(root: Path) -> None:
    """Run every case in a folder of its own, and write down what happened."""
    import mscompile.intake.trial
    import mscompile.network.latency
    import mscompile.network.sizes
    import mscompile.runtime
    from mscompile import cli, compile_model, stages  # noqa: F401  # loaded before what is opened is recorded

    mscompile.network.latency.POINT_SECONDS, mscompile.network.latency.POINT_RUNS = 0.0, 1
    mscompile.network.sizes.LATENCY_SECONDS = 0.0
    mscompile.runtime.RUN_SECONDS = mscompile.intake.trial.LOOP_SECONDS = 1.0
    opened: list[str] = []
    recording = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)
    raw(OK)(root)
    np.savez(root / "data.npz", x=X)
    os.chdir(root)
    cli.run([*COMPILE, "-o", "warm.onnx"])
    results = {}
    for number, (name, (make, _, _)) in enumerate(CASES.items()):
        folder = root / f"{number} {name.replace('/', '_')}" / "model"
        folder.mkdir(parents=True)
        secret(folder).parent.mkdir()
        weights(secret(folder).parent, name="secret.bin")
        np.savez(folder / "data.npz", x=X)
        arguments = make(folder) or COMPILE
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        before = sorted(map(str, folder.parent.rglob("*")))
        opened.clear()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        resident = peak("VmRSS")
        out, err = io.StringIO(), io.StringIO()
        start, recording = time.perf_counter(), True
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(arguments)
        recording = False
        results[name] = {
            "code": code,
            "err": err.getvalue(),
            "seconds": time.perf_counter() - start,
            "memory": peak("VmHWM") - resident,
            "left": sorted(set(map(str, folder.parent.rglob("*"))).symmetric_difference(before)),
            "opened": sorted(set(opened)),
            "folder": str(folder),
        }
    for holder in HOLDERS:
        holder.kill()
    (root / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    root = tmp_path_factory.mktemp("bad")
    path = os.pathsep.join([str(Path(mscompile.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(root / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((root / "results.json").read_bytes())


@pytest.mark.parametrize("name", CASES)
def test_ends_as_it_should(results: Mapping[str, Any], name: str):
    _, code, words = CASES[name]
    ran = results[name]
    assert ran["code"] == code, ran["err"]
    assert words in ran["err"]
    assert "Traceback" not in ran["err"]
    if code:
        error = ran["err"][ran["err"].index("mscompile: ") :]
        assert re.match(r"mscompile: \S.*\n  where: \S.*\n(  why:   \S.*\n(         .*\n)*)  try:   \S", error), error
        assert len(error) < 2000
        assert ran["seconds"] < SECONDS
        assert ran["memory"] < MEMORY
    assert ran["left"] == []


@pytest.mark.parametrize("name", CASES)
def test_opens_nothing_elsewhere(results: Mapping[str, Any], name: str):
    """Files of Python, its packages and of the system's description aside."""
    ran = results[name]
    roots = [ran["folder"], str(Path(ran["folder"]).parents[1] / "cache"), sys.prefix, sys.base_prefix]
    roots += [str(Path(mscompile.__file__).resolve().parents[1]), "/proc", "/sys", "/dev/null"]
    allowed = tuple(os.path.realpath(root) for root in roots)
    assert [path for path in ran["opened"] if not path.startswith(allowed)] == []
    assert not [path for path in ran["opened"] if path.endswith("mscompile.toml")]


# --- what is not a matter of one command --------------------------------------------------------------------------------


def test_b18_a_file_that_is_exchanged_is_not_read(tmp_path: Path):
    from mscompile.intake.loading import check_unchanged, load_model

    outside("w.bin", weights)(tmp_path)
    for change in (lambda p: p.write_bytes(bytes(384)), lambda p: p.unlink(), lambda p: (p.unlink(), weights(tmp_path))):
        weights(tmp_path)
        model, _ = load_model(tmp_path / "m.onnx")
        change(tmp_path / "w.bin")
        with pytest.raises(ModelError) as refusal:
            check_unchanged(model)
        assert "w.bin" in str(refusal.value)


def test_c14_what_was_read_stays_as_it_was(tmp_path: Path):
    from mscompile.intake.data import read
    from mscompile.intake.samples import InputSpec

    (tmp_path / "x.npz").write_bytes(npz(x=X))
    found = read(tmp_path / "x.npz", [InputSpec("x", np.dtype(np.float32), ("N", 6))])
    before = found.sha256
    (tmp_path / "x.npz").write_bytes(npz(x=X + 1))
    assert found.take(slice(None)).sha256 == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            "B43",
            "in full it takes 47 s (benchmarks/many_nodes.py); a tenth of the nodes is among the cases",
        ),
    ],
)
def test_not_run(row: str, reason: str):
    pytest.skip(f"{row}: {reason}")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
