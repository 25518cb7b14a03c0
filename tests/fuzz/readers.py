"""Readers of files from outside, as fuzzers see them: whatever the bytes, they are read, or refused by an error of ours.

    python tests/fuzz/readers.py TARGET SECONDS [--corpus DIR]
    python tests/fuzz/readers.py all SECONDS [--corpus DIR]       every target in turn, each for so long, in its own process

With atheris (`pip install atheris`) the search is led by coverage, and DIR keeps what led further; without, seeds are
mutated at random. Documents in JSON are changed in what they say, certificates sealed anew. Ends at the first finding with
its bytes in a file, else after the given time. Targets: see `TARGETS`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutations import mutated, rewritten
from fuzz.seeds import made, prepare, seeds

MEMORY = 2048
"""Megabytes beyond which an input is a finding."""
SLOW = 20
"""Seconds beyond which one is."""

Read = Callable[[bytes, Path], object]


# --- models and data ----------------------------------------------------------------------------------------------------


def read_model(content: bytes, folder: Path) -> object:
    """A model file with its external data beside it: wire, payloads, vetting, order of nodes, checker."""
    from mscompile.intake.loading import load_model

    (folder / "m.onnx").write_bytes(content)
    return load_model(folder / "m.onnx", hashed=False)


def _read_data(name: str, content: bytes, folder: Path) -> object:
    from mscompile.intake.data import read
    from mscompile.intake.samples import InputSpec

    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return read(folder / name.partition("/")[0], [InputSpec("x", np.dtype(np.float32), ("N", 6))])


def read_npz(content: bytes, folder: Path) -> object:
    """An archive: as it is, or with the bytes as an array in it, which a checksum would keep from changing."""
    if content[:1] == b"\0":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.npy", content[1:])
        content = buffer.getvalue()
    return _read_data("x.npz", content, folder)


def read_npy(content: bytes, folder: Path) -> object:
    """One array."""
    return _read_data("x.npy", content, folder)


def read_safetensors(content: bytes, folder: Path) -> object:
    """Arrays with a header."""
    return _read_data("x.safetensors", content, folder)


def read_tensor(content: bytes, folder: Path) -> object:
    """A tensor of a test data set."""
    return _read_data("test_data_set_0/input_0.pb", content, folder)


# --- what stages hand on ------------------------------------------------------------------------------------------------


def read_statistics(content: bytes, folder: Path) -> object:
    """A statistics file."""
    from mscompile.calibration.statistics_file import load_statistics

    (folder / "s.safetensors").write_bytes(content)
    return load_statistics(folder / "s.safetensors", model_sha256="0" * 64)


def read_plan(content: bytes, folder: Path) -> object:
    """A plan, as it is carried out and as an audit takes it."""
    from mscompile.audit.inputs import read_plan as plan_for
    from mscompile.audit.tau import claims_of_plan, resolve
    from mscompile.planning.plan import Plan

    (folder / "p.json").write_bytes(content)
    dense, small = _models(folder)
    try:
        told = str(json.loads(content)["model_sha256"])
    except (ValueError, TypeError, KeyError, RecursionError):
        told = ""

    def audited(*_: object) -> object:
        plan, _ = plan_for(folder / "p.json", replace(dense, sha256=told), small, provenance=False)
        assert plan is not None
        return resolve(claims_of_plan(plan, small.metadata), "plan", *_values())

    attempt(audited, b"", folder)
    return Plan.read(folder / "p.json")


def read_latencies(content: bytes, folder: Path) -> object:
    """The table of latencies in the user's cache: one that cannot be read counts as empty."""
    from mscompile.network.latency import LatencyTable

    os.environ["XDG_CACHE_HOME"] = str(folder)
    path = LatencyTable.open().path
    assert path is not None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    entries = LatencyTable.open().entries
    assert all(0.0 < value < float("inf") for value in entries.values())
    return entries or refuse()


def read_journal(content: bytes, folder: Path) -> object:
    """A journal of the work folder: what it does not say in due form is made again."""
    from mscompile.runs.work import Work

    with Work(folder / "w") as work:
        work.begin(model="m", data="d", source="s", target="t")
        assert work.begun is not None
        assert work.begun.folder is not None
        path = work.begun.folder / "journal.jsonl"
    path.write_bytes(content)
    with Work(folder / "w") as work:
        stage = work.stage("run", source="s", target="t")
        for name in list(stage.entries):
            stage.reuse(name, "words")
            if stage.value(name) is None:
                stage.parcel(name)
            stage.recall(name, "words", lambda: 1)
    path.write_bytes(content)
    with Work(folder / "w") as work:
        work.begin(model="m", data="0" * 64, source="s", target="t")
        return work


def read_parcel(content: bytes, folder: Path) -> object:
    """Arrays of the work folder: what is no parcel is made again."""
    from mscompile.runs.parcel import Parcel

    del folder
    try:
        return Parcel.unpack(content)
    except ValueError:
        return refuse()


# --- audits -------------------------------------------------------------------------------------------------------------


def read_certificate(content: bytes, folder: Path) -> object:
    """A certificate: parsed and checked, made ready to be replayed, and rendered."""
    from mscompile.audit.replay import asked_again, claimed_sites
    from mscompile.audit.report import AuditReport
    from mscompile.audit.tau import resolve
    from mscompile.pages import render

    report = AuditReport.parse(content, "certificate")
    asked_again(report, explain=False)
    (folder / "c.json").write_bytes(content)
    attempt(lambda *_: render(folder / "c.json", "html"), b"", folder)
    attempt(lambda *_: render(folder / "c.json", "markdown"), b"", folder)
    return resolve(claimed_sites(report), report.tau_origin, *_values())


