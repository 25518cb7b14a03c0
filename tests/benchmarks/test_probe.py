"""What one probe costs: forward pass, reverse pass to every site, and all sums for constant replacement.

    pytest tests/benchmarks/test_probe.py --benchmark-only --benchmark-columns=min,median,rounds -s

Each round times, one after the other, a block of plain forward passes by onnxruntime, one of the instrumented graph, and one
of torch's forward pass with automatic differentiation to the same activations, so that drift of the machine meets all alike;
the ratios are those of the fastest blocks, which load disturbs least. The networks are the reference architectures as they
are initialised (weights do not matter here), 64 samples at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mscompile.calibration.instrument import Instrument, Measure
from mscompile.calibration.survey import survey
from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.runtime import Session

torch = pytest.importorskip("torch")

BATCH = 64
ROUNDS, BLOCK = 40, 5
BAR = 2.5
"""Forward passes that one calibration pass with one probe may cost."""


def activations(network: torch.nn.Module) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.Tensor]]:
    """A forward pass, and where it leaves the activations that are sites."""
    from mscompile.models.architectures import GlobalAverage, Residual

    kept: list[torch.Tensor] = []
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU | torch.nn.GELU | torch.nn.MaxPool2d | Residual | GlobalAverage):
            module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept.clear()
        return network(x)

    return forward, kept


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_one_probe(benchmark, name: str, threads: int, tmp_path: Path) -> None:
    """At most `BAR` plain forward passes, and not slower than torch."""
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.export import export

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = ARCHITECTURES[name].build().eval().requires_grad_(requires_grad=False)
    x = np.random.default_rng(0).standard_normal((BATCH, 784) if name == "mlp" else (BATCH, 1, 28, 28)).astype(np.float32)
    export(network, x, tmp_path / f"{name}.onnx")
    dense = open_dense(tmp_path / f"{name}.onnx")
    samples = Samples({"x": x}, None, "noise")
    measure = Measure(covariance=False, outputs={dense.output: 1.0}, curvature="identity", probes=1)
    first = survey(dense.scm, dense.sites, samples.inputs, BATCH, [dense.output])
    instrument = Instrument(dense.scm, dense.sites, first, measure, BATCH)
    plain, summing = Session(dense.model, threads=threads), Session(instrument.model, threads=threads)
    task = instrument.summation
    feed, start = {**samples.inputs, **task.feeds.of(1, 0, BATCH, samples.labels, samples.source)}, task.empty()
    forward, kept = activations(network)
    pixels, seed = torch.from_numpy(x).requires_grad_(), torch.ones(BATCH, 10)
    contenders: dict[str, Callable[[], object]] = {
        "forward": lambda: plain.run(samples.inputs),
        "torch": lambda: torch.autograd.grad(forward(pixels), kept, seed),
        "probe": lambda: summing.step(feed, start),
    }
    times: dict[str, list[float]] = {key: [] for key in contenders}

    def block(key: str) -> None:
        contenders[key]()  # wakes the threads of its own pool, after those of the others went to sleep
        began = time.perf_counter()
        for _ in range(BLOCK):
            contenders[key]()
        times[key].append((time.perf_counter() - began) / BLOCK)

    def others() -> None:
        block("forward")
        block("torch")

    benchmark.pedantic(lambda: block("probe"), setup=others, rounds=ROUNDS, warmup_rounds=2)
    fastest = {key: min(values) for key, values in times.items()}
    middle = {key: float(np.median(values)) for key, values in times.items()}
    facts = {
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "forward_ms": round(1e3 * fastest["forward"], 3),
        "of_forward": round(fastest["probe"] / fastest["forward"], 2),
        "of_forward_by_medians": round(middle["probe"] / middle["forward"], 2),
        "of_torch": round(fastest["probe"] / fastest["torch"], 2),
        "of_torch_by_medians": round(middle["probe"] / middle["torch"], 2),
    }
    benchmark.extra_info.update(facts)
    print(f"\n{benchmark.name}: {facts}")
    assert facts["of_forward"] <= BAR
    assert facts["of_torch"] <= 1.0
