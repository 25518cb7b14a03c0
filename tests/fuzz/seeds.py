"""Sound files to begin with, and such as are nearly; and what lies beside them."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

Made = dict[str, bytes]


def prepare(folder: Path) -> None:
    """What lies beside the files."""
    (folder / "w.bin").write_bytes(bytes(1 << 14))
    for name in ("dense.onnx", "small.onnx"):
        (folder / name).write_bytes(made()[name])


@cache
def made() -> Made:
    """A small network compiled and audited: every kind of file that is written on the way."""
    import onnx
    from small_models import FEATURES, mlp, samples

    from mscompile.audit.pipeline import audit
    from mscompile.audit.setup import AuditOptions
    from mscompile.options import Options
    from mscompile.pipeline import compile_model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, small, data = folder / "dense.onnx", folder / "small.onnx", folder / "audit.npz"
        onnx.save(mlp((FEATURES, 8, 3)), dense)
        np.savez(folder / "dense.calib.npz", x=samples(200, seed=1))
        np.savez(data, x=samples(60, seed=2))
        compile_model(dense, None, small, Options(keep=0.5))
        certificate = audit(dense, small, data, AuditOptions(table=16), output=folder / "small.audit.json")
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "small.audit.json": certificate.to_json().encode()}


def seeds(target: str) -> Iterator[bytes]:
    """Seeds of a target."""
    found = globals()[f"_{target}"]()
    yield from found


def _model() -> Iterator[bytes]:
    import onnx
    from small_models import mlp

    model = mlp((6, 64, 32, 3))
    yield model.SerializeToString()
    yield mlp(ir=3).SerializeToString()
    for tensor in model.graph.initializer[:2]:
        entries = {"location": "w.bin", "offset": "0", "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
    yield model.SerializeToString()


def _npy() -> Iterator[bytes]:
    from small_models import samples

    for array in (samples(8), samples(8).astype(np.float64).T.copy().T, np.zeros((2, 6), ">f4")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        yield buffer.getvalue()


def _npz() -> Iterator[bytes]:
    from small_models import samples

    yield from (b"\0" + content for content in _npy())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=samples(8), label=np.arange(8))
    yield buffer.getvalue()


def _safetensors() -> Iterator[bytes]:
    import safetensors.numpy
    from small_models import samples

    yield safetensors.numpy.save({"x": samples(8), "label": np.arange(8)})
    yield safetensors.numpy.save({"x": samples(2).astype(np.float64)}, {"a": "b"})


def _tensor() -> Iterator[bytes]:
    from onnx import numpy_helper
    from small_models import samples

    yield numpy_helper.from_array(samples(2), "x").SerializeToString()


def _plan() -> Iterator[bytes]:
    yield made()["small.plan.json"]
    site = {"name": "h", "tensor": "h", "axis": 1, "size": 3, "kept": [0, 2], "constants": [0.5], "affine": [[1.0, 2.0]]}
    window = {"reader": "y", "places": [[0], [2]], "columns": [[[1.0]], [[2.0]]], "response": [[0.0]]}
    plan = {"schema_version": 1, "model_sha256": "0" * 64, "objective": "kl", "replacement": "affine", "swap": 0.1}
    yield json.dumps({**plan, "sites": [{**site, "windows": [window]}]}).encode()
    yield json.dumps({**plan, "sites": []}).encode()


def _certificate() -> Iterator[bytes]:
    yield made()["small.audit.json"]


def _report() -> Iterator[bytes]:
    yield made()["small.report.json"]
    yield made()["small.audit.json"]


def _tau() -> Iterator[bytes]:
    site = {"dense": "h0", "compiled": "h0", "dense_axis": 1, "compiled_axis": 1, "dense_channels": [0, 3]}
    yield json.dumps({"sites": [{**site, "compiled_channels": [0, 1]}]}).encode()
    yield json.dumps({"h0": [0, 1, 2, 3]}).encode()


def _metadata() -> Iterator[bytes]:
    yield json.dumps({"tau": {"h0": [0, 2, 4, 5]}, "channels": {"h0": [1, [0, 2, 4, 5]]}}).encode()


def _statistics() -> Iterator[bytes]:
    import safetensors.numpy

    header = {"schema_version": 2, "model_sha256": "0" * 64, "moments": {"h": 8}, "curvature": {"h": 8}, "windows": {}}
    more = {"samples": 8, "refused": {}, "data_sha256": [], "onnxruntime": "1", "metric": "none", "outputs": {}}
    arrays = {f"moments/{q}/h": np.ones(3) for q in ("mean", "squares", "low", "high")}
    arrays |= {f"curvature/{q}/h": np.ones(3) for q in ("s11", "s12", "s22", "g1", "g2")}
    metadata = {"mscompile": json.dumps({**header, **more, "scales": {}})}
    yield safetensors.numpy.save({**arrays, "moments/scatter/h": np.eye(3)}, metadata)


def _latencies() -> Iterator[bytes]:
    yield json.dumps({"Gemm [[64, 6], [6, 8]] {}": 0.25, "Conv [] {}": 1}).encode()


def _journal() -> Iterator[bytes]:
    lines = ({"name": "data", "value": "0" * 64}, {"name": "a", "sha256": "0" * 64}, {"name": "b", "value": [1, {"c": 2}]})
    yield b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _parcel() -> Iterator[bytes]:
    import ml_dtypes

    from mscompile.runs.parcel import Parcel

    yield Parcel({"a": 1}, {"x": np.arange(6.0).reshape(2, 3), "y": np.zeros(0, np.int8)}).pack()
    yield Parcel({}, {"z": np.zeros((2, 2), ml_dtypes.bfloat16)}).pack()
