"""Model files: loading with clear refusals, digests, and an atomic writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.errors import ModelError, MscompileError, ResourceError, UnsupportedError, UsageError, VerificationError

LISTED = 4
"""IR version before which every initializer had to be listed as an input as well, and none could be overridden."""
INLINE_LIMIT = 1 << 30
"""Bytes of weights above which they go to an external file (protobuf ends at 2 GiB)."""
LARGEST = (1 << 31) - 1
"""Bytes at which protobuf ends."""
MOST_NODES = 1_000_000
"""Nodes of a model with its functions written out, at most."""
LEFT_OUT = "mscompile.left_out"
"""Key of an `ir.Model.meta` entry: what the file holds and onnx-ir does not take over."""
OLDEST_OPSET = 7
"""Opset from which operators broadcast like numpy; before it, axis signatures would be wrong."""

_LOOKALIKES = tuple(
    (re.compile(pattern, re.DOTALL), kind, hint)
    for pattern, kind, hint in (
        (rb"version https://git-lfs", "a Git LFS pointer", "fetch the real file with `git lfs pull`"),
        (rb"(\xef\xbb\xbf)?\s*<", "HTML or XML text", "the download may have failed: fetch the file again"),
        (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON text", "export the network to a binary .onnx file"),
        (rb"PK\x03\x04", "a zip archive (a torch checkpoint, or a packed model)", "export or unpack it to .onnx first"),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "a compressed or tar archive", "unpack it first"),
        (rb"\x80[\x02-\x05]", "a pickle", "export the network to ONNX first"),
        (rb".{4}ORTM", "a model in onnxruntime's own ORT format", "give the .onnx file that it was made from"),
        (rb".{4}TFL3", "a TensorFlow Lite model", "convert it to ONNX first"),
        (rb"\x89HDF", "an HDF5 file", "convert it to ONNX first"),
        (rb".{8}\{\"", "a safetensors file: weights without a graph", "give the exported .onnx file"),
    )
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
    content = _read(path)
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:
        raise _no_model(path, content, "it cannot be parsed as protobuf", "it may be truncated: export it again") from error
    if not proto.HasField("graph") or not proto.graph.node or not proto.opset_import:
        raise _no_model(path, content, "it holds no graph with nodes and an opset", "export it again")
    model = from_proto(proto, path)
    return model, digest(content, model)


def _read(path: Path) -> bytes:
    """Bytes of a file that may be an ONNX model."""
    size = check_regular(path)
    if size == 0:
        raise _rejected(path, "the file is empty", "export or download it again")
    if size > LARGEST:
        why = f"it has {size} bytes; protobuf ends at {LARGEST}"
        raise _rejected(path, why, "export it again with its weights in an external file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _rejected(path, error.strerror or str(error), "check the permissions of the file") from error


def check_regular(path: Path) -> int:
    """Size of a model's file; refuses what is not there, and what is no regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError("there is no such model file", where=str(path), why=why, hint="check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise _rejected(path, "it is not a regular file", "give the path of an .onnx file")
    return status.st_size


def _no_model(path: Path, content: bytes, why: str, hint: str) -> ModelError:
    """The refusal of bytes that are no model, saying what they look like instead."""
    for pattern, kind, advice in _LOOKALIKES:
        if pattern.match(content):
            return _rejected(path, f"the file is {kind}", advice)
    return _rejected(path, why, hint)


def from_proto(proto: onnx.ModelProto, path: Path | None = None) -> ir.Model:
    """Read a ModelProto, after onnx's own checker has accepted it."""
    where = path if path is not None else Path(proto.graph.name[:80] or "model")
    _check_versions(proto, where)
    if not proto.graph.output:
        raise _rejected(where, "its graph has no outputs", "export it again")
    if proto.graph.sparse_initializer:
        raise UnsupportedError(
            "the model has sparse weights",
            where=str(where),
            why=f"{len(proto.graph.sparse_initializer)} initializers are stored as sparse tensors",
            hint="export it with dense weights",
        )
    if path is None and any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        why = "its weights lie in external files, and a ModelProto does not say in which folder"
        raise _rejected(where, why, "give the path of the file, or load the weights with onnx.load")
    _check_expansion(proto, where)
    try:
        # By path where there is one, so that external data is looked for beside the file.
        onnx.checker.check_model(str(path) if path is not None and _is_text(path) else proto)
        model = ir.from_proto(proto)
    except Exception as error:
        reason = " ".join(str(_cause(error)).split())[:400]
        if "No Op registered" in reason or "No opset import" in reason:
            raise UnsupportedError(
                "the model uses an operator unknown to onnx", where=str(where), why=reason, hint="export without it"
            ) from error
        raise _rejected(where, reason, "export it again, or repair what the checker names") from error
    model.meta[LEFT_OUT] = [
        kind
        for kind, found in (
            ("training information", proto.training_info),
            ("quantization annotations", proto.graph.quantization_annotation),
        )
        if found
    ]
    if path is not None:
        ir.external_data.set_base_dir(model.graph, str(path.resolve().parent))
    return model


def _check_expansion(proto: onnx.ModelProto, where: Path) -> None:
    """Count the nodes of the graph with all functions written out: libraries inline them before anything else."""
    functions = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], path: frozenset[tuple[str, str, str]]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            total += 1 + sum(size(a.g.node, path) + sum(size(g.node, path) for g in a.graphs) for a in node.attribute)
            if key in functions and key not in path:  # what calls itself is refused by the checker
                if key not in sizes:
                    sizes[key] = size(functions[key], path | {key})
                total += sizes[key]
        return total

    total = size(proto.graph.node, frozenset()) if functions else 0
    if total > MOST_NODES:
        raise ResourceError(
            "the model is too large",
            where=str(where),
            why=f"its functions expand to {total:,} nodes; at most {MOST_NODES:,} are taken",
            hint="export it without nested functions",
        )


def _is_text(path: Path) -> bool:
    """Whether onnx can be given the path: it takes no bytes that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_versions(proto: onnx.ModelProto, where: Path) -> None:
    newest, newest_ir = onnx.defs.onnx_opset_version(), int(onnx.IR_VERSION)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", newest))
    upgrade = f"upgrade onnx, of which {onnx.__version__} is installed, or export for an older version"
    if proto.ir_version > newest_ir:
        why = f"it has IR version {proto.ir_version}; supported are up to {newest_ir}"
        raise UnsupportedError("the model's format is not supported", where=str(where), why=why, hint=upgrade)
    if not OLDEST_OPSET <= opset <= newest:
        raise UnsupportedError(
            "the model's opset is not supported",
            where=str(where),
            why=f"it imports opset {opset}; supported are {OLDEST_OPSET} to {newest}",
            hint=upgrade if opset > newest else "convert it with onnx.version_converter, or export it again",
        )


def _cause(error: BaseException) -> BaseException:
    """The innermost reason of an error: libraries wrap it in the whole graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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
