"""Row B43 of the bad inputs in full: 50 000 nodes, 20 000 weights, 3.2 GB of external data; and how time grows with nodes.

    python tests/benchmarks/many_nodes.py

Nodes are products with a matrix of 100 × 400, two of five, and Relus; the data file is sparse, and takes no disk.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
from onnx import TensorProto, helper

NODES = (5_000, 10_000, 20_000, 50_000)
SHAPE = (100, 400)


def make(count: int, folder: Path) -> None:
    """A model of so many nodes."""
    size, nodes, weights = 4 * SHAPE[0] * SHAPE[1], [], []
    for i in range(count):
        inputs = [f"t{i}"]
        if i < count * 2 // 5:
            shape = SHAPE if i % 2 == 0 else SHAPE[::-1]
            weight = TensorProto(name=f"w{i}", data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in {"location": "w.bin", "offset": i * size, "length": size}.items():
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            inputs.append(weight.name)
        nodes.append(helper.make_node("MatMul" if len(inputs) > 1 else "Relu", inputs, [f"t{i + 1}"]))
    with (folder / "w.bin").open("wb") as file:
        file.truncate(len(weights) * size)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 100]) for name in ("t0", f"t{count}")]
    graph = helper.make_graph(nodes, "many", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")


def main() -> None:
    """Inspect models of ever more nodes, with and without a trial."""
    print(f"{'nodes':>8}{'':>12}  exit code  seconds   CPU s")
    with tempfile.TemporaryDirectory() as place:
        for count in NODES:
            make(count, Path(place))
            for more in ("--trust",), ():
                before, start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), time.monotonic()
                command = [sys.executable, "-m", "mscompile", "inspect", "m.onnx", *more]
                environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
                done = subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False)
                used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
                how = "".join(more) or "with trial"
                print(f"{count:>8}{how:>12}{done.returncode:>11}{time.monotonic() - start:>9.1f}{used:>8.1f}", flush=True)
    print(f"at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
