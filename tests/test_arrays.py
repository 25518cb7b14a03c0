"""Files of arrays that are too large, broken or hostile."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from data_files import BF16, ONE, TWO, X, Y, as_npz, as_sets, as_zip, conforms, npy_bytes, refused, spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import save, save_file

from mscompile.errors import DataError, ResourceError, UsageError
from mscompile.intake import room, sources
from mscompile.intake.data import read

# --- limits ----------------------------------------------------------------------------------------------------------


def test_limit_keeps_the_first_samples_and_reads_no_further() -> None:
    taken = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield {"x": X + taken, "label": Y}

    samples = read(endless(), ONE, limit=12)
    assert (len(samples), len(samples.labels), taken) == (12, 12, 3)
    np.testing.assert_array_equal(samples.inputs["x"][10:], X[:2] + 3)
    assert samples.notes == ()
    assert len(read({"x": X}, ONE, limit=2)) == 2
    assert len(read({"x": X}, ONE, limit=99)) == 5
    assert "limit" in refused({"x": X}, error=UsageError, limit=0)


def test_endless_sources_stop_at_the_default_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BOUND", 12)
    samples = read(({"x": X + i} for i in iter(int, 1)), ONE)
    assert len(samples) == 12
    assert "stopped at 12 samples" in "".join(samples.notes)
    assert len(read({"x": np.repeat(X, 4, axis=0)}, ONE)) == 20


def test_memory_bounds_what_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_npz(tmp_path / "a.npz", x=X)
    save_file({"x": X}, tmp_path / "a.safetensors")
    monkeypatch.setattr(room, "available_memory", lambda: 100)
    assert "fit into memory" in refused(({"x": X + i} for i in iter(int, 1)), error=ResourceError)
    monkeypatch.setattr(room, "MAP_ABOVE", 100)
    assert "fit into memory" in refused(path, error=ResourceError)
    assert "fit into memory" in refused(tmp_path / "a.safetensors", error=ResourceError)
    assert "fit into memory" in refused({"x": np.tile(X, (9, 1)).astype("f2")}, error=ResourceError)


def test_available_memory_is_plausible() -> None:
    assert 2**20 < room.available_memory() <= sys.maxsize


def test_running_out_of_memory_is_a_resource_error() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"x": X}
        raise MemoryError

    assert "out of memory" in refused(broken(), error=ResourceError)


# --- hostile and broken files ----------------------------------------------------------------------------------------


def header(shape: str = "(5, 3)", descr: str = "'<f4'", version: tuple[int, int] = (1, 0), pad: int = 0) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b" " * pad + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


OBJECTS = np.array([Evil(), Evil()], dtype=object)
NPY = {
    "pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00K\x01.", "magic"),
    "objects": (npy_bytes(OBJECTS, allow_pickle=True), "pickled"),
    "empty": (b"", "reading magic string"),
    "html": (b"<!DOCTYPE html>", "magic"),
    "zip": (b"PK\x03\x04" + b"\0" * 40, "magic"),
    "2^60 elements": (header(f"({2**60},)") + X.tobytes(), "declares"),
    "product beyond 64 bits": (header(f"({2**40}, {2**40})") + X.tobytes(), "declares"),
    "no body": (header(f"({2**29},)"), "0 bytes follow"),
    "short body": (header() + X.tobytes()[:-1], "59 bytes follow"),
    "long body": (header() + X.tobytes() + b"\0", "61 bytes follow"),
    "two arrays": (npy_bytes(X) + npy_bytes(X), "bytes follow"),
    "negative shape": (header("(-1, -60)") + X.tobytes(), "declares"),
    "shape of text": (header("('5', 3)") + X.tobytes(), "shape"),
    "long header": (header(pad=18_000) + X.tobytes(), "large"),
    "version 3": (header(version=(3, 0)) + X.tobytes(), "version"),
    "code for a header": (header("__import__('os').mkdir('unpickled')") + X.tobytes(), "malformed"),
    "structured": (npy_bytes(np.zeros(5, [("a", "f4"), ("b", "i4")])), "one plain array per input"),
    "text": (npy_bytes(np.full((5, 3), "abc")), "encode them as real numbers"),
    "bytes": (npy_bytes(np.full((5, 3), b"abc")), "encode them as real numbers"),
    "complex": (npy_bytes(X.astype(np.complex64)), "real numbers"),
    "dates": (npy_bytes(np.zeros((5, 3), "M8[s]")), "encode them as real numbers"),
    "void that may be bfloat16": (npy_bytes(X.astype(BF16)), "one plain array per input"),
    "void": (npy_bytes(np.zeros((5, 3), "V4")), "one plain array per input"),
    "huge and empty": (header(f"({2**60}, 0)"), "wrong shape"),
}


@pytest.mark.parametrize(("content", "said"), NPY.values(), ids=NPY)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_npy(content: bytes, said: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = as_zip(tmp_path / "a.npz", ("x.npy", content)) if packed else tmp_path / "a.npy"
    if not packed:
        path.write_bytes(content)
    message = refused(path)
    assert said in message
    assert str(path) in message
    assert not (tmp_path / "unpickled").exists()


def test_whole_axis_of_nothing_is_no_sample(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(header(f"({2**60}, 0)"))
    assert "no samples" in refused(tmp_path / "a.npy", [spec(shape=("N", "T"))])
    specs = [spec(), spec("past", shape=("N", "T"))]
    assert read({"x": X, "past": np.zeros((5, 0), np.float32)}, specs).inputs["past"].shape == (5, 0)


GOOD = npy_bytes(X)
MEMBERS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "parent": ([("../../x.npy", GOOD)], "np.savez"),
    "parent inside": ([("a/../x.npy", GOOD)], "np.savez"),
    "absolute": ([("/x.npy", GOOD)], "np.savez"),
    "backslash": ([("..\\x.npy", GOOD)], "np.savez"),
    "not npy": ([("x.npy", GOOD), ("notes.txt", b"hello")], "np.savez"),
    "folder": ([("x.npy", GOOD), ("d/", b"")], "np.savez"),
    "no members": ([], "names do not match"),
}


@pytest.mark.parametrize(("members", "said"), MEMBERS.values(), ids=MEMBERS)
def test_names_of_members(members: list[tuple[str, bytes]], said: str, tmp_path: Path) -> None:
    assert said in refused(as_zip(tmp_path / "a.npz", *members))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(tmp_path: Path) -> None:
    assert "'x.npy' is there more than once" in refused(as_zip(tmp_path / "a.npz", ("x.npy", GOOD), ("x.npy", GOOD)))


def test_names_with_folders_in_them_are_names(tmp_path: Path) -> None:
    assert len(read(as_npz(tmp_path / "a.npz", **{"serving/x:0": X}), [spec("serving/x:0")])) == 5


def test_compressions_other_than_numpys(tmp_path: Path) -> None:
    assert "compression" in refused(as_zip(tmp_path / "a.npz", ("x.npy", GOOD), compression=zipfile.ZIP_BZIP2))


def test_checksum_and_truncation(tmp_path: Path) -> None:
    whole = as_npz(tmp_path / "a.npz", x=X).read_bytes()
    at = whole.index(X.tobytes())
    (tmp_path / "a.npz").write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    assert "CRC" in refused(tmp_path / "a.npz")
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.npz").write_bytes(whole[:size])
        assert "BadZipFile" in refused(tmp_path / "a.npz")


def test_encrypted_members(tmp_path: Path) -> None:
    content = bytearray(as_npz(tmp_path / "a.npz", x=X).read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "encrypted" in refused(tmp_path / "a.npz")


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAP_ABOVE", 2**20)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((2**18, 3), np.float32))
    assert "would expand" in refused(tmp_path / "a.npz")
    monkeypatch.setattr(room, "available_memory", lambda: 2**20)
    np.savez(tmp_path / "a.npz", x=np.zeros((2**18, 3), np.float32))
    assert "fit into memory" in refused(tmp_path / "a.npz", error=ResourceError)


def tensors(head: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: tuple[int, ...] = (5, 3), ends: tuple[int, int] = (0, 60)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


TWICE = json.dumps(entry()).encode()
SAFETENSORS = {
    "empty": (b"", "header"),
    "garbage": (b"\xff" * 64, "header"),
    "header too large": (struct.pack("<Q", 2**40) + b"{}", "header"),
    "short": (tensors({"x": entry()}, X.tobytes()[:-1]), "cover"),
    "long": (tensors({"x": entry()}, X.tobytes() + b"\0"), "cover"),
    "overlap": (tensors({"x": entry(), "ids": entry()}, X.tobytes()), "offset"),
    "hole": (tensors({"x": entry(ends=(4, 64))}, b"\0" * 64), "offset"),
    "shape of another size": (tensors({"x": entry(shape=(4, 3))}, X.tobytes()), "shape"),
    "product beyond 64 bits": (tensors({"x": entry(shape=(2**40, 2**40))}, X.tobytes()), "overflow"),
    "duplicate key": (tensors(b'{"x":' + TWICE + b',"x":' + TWICE + b"}", X.tobytes()), "more than once"),
    "complex": (tensors({"x": entry("C64", (5, 3), (0, 120))}, bytes(120)), "real numbers"),
    "eight bits": (tensors({"x": entry("F8_E4M3", (5, 3), (0, 15))}, bytes(15)), "float8"),
}


@pytest.mark.parametrize(("content", "said"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_broken_safetensors(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert said in refused(tmp_path / "a.safetensors")


def test_broken_test_data_sets(tmp_path: Path) -> None:
    folder = as_sets(tmp_path, {"x": X}) / "test_data_set_0"
    good = (folder / "input_0.pb").read_bytes()
    tensor = onnx.TensorProto.FromString(good)
    (folder / "input_1.pb").write_bytes(good)
    assert "1 inputs, but found input_0.pb, input_1.pb" in refused(folder)
    assert "two files hold 'x'" in refused(folder, [spec("ids"), spec("x")])
    (folder / "input_1.pb").rename(folder / "input_2.pb")
    assert "input_2.pb" in refused(folder, TWO)
    (folder / "input_2.pb").unlink()
    assert "'ids' int64 (N, 2)" in refused(folder, TWO)
    (folder / "input_0.pb").write_bytes(good[:-1])
    assert "Error" in refused(folder)
    tensor.dims[0] = 2**40
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert "reshape" in refused(folder)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert "another file" in refused(folder)
    (folder / "input_0.pb").write_bytes(numpy_helper.from_array(np.full((5, 3), "a", object)).SerializeToString())
    assert "real numbers" in refused(folder)
    (folder / "input_0.pb").unlink()
    assert "no input_*.pb" in refused(tmp_path)


@given(st.sampled_from(["npz", "npy", "safetensors", "pb"]), st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kind: str, draw: st.DataObject) -> None:
    if kind == "pb":
        content = numpy_helper.from_array(X, "x").SerializeToString()
    elif kind == "npz":
        content = as_npz(tmp_path / "good.npz", x=X).read_bytes()
    else:
        content = npy_bytes(X) if kind == "npy" else save({"x": X})
    damaged = bytearray(content)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    path = tmp_path / f"a.{kind}"
    if kind == "pb":
        (tmp_path / "sets").mkdir(exist_ok=True)
        path = tmp_path / "sets" / "input_0.pb"
    path.write_bytes(damaged[: draw.draw(st.integers(len(damaged) // 2, len(damaged)))])
    try:
        samples = read(path.parent if kind == "pb" else path, ONE, allow_nan=True)
    except (DataError, ResourceError):
        return
    assert conforms(samples, ONE)
