"""Calibration and audit data: every source is read into one noun, `Samples`.

A source is turned into chunks (one dict of arrays each), a chunk is made to conform to the inputs the model declares,
and the conforming chunks are joined. Nothing is ever unpickled, no value changes without a note, and whatever cannot
be used is a `DataError`: onnxruntime itself would read some of it as garbage without a word.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import sys
import traceback
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from mscompile.errors import DataError, MscompileError, ResourceError, UnsupportedError, UsageError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Chunk: TypeAlias = tuple[str, Mapping[str, Array]]  # where it came from, arrays by name
Chunks: TypeAlias = Generator[Chunk, None, None]
Notes: TypeAlias = dict[str, None]  # an ordered set of sentences

BF16, VOID16 = np.dtype(ml_dtypes.bfloat16), np.dtype("V2")  # the second is what .npy files make of the first
LABEL_NAMES = ("label", "labels", "y", "target")  # taken as labels unless the model has an input of that name
LABELS = ""  # the key of labels beside the inputs: ONNX allows no input without a name
UNNAMED = "arr_0"  # numpy's name for an array saved without one
BOUND = 100_000  # samples taken from a Python iterable or script, which may never end, when no limit is given
MAP_ABOVE = 1 << 28  # .npy files of more bytes are memory-mapped; smaller ones cannot change under us once read
EXPANSION = 200  # an archive that grows by more than this, to more than MAP_ABOVE bytes, is taken for a bomb
PIECE = 1 << 24  # bytes handled at a time when scanning and converting
YIELD = "supply a function load_data(), an iterable or a reader, of dicts {input name: array}"
ROUNDED = {("float64", "float32"), ("float64", "bfloat16"), ("float32", "bfloat16")}  # numpy writes no bfloat16
SIGNIFICANT = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # bits, the implied one included


class Reader(Protocol):
    """What onnxruntime calls a CalibrationDataReader: dicts of arrays, then None."""

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next batch, or None at the end."""


