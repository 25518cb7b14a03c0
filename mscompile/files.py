"""Model files: loading with clear refusals, digests, and an atomic writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.errors import MscompileError, ResourceError, UnsupportedError, UsageError, VerificationError
from mscompile.topology import check_expansion, name_nodes, sort_nodes
from mscompile.vetting import (
    Stored,
    check_operators,
    check_tensors,
    check_versions,
    identity,
    rejected,
    without_weights,
)
from mscompile.wire import parse, read_bytes

LISTED = 4
"""IR version before which every initializer had to be listed as an input as well, and none could be overridden."""
INLINE_LIMIT = 1 << 30
"""Bytes of weights above which they go to an external file (protobuf ends at 2 GiB)."""
NOTES = "mscompile.notes"
"""Key of an `ir.Model.meta` entry: sentences on what was changed in reading the file, or will be lost."""
STORED = "mscompile.stored"
"""Key of an `ir.Model.meta` entry: the external files, see `vetting.Stored`."""


def load_model(path: str | Path) -> tuple[ir.Model, str]:
    """Load an ONNX file.

    Returns
    -------
    tuple
        The model, external weights not read yet, and the sha256 of the file followed by that of its external files.

    Raises
    ------
    UsageError
        There is no such file.
    ModelError
        It is not a valid ONNX model.
    UnsupportedError
        Its opset is too old or unknown to the installed onnx.
    """
    path = Path(path)
    content = read_bytes(path)
    model = from_proto(parse(content, path), path)
    return model, digest(content, model)


def from_proto(proto: onnx.ModelProto, path: Path | None = None) -> ir.Model:
    """Read a ModelProto, vetted and then accepted by onnx's own checker; nodes are sorted and named where they are not.

    The checker is given the model without its weights, and without names of files.
    """
    where = path if path is not None else Path(proto.graph.name[:80] or "model")
    check_versions(proto, where)
    if not proto.graph.output:
        raise rejected(where, "its graph has no outputs", "export it again")
    check_expansion(proto, where)
    stored = check_tensors(proto, path, where)
    check_operators(proto, where)
    if proto.graph.sparse_initializer:
        raise UnsupportedError(
            "the model has sparse weights",
            where=str(where),
            why=f"{len(proto.graph.sparse_initializer)} initializers are stored as sparse tensors",
            hint="export it with dense weights",
        )
    skeleton = without_weights(proto)
    unsorted = sort_nodes(skeleton, where)
    try:
        onnx.checker.check_model(skeleton)
        model = ir.from_proto(proto)
        if unsorted:
            common.TopologicalSortPass()(model)
    except Exception as error:
        reason = " ".join(str(_cause(error)).split())[:400]
        if "No Op registered" in reason or "No opset import" in reason:
            raise UnsupportedError(
                "the model uses an operator unknown to onnx", where=str(where), why=reason, hint="export without it"
            ) from error
        raise rejected(where, reason, "export it again, or repair what the checker names") from error
    notes = ["nodes were sorted: the file has some before what they read"] if unsorted else []
    notes += name_nodes(model)
    for kind, found in (
        ("training information", proto.training_info),
        ("quantization annotations", proto.graph.quantization_annotation),
    ):
        if found:
            notes.append(f"{kind} in the model will not be in the compiled one")
    model.meta[NOTES], model.meta[STORED] = notes, stored
    if stored.folder is not None:
        ir.external_data.set_base_dir(model.graph, str(stored.folder))
        for function in model.functions.values():
            ir.external_data.set_base_dir(function.graph, str(stored.folder))
    return model


def _cause(error: BaseException) -> BaseException:
    """The innermost reason of an error: libraries wrap it in the whole graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def read_weights(model: ir.Model) -> ir.Model:
    """Read the weights that lie in external files into memory, in place.

    Raises
    ------
    ModelError
        One of the files is no longer what it was when the model was loaded.
    """
    files = model.meta.get(STORED, Stored(None)).files
    _check_files(files)
    ir.external_data.load_to_model(model)
    _check_files(files)
    return model


def _check_files(files: Mapping[Path, tuple[int, ...]]) -> None:
    for path, known in files.items():
        with _opened(path, known):
            pass


