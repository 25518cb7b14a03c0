"""Every rule by which samples are read, on generated files only."""

from __future__ import annotations

import io
import json
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import save, save_file

from mscompile.errors import DataError, MscompileError, ResourceError, UnsupportedError, UsageError
from mscompile.intake import conforming, room, sources
from mscompile.intake.data import find_beside, read, recipe
from mscompile.intake.samples import InputSpec, Samples

BF16 = np.dtype(ml_dtypes.bfloat16)
X = np.arange(15, dtype=np.float32).reshape(5, 3) / 8
IDS = np.arange(10, dtype=np.int64).reshape(5, 2)
Y = np.array([0, 1, 2, 1, 0])


def spec(name: str = "x", dtype: Any = np.float32, shape: tuple[Any, ...] = ("N", 3)) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ONE = [spec()]
TWO = [spec(), spec("ids", np.int64, ("N", 2))]


def as_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy_bytes(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def as_zip(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def as_sets(parent: Path, *sets: dict[str, np.ndarray[Any, Any]]) -> Path:
    for i, arrays in enumerate(sets):
        (parent / f"test_data_set_{i}").mkdir(parents=True)
        for j, (name, x) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(x, name)
            (parent / f"test_data_set_{i}" / f"input_{j}.pb").write_bytes(tensor.SerializeToString())
    return parent


def refused(src: Any, specs: list[InputSpec] = ONE, error: type[MscompileError] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read(src, specs, **options)
    assert type(caught.value) is error
    assert all([caught.value.what, caught.value.where, caught.value.why, caught.value.hint])
    return str(caught.value)


def conforms(samples: Samples, specs: list[InputSpec]) -> bool:
    return list(samples.inputs) == [s.name for s in specs] and all(
        x.dtype == s.dtype and x.dtype.isnative and x.flags.c_contiguous and len(x) == len(samples)
        for s, x in zip(specs, samples.inputs.values(), strict=True)
    )


# --- sources ---------------------------------------------------------------------------------------------------------


class Getter:
    """A CalibrationDataReader that hands out one buffer again and again."""

    def __init__(self) -> None:
        self.at = 0
        self.buffer = {"x": np.empty((1, 3), np.float32), "ids": np.empty((1, 2), np.int64)}

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        if self.at == len(X):
            return None
        self.buffer["x"][0], self.buffer["ids"][0] = X[self.at], IDS[self.at]
        self.at += 1
        return self.buffer


def reusing() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    reader = Getter()
    while (batch := reader.get_next()) is not None:
        yield batch


def in_folder(folder: Path, write: Callable[[Path, dict[str, Any]], object], suffix: str) -> Path:
    folder.mkdir()
    for i, part in enumerate((slice(0, 2), slice(2, 3), slice(3, 5))):
        write(folder / f"part{i}{suffix}", {"x": X[part], "ids": IDS[part]})
    (folder / "README.md").write_text("ignored")
    (folder / ".hidden.npz").write_text("ignored")
    return folder


def one_npy_each(folder: Path) -> Path:
    folder.mkdir()
    np.save(folder / "x.npy", X)
    np.save(folder / "ids.npy", IDS)
    return folder


def as_script(path: Path, body: str, name: str = "load_data") -> Path:
    path.write_text(f"import numpy as np\ndef {name}():\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    return path


YIELDS = (
    "for i in range(5):\n"
    "    x = np.arange(15, dtype=np.float32).reshape(5, 3)[i:i+1] / 8\n"
    "    yield {'x': x, 'ids': np.arange(10).reshape(5, 2)[i:i+1]}"
)
SOURCES: dict[str, Callable[[Path], Any]] = {
    "npz": lambda tmp: as_npz(tmp / "a.npz", x=X, ids=IDS),
    "npz deflated": lambda tmp: np.savez_compressed(tmp / "a.npz", x=X, ids=IDS) or tmp / "a.npz",
    "path as str": lambda tmp: str(as_npz(tmp / "a.npz", ids=IDS, x=X)),
    "upper case suffix": lambda tmp: as_npz(tmp / "a.npz", x=X, ids=IDS).rename(tmp / "a.NPZ"),
    "safetensors": lambda tmp: save_file({"x": X, "ids": IDS}, tmp / "a.safetensors") or tmp / "a.safetensors",
    "folder of npz": lambda tmp: in_folder(tmp / "d", lambda p, a: np.savez(p, **a), ".npz"),
    "folder of safetensors": lambda tmp: in_folder(tmp / "d", lambda p, a: save_file(a, p), ".safetensors"),
    "folder of npy": lambda tmp: one_npy_each(tmp / "d"),
    "test data set": lambda tmp: as_sets(tmp, {"x": X, "ids": IDS}) / "test_data_set_0",
    "test data sets": lambda tmp: as_sets(tmp, *({"x": X[i : i + 1], "ids": IDS[i : i + 1]} for i in range(5))),
    "test data set without names": lambda tmp: as_sets(tmp, {"": X, "?": IDS}),
    "test data set by name": lambda tmp: as_sets(tmp, {"ids": IDS, "x": X}),
    "script": lambda tmp: as_script(tmp / "load.py", YIELDS),
    "script with function": lambda tmp: f"{as_script(tmp / 'load.py', YIELDS, 'mine')}:mine",
    "mapping": lambda _: {"ids": IDS, "x": X},
    "mapping of lists": lambda _: {"x": X.tolist(), "ids": IDS.tolist()},
    "list of dicts": lambda _: [{"x": X[:4], "ids": IDS[:4]}, {"x": X[4:], "ids": IDS[4:]}],
    "generator reusing its buffers": lambda _: reusing(),
    "reader reusing its buffers": lambda _: Getter(),
    "samples": lambda _: read({"x": X, "ids": IDS}, TWO),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_samples(make: Callable[[Path], Any], tmp_path: Path) -> None:
    samples = read(make(tmp_path), TWO)
    assert conforms(samples, TWO)
    np.testing.assert_array_equal(samples.inputs["x"], X)
    np.testing.assert_array_equal(samples.inputs["ids"], IDS)
    assert samples.labels is None
    assert samples.source
    assert samples.sha256 == read({"x": X, "ids": IDS}, TWO).sha256


@pytest.mark.parametrize("mapped", [False, True])
def test_npy_serves_models_of_one_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    np.save(tmp_path / "a.npy", X)
    if mapped:
        monkeypatch.setattr(room, "MAP_ABOVE", 16)
    x = read(tmp_path / "a.npy", ONE).inputs["x"]
    np.testing.assert_array_equal(x, X)
    owner: Any = x
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    assert isinstance(owner, mmap.mmap) is mapped
    message = refused(tmp_path / "a.npy", TWO)
    assert "one input only" in message
    assert "'arr_0' float32 (5, 3)" in message


def test_unnamed_array_of_npz_serves_models_of_one_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X, label=Y)
    samples = read(tmp_path / "a.npz", ONE)
    np.testing.assert_array_equal(samples.inputs["x"], X)
    np.testing.assert_array_equal(samples.labels, Y)


def test_test_data_sets_are_in_numerical_order(tmp_path: Path) -> None:
    as_sets(tmp_path, *({"x": np.full((1, 3), i, np.float32)} for i in range(12)))
    assert read(tmp_path, ONE).inputs["x"][:, 0].tolist() == list(range(12))


@pytest.mark.parametrize("make", [lambda: iter([]), list, lambda: iter([{"x": X[:0]}]), lambda: {"x": X[:0]}])
def test_no_samples(make: Callable[[], Any]) -> None:
    assert "there are no samples" in refused(make())


def test_used_up_reader_is_told_apart() -> None:
    reader = Getter()
    read(reader, TWO)
    assert "rewind" in refused(reader, TWO)


def test_conforming_arrays_of_a_mapping_are_shared_and_those_of_iterables_copied() -> None:
    mine = X.copy()
    assert np.shares_memory(read({"x": mine}, ONE).inputs["x"], mine)
    assert not np.shares_memory(read([{"x": mine}], ONE).inputs["x"], mine)


@pytest.mark.parametrize("x", [np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], X[::-1][::-1]])
def test_layout_is_made_contiguous_without_a_note(x: np.ndarray[Any, Any]) -> None:
    samples = read({"x": x}, ONE)
    assert conforms(samples, ONE)
    np.testing.assert_array_equal(samples.inputs["x"], X)
    assert samples.notes == ()


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


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.npz", "absent", "absent.py:load", "n" * 5000, "nul\0.npz"])
def test_missing_paths_are_a_matter_of_usage(name: str, tmp_path: Path) -> None:
    assert "no such file" in refused(f"{tmp_path}/{name}", error=UsageError)


def test_other_kinds_of_path(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04K\x01.")
    assert "never read" in refused(tmp_path / "a.pkl")
    (tmp_path / "a.csv").write_text("1,2,3")
    assert ".npz, .npy, .safetensors" in refused(tmp_path / "a.csv")
    os.mkfifo(tmp_path / "fifo.npz")
    assert "regular files" in refused(tmp_path / "fifo.npz")
    (tmp_path / "script.py").mkdir()
    assert "0 .npy files" in refused(tmp_path / "script.py")


def test_folders_that_do_not_hold_samples(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    assert "does not hold samples" in refused(tmp_path)
    np.save(tmp_path / "x.npy", X)
    samples = read(tmp_path, ONE)
    assert "1 entries" in "".join(samples.notes)
    np.savez(tmp_path / "part.npz", x=X)
    assert "1 .npy files" in refused(tmp_path)


# --- scripts ---------------------------------------------------------------------------------------------------------


SCRIPTS = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom", 3),
    "raises later": ("yield {'x': np.ones((1, 3), 'f4')}\n1 / 0", "ZeroDivisionError", 4),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0", 3),
    "exits later": ("yield {'x': np.ones((1, 3), 'f4')}\nraise SystemExit", "SystemExit", 4),
    "stops": ("next(iter([]))", "StopIteration", 3),
    "returns None": ("pass", "'NoneType' object is not iterable", None),
    "returns a number": ("return 5", "'int' object is not iterable", None),
    "yields arrays": ("yield np.ones((1, 3), 'f4')", "batch 0 is a ndarray, not a dict", None),
    "yields ragged lists": ("yield {'x': [[1., 2.], [3.]]}", "inhomogeneous", None),
    "yields objects": ("yield {'x': [object()]}", "real numbers", None),
    "yields nothing": ("return iter([])", "there are no samples", None),
    "yields no samples for ever": ("while True: yield {'x': np.ones((0, 3), 'f4')}", "there are no samples", None),
    "ragged": ("for n in (3, 4): yield {'x': np.ones((2, n), 'f4')}", "ragged samples", None),
}


@pytest.mark.parametrize(("body", "said", "line"), SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_that_fail(body: str, said: str, line: int | None, tmp_path: Path) -> None:
    path = as_script(tmp_path / "load.py", body)
    message = refused(path, [spec(shape=("N", "T"))])
    assert said in message
    assert f"{path}, line {line}" in message if line else "load.py" in message


@pytest.mark.parametrize(
    ("text", "said"), [("def broken(:", "SyntaxError"), ("x = 1", "'load_data'"), ("raise SystemExit(3)", "line 1")]
)
def test_scripts_that_do_not_load(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(text)
    assert said in refused(tmp_path / "load.py")


def test_script_leaves_the_process_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "beside_the_script.py").write_text("VALUE = 7.0")
    text = (
        "from __future__ import annotations\nimport os, dataclasses\nimport numpy as np\nimport beside_the_script\n"
        "@dataclasses.dataclass\nclass Item:\n    value: float\n"
        "print('hello')\nos.chdir(os.path.join(os.path.dirname(__file__), 'elsewhere'))\n"
        "if __name__ == '__main__': raise RuntimeError\n"
        "def load_data():\n    print('hello again')\n    for i in range(3):\n"
        "        yield {'x': np.full((1, 3), Item(beside_the_script.VALUE).value + i, 'f4')}\n"
    )
    (tmp_path / "load.py").write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = Path.cwd(), list(sys.path)
    samples = read(tmp_path / "load.py", ONE)
    refused(tmp_path / "load.py", TWO)
    assert (Path.cwd(), list(sys.path)) == before
    assert samples.inputs["x"][:, 0].tolist() == [7, 8, 9]
    assert f"load_data() of {tmp_path / 'load.py'}" in "".join(samples.notes)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello again" in err


def test_script_that_never_ends_is_bounded(tmp_path: Path) -> None:
    path = as_script(tmp_path / "load.py", "i = 0\nwhile True:\n    i += 1\n    yield {'x': np.full((2, 3), i, 'f4')}")
    samples = read(path, ONE, limit=5)
    assert samples.inputs["x"][:, 0].tolist() == [1, 1, 2, 2, 3]


def test_script_may_return_a_dict_a_list_or_a_reader(tmp_path: Path) -> None:
    batch = "{'x': np.arange(6, dtype='f4').reshape(2, 3)}"
    for body in (
        f"return {batch}",
        f"return [{batch}]",
        f"return type('R', (), {{'get_next': iter([{batch}, None]).__next__}})()",
    ):
        assert len(read(as_script(tmp_path / "load.py", body), ONE)) == 2


@pytest.mark.parametrize("src", [5, None, [1, 2], np.ones((2, 3)), {"x": X}.items()])
def test_python_objects_that_are_not_samples(src: Any) -> None:
    assert "dict" in refused(src)


# --- dtypes ----------------------------------------------------------------------------------------------------------


BIG = 2**24
EXACT = {
    "f2 to f4": (np.array([1.5, -2], "f2"), "f4"),
    "f4 to f8": (np.array([1.1, 3e38], "f4"), "f8"),
    "i1 to i8": (np.array([-128, 127], "i1"), "i8"),
    "u1 to i4": (np.array([0, 255], "u1"), "i4"),
    "i8 to i4": (np.array([-(2**31), 2**31 - 1], "i8"), "i4"),
    "i8 to u1": (np.array([0, 255], "i8"), "u1"),
    "u8 to i8": (np.array([0, 2**63 - 1], "u8"), "i8"),
    "i8 to bool": (np.array([0, 1], "i8"), "?"),
    "bool to i8": (np.array([True, False]), "i8"),
    "bool to f4": (np.array([True, False]), "f4"),
    "u1 to f4": (np.array([0, 255], "u1"), "f4"),
    "i8 to f4": (np.array([-BIG, BIG], "i8"), "f4"),
    "i8 to f8": (np.array([-(2**53), 2**53], "i8"), "f8"),
    "i4 to f2": (np.array([-2048, 2048], "i4"), "f2"),
    "u1 to bf16": (np.array([0, 255], "u1"), BF16),
    "f4 to f2": (np.array([0.5, 65504, np.inf, np.nan], "f4"), "f2"),
    "f8 to f2": (np.array([0.5, -1], "f8"), "f2"),
    "bf16 to f4": (np.array([0.5, -1], BF16), "f4"),
}
LOSSY = {
    "f8 beyond f4": (np.array([1.0, 1e39], "f8"), "f4"),
    "f4 beyond bf16": (np.array([1.0, 3.4028e38], "f4"), BF16),
    "f4 to f2": (np.array([1.0, 0.1], "f4"), "f2"),
    "f4 beyond f2": (np.array([1.0, 1e6], "f4"), "f2"),
    "f4 to i8": (np.array([1.0, 2.5], "f4"), "i8"),
    "whole f4 to i8": (np.array([1.0, 2.0], "f4"), "i8"),
    "f4 to bool": (np.array([1.0, 0.0], "f4"), "?"),
    "i8 beyond i4": (np.array([0, 2**31], "i8"), "i4"),
    "i8 below i4": (np.array([0, -(2**31) - 1], "i8"), "i4"),
    "u8 beyond i8": (np.array([0, 2**63], "u8"), "i8"),
    "i1 below u8": (np.array([0, -1], "i1"), "u8"),
    "i8 beyond bool": (np.array([0, 2], "i8"), "?"),
    "i8 beyond f4": (np.array([0, BIG + 1], "i8"), "f4"),
    "least i8 to f8": (np.array([0, -(2**63)], "i8"), "f8"),
    "i4 beyond f2": (np.array([0, 2049], "i4"), "f2"),
    "i4 beyond bf16": (np.array([0, 257], "i4"), BF16),
}


@pytest.mark.parametrize(("x", "declared"), EXACT.values(), ids=EXACT)
def test_conversions_that_keep_every_value(x: np.ndarray[Any, Any], declared: Any) -> None:
    samples = read({"x": x}, [spec(dtype=declared, shape=("N",))], allow_nan=True)
    assert samples.inputs["x"].dtype == declared
    np.testing.assert_array_equal(samples.inputs["x"].astype("f8"), x.astype("f8"))
    assert f"'x': {x.dtype} converted exactly" in samples.notes[0]
    assert ("not scaled" in samples.notes[0]) is (x.dtype.kind in "iu")


@pytest.mark.parametrize(("x", "declared"), LOSSY.values(), ids=LOSSY)
def test_conversions_that_would_change_a_value(x: np.ndarray[Any, Any], declared: Any) -> None:
    message = refused({"x": x}, [spec(dtype=declared, shape=("N",))])
    assert f".astype({np.dtype(declared).name!r})" in message
    assert f"{x.dtype} value" in message


@pytest.mark.parametrize(("own", "declared"), [("f8", "f4"), ("f8", BF16), ("f4", BF16)])
def test_floats_are_rounded_where_numpy_users_cannot_help_it(own: str, declared: Any) -> None:
    x = np.array([[0.1, 1 / 3, 1e-300 if own == "f8" else 1e-45], [1e30, -7, 0]], own)
    samples = read({"x": x}, [spec(dtype=declared)])
    np.testing.assert_array_equal(samples.inputs["x"], x.astype(declared))
    assert samples.notes == (f"'x': {np.dtype(own)} rounded to {np.dtype(declared)}",)


def test_infinities_are_not_an_overflow() -> None:
    x = np.array([[np.inf, -np.inf, np.nan], [1, 2, 3]])
    assert "not finite" in refused({"x": x})
    np.testing.assert_array_equal(read({"x": x}, ONE, allow_nan=True).inputs["x"], x)


def test_conversion_says_which_sample_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conforming, "PIECE", 64)
    x = np.ones((20, 3))
    x[17, 1] = 1e300
    message = refused({"x": x})
    assert "1e+300 of sample 17" in message


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">i8", ">f2"])
def test_foreign_byte_order_is_swapped(dtype: str, tmp_path: Path) -> None:
    x = np.arange(15).reshape(5, 3).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    samples = read(tmp_path / "a.npy", ONE)
    assert conforms(samples, ONE)
    np.testing.assert_array_equal(samples.inputs["x"], np.arange(15).reshape(5, 3))
    assert "byte order" in samples.notes[0]
    labelled = read({"x": X, "y": x[:, 0]}, ONE)
    assert labelled.labels.dtype.isnative
    assert labelled.labels.tolist() == [0, 3, 6, 9, 12]


def test_bfloat16_comes_back_from_every_format(tmp_path: Path) -> None:
    x, specs = X.astype(BF16), [spec(dtype=BF16)]
    np.savez(tmp_path / "a.npz", x=x)
    save_file({"x": x}, tmp_path / "a.safetensors")
    for src in (tmp_path / "a.npz", tmp_path / "a.safetensors", as_sets(tmp_path / "sets", {"x": x}), {"x": x}):
        samples = read(src, specs)
        assert conforms(samples, specs)
        np.testing.assert_array_equal(samples.inputs["x"].astype("f4"), X)
        assert samples.notes == ()
    assert "NaN" in refused({"x": np.full((2, 3), np.nan, BF16)}, specs)


# --- names, shapes, counts -------------------------------------------------------------------------------------------


def test_names_that_do_not_match_are_tabulated() -> None:
    message = refused({"X": X, "idz": IDS}, TWO)
    assert "'x' float32 (N, 3)" in message
    assert "'X' float32 (5, 3)" in message
    assert "did you mean to rename 'X' to 'x', 'idz' to 'ids'?" in message
    message = refused({"x": X}, TWO)
    assert "'x'" not in message.split("why:")[1]
    assert "'ids' int64 (N, 2)" in message
    message = refused({"x": X, "weights\x1b[2J": X})
    assert "'weights\\x1b[2J'" in message
    assert "label" in message.split("try:")[1]


def test_table_of_names_stays_small() -> None:
    message = refused({f"k{i}{'z' * 900}": X for i in range(100)}, [spec(f"input{i}") for i in range(100)])
    assert "and 92 more" in message
    assert len(message) < 4000


SHAPES = {
    "rank": ((5,), ("N", 3), "declared shape"),
    "dimension": ((5, 4), ("N", 3), "declared 'x' float32 (N, 3), found float32 (5, 4)"),
    "one sample": ((28, 28), (None, 28, 28), "x[None]"),
    "scalar": ((), ("N",), "x[None]"),
    "missing channel": ((5, 28, 28), ("N", 1, 28, 28), "x.reshape(-1, 1, 28, 28)"),
    "flat": ((5, 28, 28), ("N", 784), "x.reshape(-1, 784)"),
    "channels last": ((5, 32, 32, 3), ("N", 3, 32, 32), "np.moveaxis(x, -1, 1)"),
}


@pytest.mark.parametrize(("found", "declared", "said"), SHAPES.values(), ids=SHAPES)
def test_wrong_shapes(found: tuple[int, ...], declared: tuple[Any, ...], said: str) -> None:
    assert said in refused({"x": np.zeros(found, np.float32)}, [spec(shape=declared)])


def test_advice_on_shapes_can_be_followed() -> None:
    x = np.random.default_rng(0).random((5, 4, 6, 3), np.float32)
    assert len(read({"x": np.moveaxis(x, -1, 1)}, [spec(shape=("N", 3, 4, 6))])) == 5
    assert len(read({"x": x.reshape(-1, 72)}, [spec(shape=("N", 72))])) == 5


def test_text_of_the_model_is_escaped() -> None:
    shape = (None, "T", "a\x1b[2J", 7, "d" * 900)
    assert str(spec("x\n", shape=shape)) == f"'x\\n' float32 (?, T, 'a\\x1b[2J', 7, '{'d' * 58}…)"


def test_free_dimensions_take_any_size() -> None:
    assert read({"x": X}, [spec(shape=(None, "T"))]).inputs["x"].shape == (5, 3)


def test_counts_must_agree() -> None:
    assert "5 in 'x', 4 in 'ids'" in refused({"x": X, "ids": IDS[:4]}, TWO)
    assert "5 in 'x', 4 in the labels" in refused({"x": X, "label": Y[:4]})


def test_ragged_chunks_are_refused_and_fixed_ones_joined() -> None:
    free = [spec(shape=("N", "T"))]
    message = refused([{"x": X}, {"x": X[:, :2]}], free)
    assert "float32 (5, 3) before and is float32 (5, 2) here" in message
    assert "batch 1" in message
    assert len(read([{"x": X}, {"x": X[:1]}], free)) == 6


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [spec(shape=())],
        [spec(shape=(0, 3))],
        [spec(shape=(2, 3)), spec("z", shape=(3,))],
    ],
)
def test_models_that_cannot_be_fed(specs: list[InputSpec]) -> None:
    assert "axis 0" in refused({"x": X}, specs)


