"""Model files: loading with clear refusals, digests, and an atomic writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from mscompile.errors import ModelError, ResourceError, UnsupportedError, UsageError

INLINE_LIMIT = 1 << 30
"""Bytes of weights above which they go to an external file (protobuf ends at 2 GiB)."""
OLDEST_OPSET = 7
"""Opset from which operators broadcast like numpy; before it, axis signatures would be wrong."""

_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the real file with `git lfs pull`"),
    (b"<", "HTML or XML text", "the download may have failed: fetch the file again"),
    (b"PK\x03\x04", "a zip archive (a torch checkpoint, or a packed model)", "export or unpack it to .onnx first"),
    (b"\x80\x02", "a pickle", "export the network to ONNX first"),
    (b"{", "JSON text", "export the network to a binary .onnx file"),
)


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
    if not path.exists():
        raise UsageError(
            "there is no such model file", where=str(path), why="the path does not exist", hint="check the path"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise _rejected(path, "it is not a regular file", "give the path of an .onnx file")
    content = path.read_bytes()
    if not content:
        raise _rejected(path, "the file is empty", "export or download it again")
    for start, kind, hint in _LOOKALIKES:
        if content.startswith(start):
            raise _rejected(path, f"the file is {kind}", hint)
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:
        raise _rejected(path, "it cannot be parsed as protobuf", "the file may be truncated: export it again") from error
    if not proto.HasField("graph") or not proto.graph.node or not proto.opset_import:
        raise _rejected(path, "it holds no graph with nodes and an opset", "export it again")
    model = from_proto(proto, path)
    return model, digest(content, model)


def from_proto(proto: onnx.ModelProto, path: Path | None = None) -> ir.Model:
    """Read a ModelProto, after onnx's own checker has accepted it."""
    where = path if path is not None else Path(proto.graph.name or "model")
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opsets.get("", opsets.get("ai.onnx", newest)) <= newest:
        raise UnsupportedError(
            "the model's opset is not supported",
            where=str(where),
            why=f"it imports opset {opsets.get('')}; supported are {OLDEST_OPSET} to {newest}",
            hint="convert it with onnx.version_converter, or export it again",
        )
    try:
        # By path where there is one, so that external data is looked for beside the file.
        onnx.checker.check_model(str(path) if path is not None else proto)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0][:400]
        if "No Op registered" in reason or "No opset import" in reason:
            raise UnsupportedError(
                "the model uses an operator unknown to onnx", where=str(where), why=reason, hint="export without it"
            ) from error
        raise _rejected(where, reason, "export it again, or repair what the checker names") from error
    model = ir.from_proto(proto)
    if path is not None:
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value.base_dir = str(path.resolve().parent)
    return model


def _rejected(path: Path, why: str, hint: str) -> ModelError:
    return ModelError("the model was rejected", where=str(path), why=why, hint=hint)


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Tensors of the model that lie in external files."""
    return [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]


def digest(content: bytes, model: ir.Model) -> str:
    """Sha256 over the file's bytes and, in order of their names, its external files."""
    total = hashlib.sha256(content)
    for path in sorted({Path(tensor.path) for tensor in external_tensors(model)}):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def output_conflict(paths: list[Path], *, force: bool) -> None:
    """Refuse to overwrite, and to write into a folder that is not there.

    Raises
    ------
    UsageError
        A file exists and `force` is off, or its folder is missing.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise UsageError(
                "the output folder does not exist", where=str(path), why=f"{path.parent} is no folder", hint="create it"
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


def save_model(model: ir.Model, target: Path) -> str:
    """Write a model atomically after onnx.checker has accepted the written file; returns its digest.

    Weights go to ``TARGET.data`` where the model had external weights or holds more than `INLINE_LIMIT` bytes.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = bool(external_tensors(model)) or size > INLINE_LIMIT
    with staged(target) as draft:
        if external:
            ir.save(model.clone(), draft, external_data=f"{target.name}.data")
        else:
            draft.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        onnx.checker.check_model(str(draft), full_check=False)
        return load_model(draft)[1]