@contextlib.contextmanager
def _opened(path: Path, known: tuple[int, ...]) -> Iterator[BufferedReader]:
    """An external file, which must be the one that was vetted, and still be when it is closed."""
    changed = rejected(path, "the file changed while it was read", "run again when nothing writes to it")
    try:
        with path.open("rb") as file:
            if identity(os.fstat(file.fileno())) != known:
                raise changed
            yield file
            if identity(os.fstat(file.fileno())) != known:
                raise changed
    except OSError as error:
        raise changed from error


def external_files(model: ir.Model) -> list[Path]:
    """Files beside the model's own that its tensors lie in, sorted."""
    return sorted(model.meta.get(STORED, Stored(None)).files)


def digest(content: bytes, model: ir.Model) -> str:
    """Sha256 over the file's bytes and, in order of their names, its external files."""
    total = hashlib.sha256(content)
    for path, known in sorted(model.meta[STORED].files.items()):
        with _opened(path, known) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def output_conflict(paths: Iterable[Path], *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse to overwrite, and to write into a folder that is not there.

    Parameters
    ----------
    paths
        Files to be written.
    force
        Whether existing files may be overwritten.
    inputs
        Files that are read, and never overwritten.

    Raises
    ------
    UsageError
        A file exists and `force` is off, is an input or no regular file, or its folder is missing.
    """
    read = {os.path.realpath(path) for path in inputs}
    for path in paths:
        try:
            path.parent.stat()
            path.lstat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UsageError(
                "the output cannot be written",
                where=str(path),
                why=error.strerror or str(error),
                hint="name another output with -o",
            ) from error
        if not path.parent.is_dir():
            raise UsageError(
                "the output folder does not exist", where=str(path), why=f"{path.parent} is no folder", hint="create it"
            )
        if os.path.realpath(path) in read:
            raise UsageError(
                "the output is an input, too",
                where=str(path),
                why="the dense model and its data are never overwritten",
                hint="name another output with -o",
            )
        if path.exists() and not path.is_file():
            raise UsageError(
                "the output cannot be written",
                where=str(path),
                why="there is something else of that name, which is no file",
                hint="name another output with -o",
            )
        if path.exists() and not force:
            raise UsageError(
                "the output exists already",
                where=str(path),
                why="files are never overwritten silently",
                hint="name another output with -o, or add --force",
            )


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Write a file as a whole or not at all.

    Yields the path of a temporary folder's file in the target's folder; on success it is flushed to disk and renamed
    over the target, on failure it is removed and the target stays as it was.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}.") as folder:
            draft = Path(folder) / target.name
            yield draft
            for written in sorted(Path(folder).iterdir(), key=lambda p: p == draft):
                with written.open("rb") as file:
                    os.fsync(file.fileno())
                written.chmod(0o666 & ~_umask())
                written.replace(target.parent / written.name)
    except OSError as error:
        raise ResourceError(
            "the output cannot be written",
            where=str(target),
            why=error.strerror or str(error),
            hint="check free space and permissions, or name another output with -o",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def is_large(model: ir.Model) -> bool:
    """Whether a model's weights are not written inline."""
    return weight_bytes(model) > INLINE_LIMIT


def data_file(target: Path) -> Path:
    """Where the weights of a model go that are not written inline."""
    return target.with_name(f"{target.name}.data")


def save_model(model: ir.Model, target: Path, *, external: bool = False) -> tuple[str, int]:
    """Write a model atomically after onnx.checker has accepted the written file; returns its digest and its bytes.

    Weights go to ``TARGET.data`` where `external` is set or the model holds more than `INLINE_LIMIT` bytes of them; the
    bytes of that file are counted, too.
    """
    if (model.ir_version or LISTED) < LISTED:
        model = common.AddInitializersToInputsPass()(model.clone()).model
    with staged(target) as draft:
        if external or is_large(model):
            ir.save(model.clone(), draft, external_data=data_file(target).name)
        else:
            draft.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        try:
            sha256 = load_model(draft)[1]
        except MscompileError as error:
            raise VerificationError(
                "the compiled model is not a valid ONNX file",
                where=str(target),
                why=error.why,
                hint="please report this as a bug; nothing was written",
            ) from error
        return sha256, sum(file.stat().st_size for file in draft.parent.iterdir())