@pytest.mark.parametrize("dtype", ["O", "U", "c8", "M8[s]"])
def test_models_that_do_not_take_numbers(dtype: str) -> None:
    assert "numbers" in refused({"x": X}, [spec(dtype=dtype)], UnsupportedError)


STATE = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
SHARING = [spec(), spec("h", shape=(2, 1, 4)), spec("rate", np.int64, ())]


def test_inputs_without_a_sample_axis_go_with_every_batch() -> None:
    samples = read({"x": X, "h": STATE, "rate": np.array(16, np.int32), "y": Y}, SHARING)
    assert (len(samples), samples.shared) == (5, {"h", "rate"})
    assert sum("goes with every batch" in note for note in samples.notes) == 2
    for part in (*samples.split((1, 1), 0), samples.take([0, 3]), read(samples, SHARING, limit=4)):
        assert len(part) in (2, 3, 4)
        np.testing.assert_array_equal(part.inputs["h"], STATE)
        assert part.inputs["rate"] == 16
    batches = list(samples.batches(2))
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    assert all(batch["h"].shape == (2, 1, 4) for batch in batches)
    rounds = read(iter([{"x": X, "h": STATE, "rate": np.array(16)}] * 2), SHARING)
    assert (len(rounds), rounds.shared, len(rounds.inputs["h"])) == (10, {"h", "rate"}, 2)