def read_report(content: bytes, folder: Path) -> object:
    """A report: as a page, and for the digests in it of the data of a compile."""
    from mscompile.audit.inputs import known_samples
    from mscompile.pages import render

    dense, small = _models(folder)
    (folder / "small.report.json").write_bytes(content)
    known_samples(None, dense, small)
    return render(folder / "small.report.json", "html"), render(folder / "small.report.json", "markdown")


def read_tau(content: bytes, folder: Path) -> object:
    """A tau written by hand."""
    from mscompile.audit.tau import claims_of_file, resolve

    (folder / "t.json").write_bytes(content)
    return resolve(claims_of_file(folder / "t.json"), "given", *_values())


def read_metadata(content: bytes, folder: Path) -> object:
    """The tau in a model's metadata: a document of two, or one that is neither."""
    from mscompile.audit.tau import claims_of_metadata, resolve
    from mscompile.intake.provenance import METADATA

    del folder
    try:
        document: Any = json.loads(content)
        entries = {METADATA + key: json.dumps(document[key]) for key in ("tau", "channels")}
    except (ValueError, TypeError, KeyError, RecursionError):
        entries = {METADATA + "tau": content.decode("latin1")}
    claims = claims_of_metadata(entries)
    return refuse() if claims is None else resolve(claims, "metadata", *_values())


@cache
def _models(folder: Path) -> tuple[Any, Any]:
    """A dense model and a compiled one."""
    from mscompile.audit.inputs import open_model

    return open_model(folder / "dense.onnx"), open_model(folder / "small.onnx")


def _values() -> tuple[Any, Any]:
    """Tensors of either model on a few samples; of any name."""

    class Named(dict[str, Any]):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

        def __missing__(self, name: str) -> Any:
            return np.zeros((2, self.width) if name else 2, np.float32)

    return Named(8), Named(4)


READERS: tuple[Read, ...] = (
    *(read_model, read_npz, read_npy, read_safetensors, read_tensor),
    *(read_statistics, read_plan, read_latencies, read_journal, read_parcel),
    *(read_certificate, read_report, read_tau, read_metadata),
)
TARGETS = {read.__name__.removeprefix("read_"): read for read in READERS}


def refuse() -> object:
    """Say that the bytes were not taken, where the reader says nothing."""
    from mscompile.errors import UsageError

    raise UsageError("it is not taken", where="here", why="it is no such file", hint="none")


def attempt(read: Read, content: bytes, folder: Path) -> bool:
    """Whether the bytes are taken in; anything but a refusal of ours goes through."""
    from mscompile.errors import MscompileError
    from mscompile.terminal import error_text

    try:
        read(content, folder)
    except MscompileError as error:
        if error.exit_code == MscompileError.exit_code:
            raise  # a bug, not a refusal
        error_text(error, 100).encode()
        return False
    return True


def changed(content: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes or, mostly, the document with others in what it says."""
    found = rewritten(content, rng) if rng.random() < 0.8 else None
    return mutated(content, rng) if found is None else found


# --- the command --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Look for inputs that are neither taken nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("seconds", type=int)
    parser.add_argument("--corpus", type=Path, default=None)
    options = parser.parse_args()
    if options.target == "all":
        sys.exit(max(_each(target, options) for target in TARGETS))
    folder = Path(tempfile.mkdtemp(prefix="fuzz."))
    read = TARGETS[options.target]
    corpus = options.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is not None:
        with atheris.instrument_imports(include=["mscompile"]):
            prepare(folder)
            known = _seeded(options.target, read, folder)
    else:
        prepare(folder)
        known = _seeded(options.target, read, folder)
    for number, seed in enumerate(known):
        (corpus / f"seed{number}").write_bytes(seed)
    runs = taken = 0

    def once(content: bytes) -> None:
        nonlocal runs, taken
        taken += attempt(read, content, folder)
        runs += 1

    if atheris is None:
        print("atheris is not installed: seeds are mutated at random")
        rng, end = random.Random(0), time.monotonic() + options.seconds
        while time.monotonic() < end:
            content = changed(rng.choice(known), rng)
            (corpus / "last").write_bytes(content)
            once(content)
        print(f"{options.target}: {runs} inputs, {taken} taken, none a finding")
        return

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        found = rewritten(content, rng) if rng.random() < 0.8 else None
        if found is None or len(found) > most:
            found = atheris.Mutate(content, most)
        return bytes(found)

    limits = [f"-max_total_time={options.seconds}", f"-rss_limit_mb={MEMORY}", f"-timeout={SLOW}", "-max_len=65536"]
    arguments = [sys.argv[0], str(corpus), *limits, f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    atheris.Setup(arguments, once, custom_mutator=mutate)
    atheris.Fuzz()


def _seeded(target: str, read: Read, folder: Path) -> list[bytes]:
    """Seeds of a target, each of them read once: what that imports is led by coverage, too."""
    made()
    known = list(seeds(target))
    for seed in known:
        attempt(read, seed, folder)
    return known


def _each(target: str, options: argparse.Namespace) -> int:
    """Fuzz one target in a process of its own."""
    command = [sys.executable, __file__, target, str(options.seconds)]
    if options.corpus is not None:
        command += ["--corpus", str(options.corpus / target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    out, err = ([line for line in text.splitlines() if line.strip()] for text in (done.stdout, done.stderr))
    print(f"{target}: {'A FINDING' if done.returncode else 'none a finding'}")
    print("\n".join(f"  {line}" for line in (out[-40:] + err[-12:] if done.returncode else [*out, *err][-6:])), flush=True)
    return abs(done.returncode)


if __name__ == "__main__":
    main()