@dataclass(frozen=True)
class InputSpec:
    """What the model declares for one graph input; axis 0 counts samples, an int is a fixed dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ["?" if d is None else d if re.fullmatch(r"\w{1,60}", str(d)) else _show(d) for d in self.shape]
        return f"{_show(self.name)} {self.dtype} ({', '.join(map(str, sizes))})"


Source: TypeAlias = "str | Path | Samples | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Reader"


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that conform to a model.

    Parameters
    ----------
    inputs
        Input name → array of exactly the declared dtype, native byte order, C-contiguous; axis 0 = samples.
    labels
        One entry per sample along axis 0, or None.
    source
        Where they came from, for the report.
    notes
        What was converted, left out or looks weak: to be shown as warnings.
    shared
        Inputs without a sample axis, such as an initial state: the same array goes with every batch.
    files
        The files they were read from, and what tells whether those are still the same.
    """

    inputs: dict[str, Array]
    labels: Array | None
    source: str
    notes: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    files: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return next(len(x) for name, x in self.inputs.items() if name not in self.shared)

    @cached_property
    def sha256(self) -> str:
        """Hex digest over names, dtypes, shapes and bytes in sorted name order, labels included."""
        digest = hashlib.sha256()
        arrays = self.inputs if self.labels is None else {**self.inputs, LABELS: self.labels}
        for name, x in sorted(arrays.items()):
            digest.update(json.dumps([name, x.dtype.name, x.shape]).encode() + b"\n")
            digest.update(x.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse to go on where the files that were read have changed since.

        Raises
        ------
        DataError
            One has.
        """
        for path, known in self.files.items():
            if _identity(path) != known:
                raise DataError(
                    "the data changed during the run",
                    where=str(path),
                    why="the file is not the one that was read",
                    hint="run again when nothing writes to it",
                )

    def take(self, indices: slice | Sequence[int] | Array) -> Samples:
        """Return the samples at `indices` in that order: views for a slice, copies for integers or a mask."""
        at = indices if isinstance(indices, slice) else np.atleast_1d(np.arange(len(self))[indices])
        labels = None if self.labels is None else np.ascontiguousarray(self.labels[at])
        inputs = {name: x if name in self.shared else np.ascontiguousarray(x[at]) for name, x in self.inputs.items()}
        return Samples(inputs, labels, self.source, self.notes, self.shared)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield views of `size` samples in order, the last one possibly shorter."""
        if size < 1:
            raise UsageError("the batch size must be positive", where="batch size", why=f"got {size}", hint="use 1 or more")
        for start in range(0, len(self), size):
            yield {name: x if name in self.shared else x[start : start + size] for name, x in self.inputs.items()}

    def split(self, shares: Sequence[float], seed: int) -> tuple[Samples, ...]:
        """Split at random into disjoint parts; every sample is in exactly one, in its original order.

        Parameters
        ----------
        shares
            Positive relative sizes; (2, 1, 1) puts half of the samples into the first part.
        seed
            The same seed gives the same split.

        Raises
        ------
        UsageError
            A share is not positive and finite.
        DataError
            A part would be empty.
        """
        if not shares or not all(0 < share < math.inf for share in shares):
            raise UsageError(
                "shares of a split must be positive", where="split", why=f"got {shares}", hint="use e.g. (2, 1, 1)"
            )
        ends = [round(len(self) * math.fsum(shares[: i + 1]) / math.fsum(shares)) for i in range(len(shares))]
        if min(np.diff(ends, prepend=0)) < 1:
            why = f"{len(self)} samples in shares {tuple(shares)} leave a part empty"
            raise DataError("too few samples to split", where=self.source, why=why, hint="supply more samples")
        order = np.random.default_rng(seed).permutation(len(self))
        return tuple(self.take(np.sort(part)) for part in np.split(order, ends[:-1]))


def read(
    src: Source,
    specs: Sequence[InputSpec],
    *,
    labels: str | None = None,
    limit: int | None = None,
    allow_nan: bool = False,
) -> Samples:
    """Read samples for a model from whatever holds them.

    Parameters
    ----------
    src
        `.npz`, `.npy` (one-input models) or `.safetensors` file; folder of those, chunk by chunk, or with one `.npy`
        per input; ONNX `test_data_set_*` folder or its parent; `script.py[:load_data]`, a function that yields dicts;
        a mapping name → array, an iterable of such mappings, an onnxruntime CalibrationDataReader, or `Samples`.
        Iterables are copied; arrays of a mapping are shared where they already conform.
    specs
        The inputs the model declares, in graph order.
    labels
        Name of the labels; by default `label`, `labels`, `y` or `target`, whichever is there and not an input.
    limit
        Keep the first `limit` samples. Iterables and scripts are read no further; without it, to 100 000.
    allow_nan
        Accept NaN and infinities, with a note.

    Raises
    ------
    UsageError
        `src` does not exist, or an option makes no sense.
    DataError
        Anything inside cannot be used as it is.
    ResourceError
        It does not fit into memory.
    UnsupportedError
        The model declares an input that is not made of numbers.
    """
    if limit is not None and limit < 1:
        raise UsageError("the number of samples must be positive", where="limit", why=f"got {limit}", hint="use 1+")
    _check_specs(specs, labels)
    notes: Notes = {}
    source, chunks, bound = _open(src, [spec.name for spec in specs], labels, notes)
    files = {path: _identity(path) for path in _files(src)}
    try:
        with contextlib.closing(chunks):
            arrays = _collect(chunks, specs, labels, bound if limit is None else limit, notes)
        if not arrays:
            hint = "a reader or generator may be used up: rewind it or make it again"
            raise DataError("there are no samples", where=source, why="the source ended at once", hint=hint)
        shared = _shared(arrays, specs)
        batch = fixed_batch(specs, shared) or 1
        count = next(len(arrays[spec.name]) for spec in specs if spec.name not in shared)
        for name in sorted(shared):
            notes[f"{_title(name)} {arrays[name].shape} has no sample axis: the same array goes with every batch"] = None
        if limit is None and count >= bound:
            notes[f"reading stopped at {bound} samples, the bound where no number of samples is given"] = None
        if tail := count % batch:
            if tail == count:
                why = f"the model takes batches of exactly {batch}, found {count}"
                raise DataError("too few samples", where=source, why=why, hint=f"supply a multiple of {batch}")
            arrays = {name: x if name in shared else x[:-tail] for name, x in arrays.items()}
            notes[f"the last {tail} of {count} samples are left out: the model takes batches of {batch}"] = None
        for name, x in arrays.items():
            _check_finite(np.atleast_1d(x), _title(name), source, notes if allow_nan else None)
        inputs = {spec.name: arrays[spec.name] for spec in specs}
        if all(_constant(x) for name, x in inputs.items() if name not in shared):
            notes["all samples are identical" if count > 1 else "there is one sample only"] = None
        samples = Samples(inputs, arrays.get(LABELS), source, tuple(notes), shared, files)
        _ = samples.sha256  # of the data as read, not of a mapped file as it may be later
    except MemoryError as exc:
        raise ResourceError(
            "out of memory", where=source, why=str(exc) or "MemoryError", hint="supply fewer samples"
        ) from exc
    samples.check_unchanged()
    return samples


def _files(src: Source) -> list[Path]:
    """The files that a source is read from, as far as a path names them."""
    if not isinstance(src, str | Path):
        return list(src.files) if isinstance(src, Samples) else []
    path = Path(re.sub(r"\.py:\w+$", ".py", str(src)))
    if not path.is_dir():
        return [path]
    folders = [path, *_test_sets(path)]
    return sorted(entry for folder in folders for entry in folder.iterdir() if entry.is_file())


def _identity(path: Path) -> tuple[int, ...]:
    """As `vetting.identity`; nothing where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def find_beside(model: Path) -> Path | None:
    """Return the data beside `model`: MODEL.calib.npz, MODEL.calib.safetensors or `test_data_set_*`, in that order.

    Several test data sets are returned as the folder that holds them, which `read` joins.
    """
    for suffix in (".npz", ".safetensors"):
        if (path := model.with_name(f"{model.stem}.calib{suffix}")).is_file():
            return path
    sets = _test_sets(model.parent)
    return sets[0] if len(sets) == 1 else model.parent if sets else None


def recipe(specs: Sequence[InputSpec], model_path: str | Path) -> str:
    """Return what to print when there is no data: the inputs expected, and five lines that write them for `read`."""
    target = _show(str(Path(model_path).with_name(f"{Path(model_path).stem}.calib.npz")), width=4096)
    listing = "\n".join(f"  {spec}" for spec in specs)
    declared = {spec.name: "float32" if spec.dtype == BF16 else spec.dtype.name for spec in specs}
    return f"""\
The model expects real, preprocessed samples along axis 0 of:
{listing}

To write them where they are found by themselves, beside the model:

import numpy as np
samples = load_my_samples()  # yours: a list with one dict {{input name: array without axis 0}} per sample
declared = {declared!r}
arrays = {{name: np.stack([s[name] for s in samples]).astype(dtype) for name, dtype in declared.items()}}
np.savez({target}, **arrays)  # with label=[...] accuracies are reported too
"""


# --- sources: each yields chunks -------------------------------------------------------------------------------------


def _open(src: Source, names: Sequence[str], labels: str | None, notes: Notes) -> tuple[str, Chunks, int]:
    """Return a title of the source, its chunks, and the number of samples at which to stop without a limit."""
    if isinstance(src, Samples):
        notes.update(dict.fromkeys(src.notes))
        key = labels or next(name for name in LABEL_NAMES if name not in names)
        arrays = src.inputs if src.labels is None else {**src.inputs, key: src.labels}
        return src.source, _whole(src.source, arrays), sys.maxsize
    if isinstance(src, Mapping):
        return "arrays in memory", _whole("arrays in memory", src), sys.maxsize
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


@contextlib.contextmanager
def _reading(where: str, hint: str = "write it again with np.savez") -> Iterator[None]:
    """Turn whatever a parser or foreign code raises into a DataError, with the line where a script failed."""
    try:
        yield
    except (MscompileError, MemoryError):
        raise
    except (Exception, SystemExit) as exc:
        lines = [line for frame, line in traceback.walk_tb(exc.__traceback__) if frame.f_code.co_filename == where]
        place = f"{where}, line {lines[-1]}" if lines else where
        why = f"{type(exc).__name__}: {exc}"[:400]
        raise DataError("the samples cannot be read", where=place, why=why, hint=hint) from exc


def _whole(where: str, arrays: Mapping[str, Any]) -> Chunks:
    """One chunk: arrays in memory, shared and not copied."""
    with _reading(where, "give one array per input"):
        yield where, {str(name): np.asarray(x) for name, x in arrays.items()}


def _batches(make: Callable[[], object], where: str) -> Chunks:
    """Chunks of what `make` returns: mappings, or a reader of them; copied, for producers reuse their buffers."""
    with _reading(where, YIELD):
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
        with contextlib.redirect_stdout(sys.stderr), _reading(str(path), YIELD):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)  # noqa: S102  # asked for by path
            yield from _batches(getattr(module, function), str(path))
    finally:
        os.chdir(cwd)
        sys.path[:] = search
        del sys.modules[module.__name__]


def _folder(path: Path, names: Sequence[str], notes: Notes) -> Chunks:
    """Test data sets; else .npz and .safetensors files as chunks, sorted; else one .npy file per input."""
    with _reading(str(path)):
        sets = [path] if (path / "input_0.pb").exists() else _test_sets(path)
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    for folder in sets:
        with _reading(str(folder)):
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
    with _reading(str(path)):
        yield str(path), reader(path)


def _npy(path: Path) -> dict[str, Array]:
    """Read a .npy file, mapped when large."""
    with path.open("rb") as file:
        _check_header(file, path.stat().st_size)
        file.seek(0)
        if path.stat().st_size <= MAP_ABOVE:
            return {UNNAMED: npy.read_array(file, allow_pickle=False)}
    return {UNNAMED: np.asarray(npy.open_memmap(path, mode="r"))}


def _npz(path: Path) -> dict[str, Array]:
    """Read an .npz archive; names, headers and sizes are checked before anything is decompressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(times := Counter(member.filename for member in members)) < len(members):
            raise ValueError(f"{_show(times.most_common(1)[0][0])} is there more than once")
        for member in members:
            with _reading(f"{path}, member {_show(member.filename)}"):
                name = member.filename
                if not name.endswith(".npy") or name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise ValueError("not the name of an array as np.savez writes it")
                if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                    raise ValueError("not a compression that np.savez_compressed uses")
                with archive.open(member) as file:
                    _check_header(file, member.file_size)
        total = sum(member.file_size for member in members)
        if total > max(MAP_ABOVE, EXPANSION * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size} bytes would expand to {total}; if that is meant, do not compress")
        _need(total, str(path))
        arrays = {}
        for member in members:
            with _reading(f"{path}, member {_show(member.filename)}"), archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = npy.read_array(file, allow_pickle=False)
                file.read()  # to the end: the checksum is compared there
        return arrays


def _check_header(file: IO[bytes], size: int) -> None:
    """Check that a .npy stream of `size` bytes is exactly as long as its header says, without reading the rest."""
    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"version {version} of the .npy format is not for plain arrays")
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never read")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"the header declares {dtype} {shape}, but {size - file.tell()} bytes follow")