def test_shared_inputs_that_differ_or_count_samples() -> None:
    assert "not the same in all chunks" in refused(
        iter([{"x": X, "h": STATE + i, "rate": np.array(16)} for i in range(2)]), SHARING
    )
    states = np.arange(4 * 4, dtype=np.float32).reshape(4, 1, 4)  # one state for each of four samples
    assert read({"x": X[:4], "h": states, "rate": np.array(1)}, SHARING).shared == {"rate"}
    assert "sample counts differ" in refused({"x": X[:3], "h": states, "rate": np.array(1)}, SHARING)


@pytest.mark.parametrize(("batch", "kept"), [(1, 5), (2, 4), (4, 4), (5, 5)])
def test_fixed_batch_drops_the_tail(batch: int, kept: int) -> None:
    samples = read({"x": X, "ids": IDS, "y": Y}, [spec(shape=(batch, 3)), TWO[1]])
    np.testing.assert_array_equal(samples.inputs["x"], X[:kept])
    assert len(samples.inputs["ids"]) == len(samples.labels) == kept
    assert samples.notes == (
        (f"the last {5 - kept} of 5 samples are left out: the model takes batches of {batch}",) if kept < 5 else ()
    )


def test_fixed_batch_that_is_not_reached() -> None:
    assert "exactly 8, found 5" in refused({"x": X}, [spec(shape=(8, 3))])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conforming, "PIECE", 48)
    x = np.ones((20, 3), np.float32)
    x[13, 2] = x[13, 0] = x[19, 1] = value
    said = "3 values of 'x' are NaN or infinite, the first in sample 13"
    assert said in refused({"x": x})
    assert said in refused([{"x": x[:10]}, {"x": x[10:]}])
    assert said in read({"x": x}, ONE, allow_nan=True).notes
    assert "the labels" in refused({"x": X, "y": x[9:14, 0]})


