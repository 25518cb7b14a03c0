"""A transformer of 3 GB from end to end: peak memory and time beside onnxruntime alone.

    python tests/benchmarks/large_model.py [--layers 60] [--width 1024] [--folder DIR] [options of mscompile]
    python tests/benchmarks/large_model.py --layers 8 24                    does memory grow with the number of sites?

The model is made up and written as it is drawn, never held. Processes of their own: onnxruntime loads the model and runs it
on the samples that compiling sees, as it comes and without copies of weights laid out anew (*lean*); `mscompile` compiles.
Memory is the peak of pages that belong to no file; pages of mapped files, which the system takes back as it likes, are
counted apart. What compiling takes beyond lean onnxruntime is set against what the largest site needs: its matrices, of
channels times channels, in the making. `mscompile` keeps onnxruntime from making copies of models above 1 GiB; here of
smaller ones as well, so that depths can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

TOKENS, SAMPLES, BATCH, CLASSES, HEADS = 64, 24, 4, 10, 16
"""Of a sequence, of a run, of a batch; outputs; heads of attention."""
DEFAULT = (
    f"--keep 0.75 --replacement constant --probes 1 --anchors 0 --batch-size {BATCH} --no-recalibrate --no-cache --quiet"
)
"""How it is compiled, unless other options of `mscompile` are given: with so few samples an affine fit is undetermined."""


BYTES = 24
"""Per entry of a matrix in the making: in float32 before and after a batch, in float64 on the way and in total."""


class Writer:
    """Weights as they are drawn, into the external file of a model."""

    def __init__(self, path: Path) -> None:
        self.file, self.rng, self.stored = path.open("wb"), np.random.default_rng(0), []

    def add(self, name: str, *shape: int, scale: float | None = None) -> str:
        array = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale or shape[0] ** -0.5)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        self.file.write(bytes(-self.file.tell() % 4096))
        entries = {"location": Path(self.file.name).name, "offset": self.file.tell(), "length": array.nbytes}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in entries.items())
        array.tofile(self.file)
        self.stored.append(tensor)
        return name


def write_model(path: Path, layers: int, width: int) -> None:
    """Attention and feed-forward layers with normalisation before each, from [N, TOKENS, width] to class scores."""
    weights = Writer(path.with_name("weights.bin"))
    nodes: list[onnx.NodeProto] = []

    def node(op: str, *inputs: str, **attributes: object) -> str:
        out = f"{op.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [out], name=out, **attributes))
        return out

    def constant(name: str, *values: int) -> str:
        stored = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        if name not in {t.name for t in weights.stored}:
            weights.stored.append(stored)
        return name

    def normalised(x: str, name: str) -> str:
        scale, bias = weights.add(f"{name}.scale", width, scale=1.0), weights.add(f"{name}.bias", width, scale=0.1)
        return node("LayerNormalization", x, scale, bias, axis=-1)

    apart, together = constant("apart", 0, TOKENS, HEADS, width // HEADS), constant("together", 0, TOKENS, width)
    x = "x"
    for i in range(layers):
        y = normalised(x, f"{i}.before")
        heads = []
        for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            made = node("MatMul", y, weights.add(f"{i}.{part}", width, width))
            heads.append(node("Transpose", node("Reshape", made, apart), perm=perm))
        scores = node("Softmax", node("Mul", node("MatMul", heads[0], heads[1]), "scale"), axis=-1)
        mixed = node("Reshape", node("Transpose", node("MatMul", scores, heads[2]), perm=[0, 2, 1, 3]), together)
        x = node("Add", x, node("MatMul", mixed, weights.add(f"{i}.o", width, width)))
        y = normalised(x, f"{i}.between")
        wide = node("MatMul", y, weights.add(f"{i}.up", width, 4 * width))
        hidden = node("Relu", node("Add", wide, weights.add(f"{i}.up.bias", 4 * width, scale=0.1)))
        x = node("Add", x, node("MatMul", hidden, weights.add(f"{i}.down", 4 * width, width)))
    pooled = node("ReduceMean", normalised(x, "last"), constant("one", 1), keepdims=0)
    nodes.append(helper.make_node("MatMul", [pooled, weights.add("head", width, CLASSES)], ["y"], name="head"))
    weights.stored.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [(width // HEADS) ** -0.5]))
    weights.file.close()
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", TOKENS, width]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES]),
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights.stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


# --- in a process of their own ------------------------------------------------------------------------------------------


class Peak:
    """The most memory of this process so far: of its own, and with pages of files."""

    def __init__(self) -> None:
        self.own = self.all = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            found = dict(re.findall(r"(RssAnon|VmRSS):\s+(\d+)", Path("/proc/self/status").read_text()))
            self.own = max(self.own, int(found["RssAnon"]) * 1024)
            self.all = max(self.all, int(found["VmRSS"]) * 1024)
            time.sleep(0.02)


class InRuntime:
    """Seconds spent inside onnxruntime, loading and running."""

    def __init__(self) -> None:
        import onnxruntime

        self.seconds, self.inside = 0.0, threading.local()
        session = onnxruntime.InferenceSession
        for name in ("__init__", "run", "run_with_ort_values", "run_with_iobinding"):
            setattr(session, name, self._timed(getattr(session, name)))

    def _timed(self, function):
        def timed(*arguments, **options):
            if getattr(self.inside, "now", False):
                return function(*arguments, **options)
            self.inside.now, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start
                self.inside.now = False

        return timed


def plain(folder: Path, *, lean: bool) -> dict[str, float]:
    import onnxruntime as ort

    peak, start, x = Peak(), time.perf_counter(), np.load(folder / "x.npy")
    options = ort.SessionOptions()
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    off = ["ConstantFolding"] if lean else None
    session = ort.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=off
    )
    loaded = time.perf_counter() - start
    for begin in range(0, len(x), BATCH):
        session.run(None, {"x": x[begin : begin + BATCH]})
    return {"seconds": time.perf_counter() - start, "load": loaded, "own": peak.own, "all": peak.all}


def compiled(folder: Path, arguments: list[str]) -> dict[str, float]:
    from mscompile import cli, runtime
    from mscompile.clock import Clock

    runtime.LARGE = 0
    inside, peak, start, stages = InRuntime(), Peak(), time.perf_counter(), {}
    timed, before = Clock.time, [0]

    @contextlib.contextmanager
    def watched(clock: Clock, stage: str):
        before[0], peak.own = max(before[0], peak.own), 0
        with timed(clock, stage):
            yield
        stages[f"own, {stage}"] = max(stages.get(f"own, {stage}", 0), peak.own)

    Clock.time = watched
    code = cli.run([str(folder / "model.onnx"), "--calib", str(folder / "x.npy"), "--force", *arguments])
    seconds = time.perf_counter() - start
    own = max(before[0], peak.own)
    found = {"code": code, "seconds": seconds, "onnxruntime": inside.seconds, "own": own, "all": peak.all, **stages}
    report = json.loads((folder / "model.ms.report.json").read_bytes()) if code in (0, 6) else {"timings": {}}
    return {**found, **{f"time to {step}": spent for step, spent in report["timings"].items()}}


def measured(kind: str, folder: str, arguments: list[str]) -> dict[str, float]:
    """What a process of its own found; it is printed."""
    command = [sys.executable, __file__, "--folder", folder, "--run", kind, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    print(ran.stderr[-3000:] if ran.returncode else "", end="")
    found = json.loads(ran.stdout.splitlines()[-1])
    print(kind)
    for key, value in found.items():
        memory = key.startswith(("own", "all"))
        print(f"  {key:24} {value / 2**30 if memory else value:8.2f}{' GiB' if memory else ''}", flush=True)
    return found


def beside(layers: int, width: int, within: Path | None, arguments: list[str]) -> str:
    """One depth: a row of the table in the end."""
    with tempfile.TemporaryDirectory(dir=within) as name:
        folder = Path(name)
        write_model(folder / "model.onnx", layers, width)
        x = np.random.default_rng(1).standard_normal((SAMPLES, TOKENS, width), dtype=np.float32)
        np.save(folder / "x.npy", x)
        size = (folder / "weights.bin").stat().st_size / 2**30
        print(f"model: {size:.2f} GiB, {layers} layers")
        measured("plain", name, [])
        lean, found = measured("lean", name, []), measured("compiled", name, arguments)
        print("written:", *(f"{p.name} {p.stat().st_size / 2**30:.2f} GiB" for p in sorted(folder.glob("model.ms.*"))))
    matrices = 1 if "constant" in arguments else 3  # curvature; covariance, and between samples
    needs, beyond = BYTES * matrices * (4 * width) ** 2, found["own"] - lean["own"]
    share = 1 - found["onnxruntime"] / found["seconds"]
    numbers = f"{lean['own'] / 2**30:9.2f} {found['own'] / 2**30:9.2f} {beyond / 2**30:9.2f} {needs / 2**30:9.2f}"
    return f"{layers:6} {size:9.2f} {numbers} {beyond / needs:7.2f} {found['seconds']:9.1f} {share:7.0%}"


def main() -> None:
    """Make the model, run all, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[60])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--run", choices=["plain", "lean", "compiled"], help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()
    if options.run == "compiled":
        print(json.dumps(compiled(options.folder, more)))
    elif options.run is not None:
        print(json.dumps(plain(options.folder, lean=options.run == "lean")))
    else:
        rows = [beside(layers, options.width, options.folder, more or DEFAULT.split()) for layers in options.layers]
        print("\nGiB of memory of its own: lean onnxruntime, compiling, beyond, the largest site's needs, how often those;")
        print("seconds of compiling, and the share of them that is not onnxruntime's")
        print("layers     model      lean   compile    beyond     needs   times   seconds  beside", *rows, sep="\n")


if __name__ == "__main__":
    main()