def _safetensors(path: Path) -> dict[str, Array]:
    """Read a .safetensors file; the library checks that the tensors cover it exactly."""
    from safetensors import safe_open

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name is in the header more than once")
        return found

    _need(path.stat().st_size, str(path))
    with safe_open(path, framework="numpy") as tensors, path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a dict


def _test_sets(folder: Path) -> list[Path]:
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
            raise ValueError(f"two files hold {_show(name)}")
        arrays[name] = numpy_helper.to_array(tensor)
    return arrays


READERS: dict[str, Callable[[Path], dict[str, Array]]] = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}


# --- conforming: chunks to samples -----------------------------------------------------------------------------------


def _check_specs(specs: Sequence[InputSpec], labels: str | None) -> None:
    """Refuse what the model declares where no samples can be fed to it."""
    for spec in specs:
        if spec.dtype.kind not in "fiub" and spec.dtype != BF16:
            hint = "make the conversion to numbers part of the preprocessing, outside the model"
            raise UnsupportedError("an input is not made of numbers", where=str(spec), why="samples are", hint=hint)
        if spec.name == labels:
            raise UsageError("labels cannot be an input", where=str(spec), why="labels are compared", hint="rename one")
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    free = any(spec.shape and not isinstance(spec.shape[0], int) for spec in specs)
    if 0 in fixed or not (free or len(fixed) == 1):
        raise _no_samples(specs)