def test_weak_data_is_noted() -> None:
    assert "all samples are identical" in read({"x": np.ones((5, 3), np.float32)}, ONE).notes
    assert "all samples are identical" not in read({"x": np.ones((5, 3), np.float32), "ids": IDS}, TWO).notes
    assert read({"x": X[:1]}, ONE).notes == ("there is one sample only",)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources.LABEL_NAMES)
def test_labels_are_recognised(name: str, tmp_path: Path) -> None:
    samples = read(as_npz(tmp_path / "a.npz", x=X, **{name: Y}), ONE)
    np.testing.assert_array_equal(samples.labels, Y)
    assert samples.notes == ()
    both = read({"x": X, name: Y[:, None]}, [spec(), spec(name, np.int64, ("N", 1))])
    assert both.labels is None


def test_labels_by_name() -> None:
    arrays = {"x": X, "truth": Y, "label": Y + 1}
    samples = read(arrays, ONE, labels="truth")
    np.testing.assert_array_equal(samples.labels, Y)
    assert samples.notes == ("'label' is left out: the labels are 'truth'",)
    assert "'truth'" in refused(arrays)
    assert "no array 'other'" in refused({"x": X}, labels="other")
    assert "no array 'other'" in refused({"x": X, "y": Y}, labels="other")
    assert "--labels" in refused({"x": X, "label": Y, "target": Y})
    assert "labels" in refused({"x": X}, error=UsageError, labels="x")


