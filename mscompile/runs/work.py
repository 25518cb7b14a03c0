"""The work folder: what a run has found, kept under digests of all that it depends on.

A run that was stopped goes on from there, and another goal on the same data starts from there. What is found damaged, or
was made by other versions, is made again. Each stage has a folder::

    WORK/calibrate-3f2a…/key.json        what the stage depends on, to be read by a person
                         journal.jsonl   one line per finished piece: its name, and its value or its file's digest
                         PIECE.parcel    arrays
                         .lock           held while a run works on the stage
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import onnxruntime as ort

from mscompile.errors import DataError, ResourceError, UsageError
from mscompile.intake.documents import parse
from mscompile.machine import cache_folder, processor
from mscompile.providers import chosen
from mscompile.runs.locks import HELD, acquire, holder
from mscompile.runs.parcel import Parcel
from mscompile.runs.shelf import Shelf, shelf_for
from mscompile.version import __version__

KEPT_BYTES, KEPT_DAYS = 8 << 30, 30
"""Size of a work folder above which the stages that were not used for longest are removed, and days after which all are."""
SHARE_OF_TIME = 0.05
"""Of the time of a stage that keeping unfinished sums may take."""


@cache
def versions() -> dict[str, str]:
    """What the bits of a result depend on beside its inputs: the code, and the machine."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "mscompile": f"{__version__}+{code.hexdigest()[:16]}",
        "onnxruntime": ort.__version__,
        "provider": chosen(),
        "numpy": np.__version__,
        "processor": f"{platform.machine()} {processor()}",
    }


