"""Graphs without their weights, which are shared by all sessions, from memory or mapped from files.

A skeleton is a ModelProto whose larger initializers hold no data. Surgery makes many graphs of one network; with skeletons
that costs no memory, and no limit of protobuf on the size of messages is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mscompile.intake.mapped import place_of
from mscompile.intake.payloads import LEAST, PLAIN, Bytes
from mscompile.intake.vetting import is_external, take, without_initializers

HEAVY = 1 << 10
"""Bytes from which a weight is left out."""
IN_MEMORY = "shared"
"""Location of weights that are given with a session."""
_SHARED = {
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.INT8,
    ir.DataType.UINT8,
}
"""Element types that can be shared. Integers of more bits may be shapes, which onnxruntime wants to see in the graph."""

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Skeleton:
    """A graph without its larger weights, and these by name."""

    proto: onnx.ModelProto
    weights: Weights = field(default_factory=dict)

    def with_graph(self, proto: onnx.ModelProto, more: Weights | None = None) -> Skeleton:
        """Another graph with the same weights, and more."""
        return Skeleton(proto, {**self.weights, **more} if more else self.weights)

    def with_weights(self, given: Weights) -> Skeleton:
        """The graph with inputs named in `given` turned into weights."""
        found = onnx.ModelProto()
        found.CopyFrom(self.proto)
        left = [value for value in found.graph.input if value.name not in given]
        del found.graph.input[:]
        found.graph.input.extend(left)
        for name, array in given.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            found.graph.initializer.append(stub(name, kind, array.shape))
        return self.with_graph(found, given)

    @property
    def shared(self) -> dict[str, npt.NDArray[Any]]:
        """Weights that are to be given with a session; the others are mapped by onnxruntime itself."""
        return {
            tensor.name: np.require(self.weights[tensor.name], requirements=["C", "A"])
            for tensor in self.proto.graph.initializer
            if is_external(tensor) and tensor.external_data[0].value == IN_MEMORY
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights left out."""
        return sum(array.nbytes for array in self.weights.values())

    def portable(self) -> Skeleton:
        """The same with no weights left to be mapped: it can be taken to where their files are not."""
        found = onnx.ModelProto()
        found.CopyFrom(self.proto)
        for tensor in filter(is_external, found.graph.initializer):
            tensor.CopyFrom(stub(tensor.name, tensor.data_type, tensor.dims))
        return self.with_graph(found)

    def array(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """Content of one of the initializers."""
        return self.weights[tensor.name] if is_external(tensor) else onnx.numpy_helper.to_array(tensor)

    def whole(self) -> onnx.ModelProto:
        """The graph with all its weights in it."""
        found = onnx.ModelProto()
        found.CopyFrom(self.proto)
        for tensor in found.graph.initializer:
            if is_external(tensor):
                tensor.CopyFrom(onnx.numpy_helper.from_array(self.weights[tensor.name], tensor.name))
        return found


def stub(name: str, kind: int, dims: Iterable[int], array: npt.NDArray[Any] | None = None) -> onnx.TensorProto:
    """A tensor without data: it lies where `array` lies in a file, or is given with the session."""
    found = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    place = None if array is None else place_of(array)
    entries: dict[str, str | int] = {"location": IN_MEMORY}
    if place is not None and array is not None:
        entries = {"location": place.path.lstrip("/"), "offset": place.offset, "length": array.nbytes}
    found.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in entries.items())
    return found


def weightless(model: onnx.ModelProto | Skeleton) -> Skeleton:
    """A model without its heavy weights, of which one copy is made; a skeleton as it is."""
    if isinstance(model, Skeleton):
        return model
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    weights: dict[str, npt.NDArray[Any]] = {}
    for tensor in skeleton.graph.initializer:
        if tensor.data_type in _SHARED and tensor.ByteSize() >= HEAVY:
            weights[tensor.name] = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(stub(tensor.name, tensor.data_type, tensor.dims))
    return Skeleton(skeleton, weights)


def skeleton_of(model: ir.Model) -> Skeleton:
    """A model without its heavy weights, which are not copied."""
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _SHARED and tensor.nbytes >= HEAVY:
            weights[name] = tensor.numpy()
    return Skeleton(serialised(model, weights, shared=True), weights)


def serialised(model: ir.Model, heavy: Weights, *, shared: bool) -> onnx.ModelProto:
    """ModelProto of a model in which the initializers `heavy` are stubs; without `shared`, they just hold no data."""
    copy = model.clone()
    for name in heavy:
        value = copy.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        empty = ir.ExternalTensor("", None, None, tensor.dtype, shape=tensor.shape, name=name, doc_string=tensor.doc_string)  # type: ignore[arg-type]
        empty.metadata_props.update(tensor.metadata_props)
        value.const_value = empty
    proto = ir.to_proto(copy)
    for entry in proto.graph.initializer:
        if entry.name in heavy and shared:
            entry.CopyFrom(stub(entry.name, entry.data_type, entry.dims, heavy[entry.name]))
        elif entry.name in heavy:
            entry.ClearField("data_location")
            entry.ClearField("external_data")
    return proto


def apart(model: ir.Model) -> tuple[onnx.ModelProto, dict[int, Bytes]]:
    """ModelProto of a model without the data of its larger initializers, and that by their numbers, not copied."""
    heavy = {
        name: np.ascontiguousarray(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.Tensor) and value.const_value.dtype.value in PLAIN
        if value.const_value.nbytes >= LEAST
    }
    proto = serialised(model, heavy, shared=False)
    numbers = {tensor.name: number for number, tensor in enumerate(proto.graph.initializer)}
    return proto, {numbers[name]: array.reshape(-1).view(np.uint8) for name, array in heavy.items()}


def parted(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[int, Bytes]]:
    """The same for a ModelProto, which stays as it is: the data is copied once."""
    payloads = {
        number: np.frombuffer(tensor.raw_data, dtype=np.uint8)
        for number, tensor in enumerate(model.graph.initializer)
        if tensor.data_type in PLAIN and len(tensor.raw_data) >= LEAST and not is_external(tensor)
    }
    proto = without_initializers(model)
    for number, tensor in enumerate(model.graph.initializer):
        if number not in payloads:
            proto.graph.initializer.append(tensor)
            continue
        entry = proto.graph.initializer.add()
        for kind, value in tensor.ListFields():
            if kind.name != "raw_data":
                take(entry, kind.name, value)
    return proto, payloads