def test_labels_keep_their_dtype_and_shape() -> None:
    for y in (Y.astype("i1"), np.eye(5), np.zeros((5, 1), bool)):
        labels = read({"x": X, "y": y}, ONE).labels
        assert labels.dtype == y.dtype
        np.testing.assert_array_equal(labels, y)
    assert "the labels" in refused({"x": X, "y": np.full(5, "cat")})
    assert "sample counts differ" in refused({"x": X, "y": np.int64(3)})


def test_labels_are_on_all_chunks_or_none() -> None:
    assert "only some" in refused([{"x": X, "y": Y}, {"x": X}])
    assert "only some" in refused([{"x": X}, {"x": X, "y": Y}])
    samples = read([{"x": X, "y": Y}, {"x": X, "y": Y + 5}], ONE)
    assert samples.labels.tolist() == [*Y, *(Y + 5)]


def test_samples_are_read_again_as_they_are() -> None:
    first = read({"x": X.astype("f8"), "truth": Y}, ONE, labels="truth")
    for again in (read(first, ONE), read(first, ONE, labels="truth")):
        assert (again.sha256, again.source, again.notes) == (first.sha256, first.source, first.notes)
    assert "'x'" in refused(first, [spec("y")])


# --- the noun --------------------------------------------------------------------------------------------------------