def _no_samples(specs: Sequence[InputSpec]) -> DataError:
    """The error for inputs that no number of samples fits."""
    why = "axis 0 of every input must count samples, the same number for all inputs, unless all its dimensions are fixed"
    hint = "export the model with a batch axis first in every input"
    return DataError("samples cannot be fed", where=_brief(map(str, specs)) or "no input", why=why, hint=hint)


def _shared(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> frozenset[str]:
    """Inputs whose array has the fully fixed declared shape, while those of free axis 0 carry another number of samples."""
    counts = {len(arrays[spec.name]) for spec in specs if spec.shape and not isinstance(spec.shape[0], int)}
    return frozenset(
        spec.name
        for spec in specs
        if spec.shape == arrays[spec.name].shape and (not spec.shape or (counts and spec.shape[0] not in counts))
    )


def fixed_batch(specs: Sequence[InputSpec], shared: frozenset[str] = frozenset()) -> int | None:
    """Number of samples that the model takes at a time; None where that is free.

    Raises
    ------
    DataError
        Inputs take different numbers.
    """
    fixed = {spec.shape[0] for spec in specs if spec.name not in shared and spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise _no_samples(specs)
    return next((size for size in fixed if isinstance(size, int)), None)


def _collect(chunks: Chunks, specs: Sequence[InputSpec], label: str | None, goal: int, notes: Notes) -> dict[str, Array]:
    """Join conforming chunks until `goal` samples are there; labels are under LABELS."""
    parts: dict[str, list[Array]] = {}
    count = held = 0
    common: frozenset[str] = frozenset()
    room = available_memory()
    for i, (where, raw) in enumerate(chunks):
        arrays = _conform(where, raw, specs, label, notes)
        parts = parts or {name: [] for name in arrays}
        if parts.keys() != arrays.keys():
            why = f"{'labels' if LABELS in arrays else 'no labels'} here, unlike before"
            raise DataError("only some of the samples have labels", where=where, why=why, hint="label all or none")
        common = _shared(arrays, specs) if i == 0 else common
        for name, x in arrays.items():
            if name in common:
                if parts[name] and not np.array_equal(x, parts[name][0]):
                    why = f"{_title(name)} has no sample axis and is not the same in all chunks"
                    raise DataError(
                        "a shared input differs", where=where, why=why, hint="give the same array with all samples"
                    )
                parts[name] = [x]
                continue
            if parts[name] and x.shape[1:] != parts[name][0].shape[1:]:
                why = f"{_title(name)} was {_form(parts[name][0])} before and is {_form(x)} here"
                raise DataError("ragged samples", where=where, why=why, hint="pad all samples to one shape")
            parts[name].append(x)
        count += next(len(arrays[spec.name]) for spec in specs if spec.name not in common)
        held += sum(x.nbytes for x in arrays.values())
        if i and held > room:
            raise _too_large(held, room, where)
        if count >= goal:
            break
    joined = {}
    while parts:
        name, pieces = parts.popitem()
        if len(pieces) > 1:
            _need(sum(x.nbytes for x in pieces), where)
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        joined[name] = whole if name in common else whole[:goal]
    return joined


def _conform(
    where: str, raw: Mapping[str, Array], specs: Sequence[InputSpec], label: str | None, notes: Notes
) -> dict[str, Array]:
    """Return one array per declared input, of its dtype and shape, and the labels if any under LABELS."""
    found = _match(where, raw, specs, label, notes)
    arrays = {}
    for spec in specs:
        x = found[spec.name]
        x = x.view(BF16) if spec.dtype == BF16 and x.dtype == VOID16 else x
        _check_numbers(x, _title(spec.name), where)
        _check_shape(x, spec, where)
        arrays[spec.name] = _cast(x, spec.dtype, _title(spec.name), where, notes)
    if LABELS in found:
        _check_numbers(found[LABELS], _title(LABELS), where)
        own = found[LABELS].dtype.newbyteorder("=")
        arrays[LABELS] = _cast(found[LABELS], own, _title(LABELS), where, notes)
    shared = _shared(arrays, specs)
    counts = {_title(name): len(x) if x.ndim else 0 for name, x in arrays.items() if name not in shared}
    if len(set(counts.values())) > 1:
        why = _brief(f"{count} in {name}" for name, count in counts.items())
        raise DataError("sample counts differ", where=where, why=why, hint="axis 0 counts samples in every array")
    if not any(arrays[spec.name].size for spec in specs):
        why = _brief(f"{_title(name)} is {_form(x)}" for name, x in arrays.items())
        raise DataError("there are no samples", where=where, why=why, hint="axis 0 counts samples in every array")
    return arrays


def _match(
    where: str, raw: Mapping[str, Array], specs: Sequence[InputSpec], label: str | None, notes: Notes
) -> dict[str, Array]:
    """Return the arrays under the names the model declares, labels under LABELS; every name must be accounted for."""
    names = {spec.name: spec for spec in specs}
    found = dict(raw)
    if len(specs) == 1 and UNNAMED in found and specs[0].name not in found:
        found = {specs[0].name: found.pop(UNNAMED), **found}
    alike = [name for name in LABEL_NAMES if name in found and name not in names]
    if label is None and len(alike) > 1:
        why = f"{' and '.join(alike)} all look like labels"
        raise DataError("labels are ambiguous", where=where, why=why, hint="name the one with --labels")
    key = label or (alike[0] if alike else None)
    missing = [name for name in names if name not in found]
    extra = [name for name in found if name not in names and name not in alike and name != key]
    if missing or extra:
        raise _wrong_names(where, [names[name] for name in missing], {name: found[name] for name in extra})
    if key is not None and key not in found:
        hint = f"labels are one of: {', '.join(alike)}" if alike else "add them under that name, or drop --labels"
        raise DataError("the labels are missing", where=where, why=f"there is no array {_show(key)}", hint=hint)
    for name in (name for name in alike if name != key):
        notes[f"{_show(name)} is left out: the labels are {_show(str(key))}"] = None
    return {name: found[name] for name in names} | ({} if key is None else {LABELS: found[key]})


def _wrong_names(where: str, missing: Sequence[InputSpec], extra: Mapping[str, Array]) -> DataError:
    """Return the error for names that do not match: a table of what differs, and what may have been meant."""
    left = ["expected", *map(str, missing)]
    right = ["found instead", *(f"{_show(name)} {_form(x)}" for name, x in extra.items())]
    width = max(map(len, left[:9]))
    rows = [f"{a:<{width}}  {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="-")]
    rows[9:] = [f"and {len(rows) - 9} more"] if len(rows) > 9 else []
    folded = {name.casefold(): name for name in extra}
    close = [(spec.name, difflib.get_close_matches(spec.name.casefold(), folded, n=1)) for spec in missing[:8]]
    meant = [f"{_show(folded[match[0]])} to {_show(name)}" for name, match in close if match]
    if UNNAMED in extra:
        hint = "an array without a name serves models of one input only: np.savez(path, NAME=array, ...)"
    elif meant:
        hint = f"did you mean to rename {', '.join(meant)}?"
    else:
        hint = "name the arrays as the model names its inputs; labels go under 'label' or --labels NAME"
    return DataError("names do not match the inputs of the model", where=where, why="\n         ".join(rows), hint=hint)


def _check_shape(x: Array, spec: InputSpec, where: str) -> None:
    """Compare rank and fixed dimensions, axis 0 aside."""
    sizes = spec.shape[1:]
    fixed = [size for size in sizes if isinstance(size, int)]

    def fits(shape: Sequence[int]) -> bool:
        pairs = zip(sizes, shape, strict=False)
        return len(shape) == len(sizes) and all(a == b or not isinstance(a, int) for a, b in pairs)

    if x.shape == spec.shape == () or (x.ndim and fits(x.shape[1:])):
        return
    hint = "give it the declared shape"
    if fits(x.shape):
        hint = "a single sample needs axis 0, too: x[None]"
    elif x.ndim > 2 and fits((x.shape[-1], *x.shape[1:-1])):
        hint = "channels come first here: np.moveaxis(x, -1, 1)"
    elif fits(fixed) and math.prod(fixed) == math.prod(x.shape[1:]):
        hint = f"x.reshape{(-1, *fixed)} has the declared shape"
    what, why = f"{_title(spec.name)} has the wrong shape", f"declared {spec}, found {_form(x)}"
    raise DataError(what, where=where, why=why, hint=hint)


def _check_numbers(x: Array, title: str, where: str) -> None:
    if x.dtype.kind in "fiub" or x.dtype == BF16:
        return
    hints = {"O": "pad ragged samples to one shape: np.stack must accept them", "V": "pass one plain array per input"}
    hint = hints.get(x.dtype.kind, "encode them as real numbers, as in training")
    raise DataError(f"{title} does not hold real numbers", where=where, why=f"found {_form(x)}", hint=hint)


def _cast(x: Array, dtype: np.dtype[Any], title: str, where: str, notes: Notes) -> Array:
    """Return `x` as `dtype`, native and contiguous; values must stay, except for rounding as in ROUNDED."""
    if x.ndim == 0:
        return _cast(x.reshape(1), dtype, title, where, notes).reshape(())
    own = x.dtype.newbyteorder("=")
    if own != x.dtype:
        notes[f"{title}: byte order swapped to the native one"] = None
    elif own == dtype:
        return np.ascontiguousarray(x)
    rounded = (own.name, dtype.name) in ROUNDED
    if own != dtype:
        how = "rounded" if rounded else "converted exactly" + (", not scaled," if own.kind in "iu" else "")
        notes[f"{title}: {own} {how} to {dtype}"] = None
    _need(x.size * dtype.itemsize, where)
    out = np.empty(x.shape, dtype)
    for start, piece in _pieces(x):
        new = out[start : start + len(piece)]
        with np.errstate(all="ignore"):
            new[...] = piece
        if not (good := _kept(piece.astype(own, copy=False), new, rounded)).all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            why = f"{own} value {piece[at]} of sample {start + at[0]} is not a value of {dtype}"
            hint = f"if this is meant, convert it yourself: x.astype({dtype.name!r})"
            raise DataError(f"{title} cannot be converted without loss", where=where, why=why, hint=hint)
    return out


def _kept(old: Array, new: Array, rounded: bool) -> Array:
    """Return where `new`, converted from `old`, kept the value: exactly, or when `rounded` within the range."""
    if rounded:
        return np.asarray(np.isfinite(new) | ~np.isfinite(old))
    if old.dtype.kind not in "iub":
        same = np.asarray((new.astype(old.dtype) == old) | np.isnan(old))
        return same if new.dtype.kind not in "iub" else np.zeros_like(same)
    if new.dtype.kind == "b":
        low, high = 0, 1
    elif new.dtype.kind in "iu":
        low, high = int(np.iinfo(new.dtype).min), int(np.iinfo(new.dtype).max)
    else:
        high = 2 ** SIGNIFICANT[new.dtype.name]  # up to here every integer is a float
        low = -high
    return np.asarray((old >= low) & (old <= high))


def _check_finite(x: Array, title: str, where: str, notes: Notes | None) -> None:
    """Refuse NaN and infinities, or note them."""
    count, first = 0, -1
    for start, piece in _pieces(x) if x.dtype.kind not in "iub" else ():
        if not (good := np.isfinite(piece)).all():
            first = start + int(np.argwhere(~good)[0][0]) if first < 0 else first
            count += int(good.size - np.count_nonzero(good))
    why = f"{count} values of {title} are NaN or infinite, the first in sample {first}"
    if count and notes is None:
        hint = "leave such samples out"
        raise DataError("the samples are not finite", where=where, why=why, hint=hint)
    if count and notes is not None:
        notes[why] = None


def _constant(x: Array) -> bool:
    return all(bool((piece == x[:1]).all()) for _, piece in _pieces(x))


def _pieces(x: Array) -> Iterator[tuple[int, Array]]:
    """Yield (first sample, samples) of about PIECE bytes, so that scans need little memory."""
    step = max(1, PIECE // max(1, x[:1].nbytes)) if x.ndim else 1
    for start in range(0, len(x) if x.size and x.ndim else 0, step):
        yield start, x[start : start + step]


# --- words and memory ------------------------------------------------------------------------------------------------


def _show(name: str | int, width: int = 60) -> str:
    """Return a name as it may be printed: quoted, escaped, cut to `width`."""
    return text if len(text := repr(name)) <= width else text[: width - 1] + "…"


def _title(name: str) -> str:
    return "the labels" if name == LABELS else _show(name)


def _form(x: Array) -> str:
    return f"{str(x.dtype)[:40]} ({', '.join(map(str, x.shape))})"


def _brief(items: Iterable[str]) -> str:
    """Return the first few of `items`."""
    words = list(items)
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the container's limit; unlimited where that is not known."""
    free, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError, IndexError):
        room = int(free.read_text().split("MemAvailable:")[1].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            room = min(room, int(limit.read_text()))
        return room
    return sys.maxsize


def _need(size: int, where: str) -> None:
    if size > MAP_ABOVE and size > (room := available_memory()):
        raise _too_large(size, room, where)


def _too_large(size: int, room: int, where: str) -> ResourceError:
    why = f"{size / 2**30:.1f} GiB are needed, {room / 2**30:.1f} GiB are available"
    return ResourceError("the samples do not fit into memory", where=where, why=why, hint="supply fewer samples")
