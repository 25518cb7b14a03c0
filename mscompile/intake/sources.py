"""Where samples come from: every source is turned into chunks, one dict of arrays each."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mscompile.errors import DataError, UsageError
from mscompile.intake.arrays import READERS, reading
from mscompile.intake.samples import Samples, Source
from mscompile.intake.words import Array, quoted

Chunk: TypeAlias = tuple[str, Mapping[str, Array]]  # where it came from, arrays by name
Chunks: TypeAlias = Generator[Chunk, None, None]
Notes: TypeAlias = dict[str, None]  # an ordered set of sentences
LABEL_NAMES = ("label", "labels", "y", "target")  # taken as labels unless the model has an input of that name
BOUND = 100_000  # samples taken from a Python iterable or script, which may never end, when no limit is given
YIELD = "supply a function load_data(), an iterable or a reader, of dicts {input name: array}"


def open_source(src: Source, names: Sequence[str], labels: str | None, notes: Notes) -> tuple[str, Chunks, int]:
    """Return a title of the source, its chunks, and the number of samples at which to stop without a limit."""
    if isinstance(src, Samples):
        notes.update(dict.fromkeys(src.notes))
        key = labels or next(name for name in LABEL_NAMES if name not in names)
        arrays = src.inputs if src.labels is None else {**src.inputs, key: src.labels}
        return src.source, _whole(src.source, arrays), sys.maxsize
    if isinstance(src, Mapping):
        return "arrays in memory", _whole("arrays in memory", src), sys.maxsize
    if isinstance(src, str) and not src:
        raise UsageError("no data is named", where="''", why="the name is empty", hint="give a file, a folder or a script")
    if not isinstance(src, str | Path):
        title = type(src).__qualname__
        return title, _batches(lambda: src, title), BOUND
    script = re.fullmatch(r"(.+\.py)(?::(\w+))?", str(src))
    path = Path(script[1] if script else src)
    if not os.path.exists(path):  # noqa: PTH110  # Path.exists raises on names too long
        hint = "check the path; a script is given as script.py or script.py:function"
        raise UsageError("no such file or folder", where=str(src), why="samples were to be read from it", hint=hint)
    if path.is_dir():
        return str(path), _folder(path, names, notes), sys.maxsize
    if script:
        return str(src), _script(path, script[2] or "load_data", notes), BOUND
    return str(path), _file(path), sys.maxsize


def files_of(src: Source) -> list[Path]:
    """The files that a source is read from, as far as a path names them."""
    if not isinstance(src, str | Path):
        return list(src.files) if isinstance(src, Samples) else []
    path = Path(re.sub(r"\.py:\w+$", ".py", str(src)))
    if not path.is_dir():
        return [path]
    folders = [path, *test_sets(path)]
    return sorted(entry for folder in folders for entry in folder.iterdir() if entry.is_file())


def _whole(where: str, arrays: Mapping[str, Any]) -> Chunks:
    """One chunk: arrays in memory, shared and not copied."""
    with reading(where, "give one array per input"):
        yield where, {str(name): np.asarray(x) for name, x in arrays.items()}


def _batches(make: Callable[[], object], where: str) -> Chunks:
    """Chunks of what `make` returns: mappings, or a reader of them; copied, for producers reuse their buffers."""
    with reading(where, YIELD):
        made: Any = make()
        if isinstance(made, Mapping):
            made = [made]
        items = iter(made.get_next, None) if hasattr(made, "get_next") else iter(made)
        for i, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise TypeError(f"batch {i} is a {type(item).__name__}, not a dict of input name to array")
            yield f"{where}, batch {i}", {str(name): np.array(x) for name, x in item.items()}


def _script(path: Path, function: str, notes: Notes) -> Chunks:
    """Chunks yielded by a function of a Python script; its prints go to stderr, the working folder is restored."""
    notes[f"code was executed to get samples: {function}() of {path.resolve()}"] = None
    cwd, search = Path.cwd(), list(sys.path)
    module = types.ModuleType("mscompile_data_script")
    module.__file__ = str(path)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[module.__name__] = module  # dataclasses look themselves up
    try:
        with contextlib.redirect_stdout(sys.stderr), reading(str(path), YIELD):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)  # noqa: S102  # asked for by path
            yield from _batches(getattr(module, function), str(path))
    finally:
        os.chdir(cwd)
        sys.path[:] = search
        del sys.modules[module.__name__]


def _folder(path: Path, names: Sequence[str], notes: Notes) -> Chunks:
    """Test data sets; else .npz and .safetensors files as chunks, sorted; else one .npy file per input."""
    with reading(str(path)):
        sets = [path] if (path / "input_0.pb").exists() else test_sets(path)
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    for folder in sets:
        with reading(str(folder)):
            yield str(folder), _test_set(folder, names)
    if sets:
        return
    data = [p for p in files if p.suffix.lower() in READERS]
    if len(files) > len(data):
        notes[f"{len(files) - len(data)} entries of {path} are left out: not {', '.join(READERS)}"] = None
    per_input = {p.stem: p for p in data if p.suffix.lower() == ".npy"}
    if not data or 0 < len(per_input) < len(data):
        why = f"found {len(per_input)} .npy files (one per input) and {len(data) - len(per_input)} others (chunks)"
        hint = "supply either INPUT.npy for every input, or .npz / .safetensors chunks"
        raise DataError("the folder does not hold samples", where=str(path), why=why, hint=hint)
    if per_input:
        yield str(path), {name: x for name, p in per_input.items() for _, file in _file(p) for x in file.values()}
    for p in [] if per_input else data:
        yield from _file(p)


def _file(path: Path) -> Chunks:
    """One chunk: a file read by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        why = f"samples are read from regular files {', '.join(READERS)}, folders of them, and .py"
        hint = "write it with np.savez; pickled files (.pt, .pkl) are never read"
        raise DataError("not a file that samples are read from", where=str(path), why=why, hint=hint)
    with reading(str(path)):
        yield str(path), reader(path)


def test_sets(folder: Path) -> list[Path]:
    """Return the `test_data_set_*` folders in `folder`, in numerical order."""
    return sorted((p for p in folder.glob("test_data_set_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))


def _test_set(folder: Path, names: Sequence[str]) -> dict[str, Array]:
    """Read one ONNX test data set: input_0.pb, ... in graph order, or under the names stored in them."""
    from onnx import TensorProto, numpy_helper

    files = sorted(folder.glob("input_*.pb"), key=lambda p: (len(p.name), p.name))
    if [p.name for p in files] != [f"input_{i}.pb" for i in range(len(files))] or not 0 < len(files) <= len(names):
        raise ValueError(f"{len(names)} inputs, but found {', '.join(p.name for p in files[:8]) or 'no input_*.pb'}")
    arrays: dict[str, Array] = {}
    for place, path in zip(names, files, strict=False):
        tensor = TensorProto.FromString(path.read_bytes())
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(f"{path.name} refers to another file")
        name = tensor.name if tensor.name in names else place
        if name in arrays:
            raise ValueError(f"two files hold {quoted(name)}")
        arrays[name] = numpy_helper.to_array(tensor)
    return arrays