def test_digest_depends_on_everything() -> None:
    base = {"x": X, "ids": IDS}
    variants: list[tuple[Mapping[str, Any], list[InputSpec]]] = [
        (base, TWO),
        ({**base, "y": Y}, TWO),
        ({**base, "y": Y + 1}, TWO),
        ({**base, "y": Y.astype("i4")}, TWO),
        ({**base, "x": X + 1}, TWO),
        ({**base, "x": X[::-1]}, TWO),
        ({"x": X}, ONE),
        ({"x": X.reshape(3, 5)}, [spec(shape=("N", 5))]),
        ({"x": X.view("i4")}, [spec(dtype="i4")]),
        ({"z": X}, [spec("z")]),
    ]
    assert len({read(arrays, specs).sha256 for arrays, specs in variants}) == len(variants)
    assert read(base, TWO).sha256 == read(base, TWO[::-1]).sha256


def numbered(n: int) -> Samples:
    x = np.arange(n, dtype=np.float32)
    return Samples({"x": np.stack([x, -x], 1), "ids": np.arange(n)}, np.arange(n) * 10, "numbers", ("a note",))


def aligned(samples: Samples) -> list[int]:
    ids: list[int] = samples.inputs["ids"].tolist()
    assert samples.inputs["x"].tolist() == [[i, -i] for i in ids]
    assert samples.labels is not None
    assert samples.labels.tolist() == [10 * i for i in ids]
    return ids


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_are_complete_and_in_order(n: int, size: int) -> None:
    batches = list(numbered(n).batches(size))
    assert [len(b["x"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]["x"]) <= size
    assert [i for b in batches for i in b["ids"].tolist()] == list(range(n))
    assert [i for b in batches for i in b["x"][:, 0].tolist()] == list(range(n))


def test_batches_are_views() -> None:
    samples = numbered(4)
    assert np.shares_memory(next(samples.batches(2))["x"], samples.inputs["x"])
    with pytest.raises(UsageError):
        next(samples.batches(0))


@given(st.integers(1, 60), st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(0, 2**32))
def test_split_puts_every_sample_into_exactly_one_part(n: int, shares: list[float], seed: int) -> None:
    samples = numbered(n)
    exact = [n * share / sum(shares) for share in shares]
    try:
        parts = samples.split(shares, seed)
    except DataError:
        assert min(exact) < 1.5
        return
    ids = [aligned(part) for part in parts]
    assert sorted(i for part in ids for i in part) == list(range(n))
    assert all(part == sorted(part) for part in ids)
    assert all(abs(len(part) - size) <= 1 for part, size in zip(ids, exact, strict=True))
    assert all(len(part) > 0 for part in parts)
    assert [part.sha256 for part in parts] == [part.sha256 for part in samples.split(shares, seed)]


def test_split_depends_on_the_seed_and_keeps_the_source() -> None:
    parts = numbered(100).split((1, 1), 0)
    assert aligned(parts[0]) != aligned(numbered(100).split((1, 1), 1)[0])
    assert aligned(parts[0]) != list(range(50))
    assert {(part.source, part.notes) for part in parts} == {("numbers", ("a note",))}


@pytest.mark.parametrize("shares", [(), (1, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_split_needs_positive_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        numbered(10).split(shares, 0)


def test_split_of_too_few() -> None:
    with pytest.raises(DataError, match="leave a part empty"):
        numbered(2).split((1, 1, 1), 0)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=9))))