@dataclass(eq=False)
class Stage:
    """Pieces of one stage. Without a folder nothing is kept and nothing is found.

    Attributes
    ----------
    entries
        The journal, by name of piece.
    earlier
        Names of those that runs before this one have kept.
    """

    work: Work
    folder: Path | None
    entries: dict[str, Any] = field(default_factory=dict)
    earlier: frozenset[str] = frozenset()
    _since: float = field(default_factory=time.perf_counter)
    _spent: float = 0.0

    def value(self, name: str) -> Any:
        """A JSON value kept under a name; None where there is none."""
        return self.entries.get(name, {}).get("value")

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self._journal(name, {"value": value})

    def recall(self, name: str, what: str, make: Callable[[], Any]) -> Any:
        """The JSON value kept under a name, made and kept where there is none; `what` it is in words."""
        found = self.value(name)
        if found is None:
            found = make()
            self.note(name, found)
        else:
            self.reuse(name, what)
        return found

    def reuse(self, name: str, what: str) -> None:
        """Say in words what was found under a name, if a run before this one has kept it."""
        if name in self.earlier and what not in self.work.reused:
            self.work.reused.append(what)

    def parcel(self, name: str) -> Parcel | None:
        """Arrays kept under a name; None where there are none, or not those that were kept."""
        wanted = self.entries.get(name, {}).get("sha256")
        if self.folder is None or wanted is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            content = self._file(name).read_bytes()
            if hashlib.sha256(content).hexdigest() == wanted:
                return Parcel.unpack(content)
        return None

    def keep(self, name: str, parcel: Parcel) -> None:
        """Keep arrays, in place of those of the same name."""
        if self.folder is None:
            return
        start = time.perf_counter()
        content, file = parcel.pack(), self._file(name)
        try:
            draft = file.with_suffix(".draft")
            with draft.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(file)
        except OSError as error:
            self._give_up(error)
            return
        self._journal(name, {"sha256": hashlib.sha256(content).hexdigest()})
        self._spent += time.perf_counter() - start

    @property
    def affordable(self) -> bool:
        """Whether keeping took little of the time so far: what can be summed again quickly is not worth its writing."""
        return self.folder is not None and self._spent <= SHARE_OF_TIME * (time.perf_counter() - self._since)

    def drop(self, name: str) -> None:
        """Forget arrays that others have taken the place of."""
        if self.folder is not None and self.entries.pop(name, None) is not None:
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.parcel"

    def _journal(self, name: str, entry: dict[str, Any]) -> None:
        if self.folder is None:
            return
        self.entries[name] = entry
        try:
            _append(self.folder / "journal.jsonl", {"name": name, **entry})
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.work.refuse(error)
        self.folder = None


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, on disk when this returns; begins a new one where the last was cut off."""
    with path.open("a+b") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    """The journal by name, later lines in place of earlier ones; lines that were cut off are skipped."""
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                entry = parse(line)
                found[entry.pop("name")] = entry
    return found


class Work:
    """A work folder.

    Parameters
    ----------
    root
        The folder; None keeps nothing.
    resume
        Whether what is there already is used; if not, it is made again.
    asked
        Whether the user named the folder: it is then theirs alone while they run, and failing to write there is an error.

    Raises
    ------
    UsageError
        Another run works in the folder that was named.
    ResourceError
        It cannot be written.
    """

    def __init__(self, root: Path | None, *, resume: bool = True, asked: bool = False) -> None:
        self.root, self.asked = root, asked
        self.base: dict[str, str] = {}
        self.notes: list[str] = []
        """What the user should know."""
        self.reused: list[str] = []
        """What runs before this one have found, and was not done again."""
        self._resume, self._stages, self._locks = resume, dict[str, Stage](), list[IO[str]]()
        self.begun: Stage | None = None
        """The run, from when its model and data are known until it is done."""
        if root is None:
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            if asked:
                self._own(root / HELD)
            self._clean(root)
        except OSError as error:
            self.refuse(error)

    def _own(self, lock: Path) -> None:
        file = acquire(lock)
        if file is None:
            raise UsageError(
                "another run works in this folder",
                where=str(lock.parent),
                why=f"{holder(lock)} holds {lock.name} in it",
                hint="wait for it to end, or name another folder with --work",
            )
        self._locks.append(file)

    def refuse(self, error: OSError) -> None:
        """Go on without keeping anything, or not at all where the user named the folder."""
        why = error.strerror or str(error)
        if self.asked:
            raise ResourceError(
                "the work folder cannot be written",
                where=str(self.root),
                why=why,
                hint="check free space and permissions, name another with --work, or keep nothing with --no-cache",
            ) from error
        self.notes.append(f"nothing more is kept in {self.root}, so that the run could not be resumed: {why}")
        self.root = None

    def begin(self, *, model: str, data: str | None, source: str, target: str) -> None:
        """Say what all stages depend on from here on: the model and the versions; and which data is read from a source.

        Raises
        ------
        DataError
            It is not the data of the run with that target that was stopped, and would be gone on with.
        """
        if self.root is None:
            return
        self.base = {}
        begun = self.stage("run", source=source, target=target)
        known = begun.value("data")
        if data is not None and known not in (None, data):
            raise DataError(
                "the data changed since the run that would be resumed",
                where=source,
                why=f"its sha256 was {str(known)[:12]}… and is {data[:12]}…",
                hint="begin afresh with --no-resume; a script must yield the same samples every time",
            )
        begun.note("data", data)
        self.begun = begun
        self.base = {**versions(), "model": model}

    @property
    def resumable(self) -> bool:
        """Whether there is a run that can be gone on with."""
        return self.root is not None and self.begun is not None

    def shelf(self, size: int) -> Shelf:
        """Where arrays of so many bytes together are put: on the same disk as what is kept, if anything is."""
        return shelf_for(size, self.root)

    def finish(self) -> None:
        """Say that the run is done: nothing is left to resume."""
        if self.begun is not None and self.begun.folder is not None:
            shutil.rmtree(self.begun.folder, ignore_errors=True)
        self.begun = None

    def stage(self, kind: str, **key: Any) -> Stage:
        """The stage of a kind that depends on `key`, JSON values."""
        if self.root is None:
            return Stage(self, None)
        text = json.dumps({"stage": kind, **self.base, **key}, sort_keys=True, default=_plain)
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        if name not in self._stages:
            self._stages[name] = self._open(self.root / name, text)
        return self._stages[name]

    def _open(self, folder: Path, text: str) -> Stage:
        try:
            folder.mkdir(exist_ok=True)
            lock = acquire(folder / HELD)
            if lock is None:
                self.notes.append(f"{holder(folder / HELD)} works on the same stage: nothing of it is kept here")
                return Stage(self, None)
            self._locks.append(lock)
            if not self._resume:
                _empty(folder)
            (folder / "key.json").write_text(text, encoding="utf-8")
            os.utime(folder)
            entries = _read(folder / "journal.jsonl")
            return Stage(self, folder, entries, frozenset(entries))
        except OSError as error:
            self.refuse(error)
            return Stage(self, None)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Let go of all locks. What failed for good will not be gone on with; what was stopped, or lacked resources, may."""
        if isinstance(error, Exception) and not isinstance(error, ResourceError):
            self.finish()
        self.close()

    def close(self) -> None:
        """Let go of all locks."""
        for file in self._locks:
            file.close()
        self._locks.clear()
        self._stages.clear()

    def _clean(self, root: Path) -> None:
        """Remove stages that were not used for `KEPT_DAYS`, and those not used for longest beyond `KEPT_BYTES`."""
        stages = sorted((path for path in root.iterdir() if (path / "key.json").is_file()), key=lambda p: -p.stat().st_mtime)
        total, oldest = 0, time.time() - KEPT_DAYS * 86400
        for folder in stages:
            total += sum(path.stat().st_size for path in folder.iterdir())
            if (total > KEPT_BYTES or folder.stat().st_mtime < oldest) and (lock := acquire(folder / HELD)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != HELD:
            path.unlink()


def _plain(value: Any) -> Any:
    """What JSON lacks, in a form that says all of it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, slice):
        return [value.start, value.stop]
    raise TypeError(f"{type(value).__name__} cannot be part of a key")


def default_root() -> Path:
    """The work folder where none is named."""
    return cache_folder() / "work"


def digest(parts: Iterable[object]) -> str:
    """What tells pieces of a stage apart whose names would be long."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


NOWHERE: Final = Work(None)
"""Keeps nothing."""
FORGET: Final = Stage(NOWHERE, None)
"""A stage of it."""
