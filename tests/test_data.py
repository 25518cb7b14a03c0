"""Where samples come from: arrays, files, folders, scripts, and what lies beside a model."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import BF16, IDS, ONE, TWO, X, Y, as_npz, as_sets, conforms, refused, spec
from onnx import numpy_helper
from safetensors.numpy import save_file

from mscompile.errors import UsageError
from mscompile.intake import room
from mscompile.intake.data import find_beside, read, recipe

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