def test_take_follows_the_indices(case: tuple[int, list[int]]) -> None:
    n, indices = case
    samples = numbered(n)
    assert aligned(samples.take(indices)) == indices
    assert aligned(samples.take(np.array(indices, np.int64))) == indices
    mask = np.isin(np.arange(n), indices)
    assert aligned(samples.take(mask)) == sorted(set(indices))
    assert len(samples.take(indices)) == len(indices)


def test_take_of_a_slice_is_a_view_of_its_own_digest() -> None:
    samples = numbered(10)
    part = samples.take(slice(2, 5))
    assert aligned(part) == [2, 3, 4]
    assert np.shares_memory(part.inputs["x"], samples.inputs["x"])
    assert part.sha256 == samples.take([2, 3, 4]).sha256 != samples.sha256
    assert aligned(samples.take(slice(None, None, 3))) == [0, 3, 6, 9]
    assert samples.take(slice(None, None, 3)).inputs["x"].flags.c_contiguous
    with pytest.raises(IndexError):
        samples.take([10])


# --- beside the model ------------------------------------------------------------------------------------------------


def test_data_beside_the_model(tmp_path: Path) -> None:
    model = tmp_path / "net.v2.onnx"
    assert find_beside(model) is None
    assert find_beside(tmp_path / "absent" / "net.onnx") is None
    as_sets(tmp_path, {"x": X})
    (tmp_path / "test_data_set_note").write_text("a file")
    assert find_beside(model) == tmp_path / "test_data_set_0"
    (tmp_path / "test_data_set_1").mkdir()
    (tmp_path / "test_data_set_1" / "input_0.pb").write_bytes(numpy_helper.from_array(X + 1, "x").SerializeToString())
    assert find_beside(model) == tmp_path
    assert len(read(tmp_path, ONE)) == 10
    save_file({"x": X}, tmp_path / "net.v2.calib.safetensors")
    assert find_beside(model) == tmp_path / "net.v2.calib.safetensors"
    np.savez(tmp_path / "net.v2.calib.npz", x=X)
    np.savez(tmp_path / "net.calib.npz", x=X)
    assert find_beside(model) == tmp_path / "net.v2.calib.npz"


@pytest.mark.parametrize("name", ["x", "serving/x:0", 'it\'s "x"', "\u202ex\n"])
@pytest.mark.parametrize("dtype", ["f4", "i8", BF16])
def test_recipe_can_be_followed(name: str, dtype: Any, tmp_path: Path) -> None:
    specs = [spec(name, dtype, (None, 3)), TWO[1]]
    text = recipe(specs, tmp_path / "net.onnx")
    assert f"{name!r} {np.dtype(dtype)} (?, 3)" in text
    assert "'ids' int64 (N, 2)" in text
    assert text.isascii()
    assert "rand" not in text
    code = text[text.index("import numpy") :]
    assert len(code.strip().splitlines()) == 5
    exec(code, {"load_my_samples": lambda: [{name: np.full(3, i), "ids": np.full(2, i)} for i in range(4)]})  # noqa: S102
    beside = find_beside(tmp_path / "net.onnx")
    assert beside is not None
    assert read(beside, specs).inputs["ids"][:, 0].tolist() == [0, 1, 2, 3]
