"""Files written: whole or not at all, and never over what is there by accident."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.errors import MscompileError, ResourceError, UsageError, VerificationError
from mscompile.intake.loading import load_model
from mscompile.intake.payloads import Bytes, joined, split
from mscompile.intake.wire import opened
from mscompile.verification.skeletons import apart

LISTED = 4
"""IR version before which every initializer had to be listed as an input as well, and none could be overridden."""
INLINE_LIMIT = 1 << 30
"""Bytes of weights above which they go to an external file (protobuf ends at 2 GiB)."""
PAGE, WORD = 4096, 64
"""Where tensors begin in a data file: on a page, so that they can be mapped one by one, or where they are smaller."""


def beside(path: Path, ending: str) -> Path:
    """The file beside another that has its name, with another ending."""
    return path.parent / f"{path.stem}{ending}"


def output_conflict(paths: Iterable[Path], *, force: bool, inputs: Sequence[Path] = ()) -> None:
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
        A file exists and `force` is off, is an input or no regular file, or its folder is missing; or two are the same.
    """
    paths = list(paths)
    for name, times in Counter(map(os.path.realpath, paths)).items():
        if times > 1:
            raise UsageError(
                "two outputs are one file", where=name, why="one would overwrite the other", hint="give each its own name"
            )
    for path in paths:
        if path == Path("-"):
            raise UsageError(
                "the output cannot be standard output",
                where="-",
                why="a model and what lies beside it are several files",
                hint="name a file with -o",
            )
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
        if path.exists() and not path.is_file():
            raise UsageError(
                "the output cannot be written",
                where=str(path),
                why="there is something else of that name, which is no file",
                hint="name another output with -o",
            )
        spare_inputs([path], inputs)
        if path.exists() and not force:
            raise UsageError(
                "the output exists already",
                where=str(path),
                why="files are never overwritten silently",
                hint="name another output with -o, or add --force",
            )


def spare_inputs(paths: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to write over what is read, whether or not files may be overwritten.

    Raises
    ------
    UsageError
        A file to be written is one that is read.
    """
    read = {os.path.realpath(path) for path in inputs}
    for path in paths:
        if os.path.realpath(path) in read:
            raise UsageError(
                "the output is an input, too",
                where=str(path),
                why="what is read is never overwritten",
                hint="name another output with -o",
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
                _flush(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Write a folder of files as a whole or not at all.

    Yields a folder to fill; on success its files are flushed to disk and it takes the target's place, with what was there.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}.") as folder:
            draft = Path(folder) / target.name
            draft.mkdir()
            yield draft
            for written in draft.iterdir():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
            _flush(draft)
            if target.exists():
                target.rename(Path(folder) / f"{target.name}.old")
            draft.rename(target)
            _flush(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ResourceError:
    return ResourceError(
        "the output cannot be written",
        where=str(target),
        why=error.strerror or str(error),
        hint="check free space and permissions, or name another output with -o",
    )


def _flush(folder: Path) -> None:
    """Have the names in a folder written to disk before anything that comes after."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def file_bytes(model: ir.Model) -> int:
    """Size of a model's file with all weights in it."""
    skeleton, payloads = apart(model)
    return sum(len(part) for part in joined(skeleton.SerializeToString(deterministic=True), payloads))


def save_model(model: ir.Model, target: Path, *, external: bool = False, inputs: Iterable[Path] = ()) -> tuple[str, int]:
    """Write a model atomically after onnx.checker has accepted the written file; returns its digest and its bytes.

    Weights are not copied on the way. They go to a file beside it, named after its content, where `external` is set or the
    model holds more than `INLINE_LIMIT` bytes of them; its bytes are counted, too. That file is there before the model
    that names it takes the target's place, and the one that an older model named goes after that, unless it is among the
    `inputs`, which another model names: whatever happens between, there is the old model or the new one, with its weights.
    """
    if (model.ir_version or LISTED) < LISTED:
        model = common.AddInitializersToInputsPass()(model.clone()).model
    old = _own_data(target)
    with staged(target) as draft:
        skeleton, payloads = apart(model)
        if payloads and (external or is_large(model)):
            _write_data(skeleton, payloads, draft)
            payloads = {}
        with draft.open("wb") as file:
            for part in joined(skeleton.SerializeToString(deterministic=True), payloads):
                file.write(part)
        try:
            sha256 = load_model(draft, trusted=True)[1]
        except MscompileError as error:
            raise VerificationError(
                "the compiled model is not a valid ONNX file",
                where=str(target),
                why=error.why,
                hint="please report this as a bug; nothing was written",
            ) from error
        new, size = _own_data(draft), sum(file.stat().st_size for file in draft.parent.iterdir())
    read = {os.path.realpath(path) for path in inputs}
    for left in map(target.with_name, old - new):
        if os.path.realpath(left) not in read:
            left.unlink(missing_ok=True)
    return sha256, size


def _write_data(skeleton: onnx.ModelProto, payloads: Mapping[int, Bytes], draft: Path) -> None:
    """Write tensors one behind the other into a file beside the draft, and say in the skeleton where they lie."""
    written = draft.with_name(f"{draft.name}.data")
    content, end = hashlib.sha256(), 0
    with written.open("wb") as file:
        for number, data in sorted(payloads.items()):
            gap = bytes(-end % (PAGE if len(data) >= PAGE else WORD))
            for part in (gap, data.data):
                file.write(part)
                content.update(part)
            entries = {"offset": end + len(gap), "length": len(data)}
            tensor = skeleton.graph.initializer[number]
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in entries.items())
            end += len(gap) + len(data)
    named = written.rename(draft.with_name(f"{draft.name}.{content.hexdigest()[:16]}.data"))
    for number in payloads:
        skeleton.graph.initializer[number].external_data.add(key="location", value=named.name)


def _own_data(target: Path) -> set[str]:
    """Names of the data files of a model file that were written by `save_model`."""
    try:
        with opened(target) as content:
            graph, _ = split(content)
    except MscompileError:  # whatever it is, it is not ours
        return set()
    pattern = re.escape(os.fsencode(target.name)) + rb"\.[0-9a-f]{16}\.data"
    return set(map(os.fsdecode, re.findall(pattern, graph)))
