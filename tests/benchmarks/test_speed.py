"""What calibrating, compiling and verifying cost in time.

    pytest tests/benchmarks/test_speed.py --benchmark-only --benchmark-columns=median,iqr,rounds -s
    MSCOMPILE_MODELS=FOLDER pytest tests/benchmarks/test_speed.py --benchmark-only --benchmark-json=speed.json

Without `--benchmark-only` they are skipped. Ratios and rates are printed with `-s`; they are `extra_info` of the JSON file.
The digits model comes with the package; the other reference models are measured where the environment variable
MSCOMPILE_MODELS names the folder they were trained into.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from candidates import beside, candidate_of, measure_of, orders_of, samples_of, scores_of, statistics_of

import mscompile
from mscompile import models
from mscompile.calibration.calibration import calibrate
from mscompile.network.dense import open_dense
from mscompile.options import Options
from mscompile.runtime import Session

DIGITS = Path(models.__file__).with_name("digits.onnx")
FOLDER = os.environ.get("MSCOMPILE_MODELS")
TRAINED = [path for path in sorted(Path(FOLDER).glob("*.onnx")) if beside(path, "calib").is_file()] if FOLDER else []
BATCH = Options().batch
ROUNDS = 7
TRIALS = 5000


def note(benchmark, **facts: object) -> None:
    """Add facts to the record of a benchmark, and print them."""
    benchmark.extra_info.update(facts)
    print(f"\n{benchmark.name}: {facts}")


@pytest.mark.parametrize("objective", ["variance", "logit-mse"])
@pytest.mark.parametrize("path", [DIGITS, *(p for p in TRAINED if p.stem != DIGITS.stem)], ids=lambda path: path.stem)
def test_calibration_against_forward_pass(benchmark, path: Path, objective: str) -> None:
    """Both load their graph and run all samples; the ratio is that of the medians.

    For variance the calibration is a forward pass with means and covariances of units and windows; for logit-mse it has the
    reverse passes too: one for each output, or four where there are more than 16 outputs.
    """
    dense = open_dense(path)
    samples = samples_of(dense, beside(path, "calib"))
    measure = measure_of(dense, objective)
    forward: list[float] = []

    def plain_pass() -> None:
        start = time.perf_counter()
        session = Session(dense.model)
        for batch in samples.batches(BATCH):
            session.run(batch)
        forward.append(time.perf_counter() - start)

    def calibration() -> None:
        calibrate(dense.scm, dense.sites, samples, batch_size=BATCH, measure=measure)

    # One plain pass before each round, so that drift of the machine meets both alike.
    benchmark.pedantic(calibration, setup=plain_pass, rounds=ROUNDS, warmup_rounds=1)
    plain = statistics.median(forward[-ROUNDS:])
    note(benchmark, samples=len(samples), forward_s=round(plain, 4), ratio=round(benchmark.stats.stats.median / plain, 2))


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"fidelity": 0.9}], ids=["keep", "fidelity"])
def test_compile_end_to_end(benchmark, options: dict[str, float], tmp_path: Path) -> None:
    """The digits model from file to file, search and certificate included."""

    def compiling() -> mscompile.Compilation:
        return mscompile.compile_model(DIGITS, None, tmp_path / "out.onnx", Options(**options), force=True)

    result = benchmark.pedantic(compiling, rounds=3, warmup_rounds=1)
    note(benchmark, seconds_of_last_run=result.report.timings)


def test_interchanges(benchmark) -> None:
    """5000 interchanges at half the units of the digits model."""
    dense = open_dense(DIGITS)
    samples = samples_of(dense, beside(DIGITS, "calib"))
    found = statistics_of(dense, samples)
    scores = scores_of(dense, found, "logit-mse")
    orders = orders_of(dense, found, scores, joint=True)
    candidate = candidate_of(dense, found, scores, orders, 0.5, "affine")
    many = samples.take(np.arange(2 * TRIALS) % len(samples))
    interchange = candidate.interchange(samples)

    def interchanges() -> int:
        return interchange.run(many, law="one-site", swap=0.1, seed=0, delta=0.05).trials

    assert benchmark.pedantic(interchanges, rounds=ROUNDS, warmup_rounds=1) == TRIALS
    note(benchmark, trials_per_s=round(TRIALS / benchmark.stats.stats.median))
