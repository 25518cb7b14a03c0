"""Readers of files from outside, as fuzzers see them: whatever the bytes, they are read, or refused by an error of ours.

    python tests/fuzz/readers.py TARGET SECONDS [--corpus DIR]

With atheris (`pip install atheris`) the search is led by coverage, and DIR keeps what led further; without, seeds are
mutated at random. Ends at the first finding with its bytes in a file, else after the given time. Targets: see `TARGETS`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

MEMORY = 2048
"""Megabytes beyond which an input is a finding."""
SLOW = 20
"""Seconds beyond which one is."""

Read = Callable[[bytes, Path], object]


def read_model(content: bytes, folder: Path) -> object:
    """A model file with its external data beside it: wire, payloads, vetting, order of nodes, checker."""
    from mscompile.intake.loading import load_model

    (folder / "m.onnx").write_bytes(content)
    return load_model(folder / "m.onnx", hashed=False)


def _read_data(name: str, content: bytes, folder: Path) -> object:
    from mscompile.intake.data import read
    from mscompile.intake.samples import InputSpec

    (folder / name).write_bytes(content)
    return read(folder / name, [InputSpec("x", np.dtype(np.float32), ("N", 6))])


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


def read_plan(content: bytes, folder: Path) -> object:
    """A plan."""
    from mscompile.planning.plan import Plan

    (folder / "p.json").write_bytes(content)
    return Plan.read(folder / "p.json")


def read_certificate(content: bytes, folder: Path) -> object:
    """A certificate of an audit."""
    del folder
    from mscompile.audit.report import AuditReport

    return AuditReport.parse(content, "certificate")


def read_statistics(content: bytes, folder: Path) -> object:
    """A statistics file."""
    from mscompile.calibration.statistics_file import load_statistics

    (folder / "s.safetensors").write_bytes(content)
    return load_statistics(folder / "s.safetensors", model_sha256="0" * 64)


TARGETS: dict[str, Read] = {
    read.__name__.removeprefix("read_"): read
    for read in (read_model, read_npz, read_npy, read_plan, read_certificate, read_statistics)
}


def attempt(read: Read, content: bytes, folder: Path) -> bool:
    """Whether the bytes are taken in; anything but a refusal of ours goes through."""
    from mscompile.errors import MscompileError

    try:
        read(content, folder)
    except MscompileError as error:
        if error.exit_code == MscompileError.exit_code:
            raise  # a bug, not a refusal
        return False
    return True


# --- seeds --------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """What lies beside the files."""
    (folder / "w.bin").write_bytes(bytes(1 << 14))


def seeds(target: str) -> Iterator[bytes]:
    """Sound files, and such as are nearly."""
    from small_models import mlp, samples

    if target == "model":
        import onnx

        model = mlp((6, 64, 32, 3))
        yield model.SerializeToString()
        yield mlp(ir=3).SerializeToString()
        for tensor in model.graph.initializer[:2]:
            entries = {"location": "w.bin", "offset": "0", "length": str(len(tensor.raw_data))}
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
        yield model.SerializeToString()
    elif target in ("npz", "npy"):
        for array in (samples(8), samples(8).astype(np.float64).T.copy().T, np.zeros((2, 6), ">f4")):
            buffer = io.BytesIO()
            np.save(buffer, array)
            yield buffer.getvalue() if target == "npy" else b"\0" + buffer.getvalue()
        if target == "npz":
            buffer = io.BytesIO()
            np.savez_compressed(buffer, x=samples(8), label=np.arange(8))
            yield buffer.getvalue()
    elif target == "plan":
        site = {"name": "h", "tensor": "h", "axis": 1, "size": 3, "kept": [0, 2], "constants": [0.5], "affine": [[1.0, 2.0]]}
        window = {"reader": "y", "places": [[0], [2]], "columns": [[[1.0]], [[2.0]]], "response": [[0.0]]}
        plan = {"schema_version": 1, "model_sha256": "0" * 64, "objective": "kl", "replacement": "affine", "swap": 0.1}
        yield json.dumps({**plan, "sites": [{**site, "windows": [window]}]}).encode()
        yield json.dumps({**plan, "sites": []}).encode()
    elif target == "certificate":
        yield from (json.dumps({"schema_version": n, "verdict": "certified", "dense": {}}).encode() for n in (1, 2))
    else:
        import safetensors.numpy

        header = {"schema_version": 2, "model_sha256": "0" * 64, "moments": {"h": 8}, "curvature": {"h": 8}, "windows": {}}
        more = {"samples": 8, "refused": {}, "data_sha256": [], "onnxruntime": "1", "metric": "none", "outputs": {}}
        arrays = {f"moments/{q}/h": np.ones(3) for q in ("mean", "squares", "low", "high")}
        arrays |= {f"curvature/{q}/h": np.ones(3) for q in ("s11", "s12", "s22", "g1", "g2")}
        metadata = {"mscompile": json.dumps({**header, **more, "scales": {}})}
        yield safetensors.numpy.save({**arrays, "moments/scatter/h": np.eye(3)}, metadata)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = rng.randbytes(size)
        elif kind == 3:
            changed[at : at + 1] = rng.choice((b"\0", b"\xff", b"\x7f", b"-", b"9", b'"', b"[", b"null", b"1e999"))
        else:
            there = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[there : there + size]
    return bytes(changed)


# --- the command --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Look for inputs that are neither taken nor refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("seconds", type=int)
    parser.add_argument("--corpus", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz."))
    prepare(folder)
    read = TARGETS[options.target]
    corpus = options.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(options.target)):
        (corpus / f"seed{number}").write_bytes(seed)
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: seeds are mutated at random")
        known, rng, runs, taken = list(seeds(options.target)), random.Random(0), 0, 0
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            content = mutated(rng.choice(known), rng)
            (folder / "last").write_bytes(content)
            taken += attempt(read, content, folder)
            runs += 1
        print(f"{options.target}: {runs} inputs, {taken} taken, none a finding")
        return
    with atheris.instrument_imports(include=["mscompile"]):
        pass
    limits = [f"-max_total_time={options.seconds}", f"-rss_limit_mb={MEMORY}", f"-timeout={SLOW}", "-max_len=65536"]

    def once(data: bytes) -> None:
        attempt(read, data, folder)

    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={corpus}/"], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
