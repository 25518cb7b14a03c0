"""What is made site by site of a large model lies in files without names. Here small models go the same way."""

from __future__ import annotations

import errno
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import mlp, samples
from test_calibration import GRAPHS, SHAPES

from mscompile import Options, compile_model
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.errors import ResourceError
from mscompile.intake import data, shelf
from mscompile.network.dense import open_dense
from mscompile.planning.plan import make_plan, resolve_keep
from mscompile.planning.scores import score
from mscompile.planning.selection import eliminate_by_score
from mscompile.rewrite import rewrite
from tests import golden

KIND = ["float32", "float64", "int64", "bool", "float16"]


@pytest.fixture
def all_aside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every array of some bytes is put aside; gives how many bytes each had."""
    found: list[int] = []
    put = shelf.Shelf.put

    def counted(self: shelf.Shelf, array: Any) -> Any:
        found.append(array.nbytes)
        return put(self, array)

    monkeypatch.setattr(shelf, "LARGE", 0)
    monkeypatch.setattr(shelf, "LEAST", 64)
    monkeypatch.setattr(shelf.Shelf, "put", counted)
    return found


def test_arrays_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shelf, "LEAST", 100)
    monkeypatch.setattr(shelf, "CHUNK", 3 * 4096)
    rng, board = np.random.default_rng(0), shelf.Shelf(tmp_path)
    given = [(8 * rng.random((17, 5 * n))).astype(kind).T for n in range(1, 9) for kind in KIND]
    found = [board.put(array) for array in given]
    assert list(tmp_path.iterdir()) == []
    del board
    for a, b in zip(given, found, strict=True):
        assert (b is a) == (a.nbytes < 100)
        assert b is a or not b.flags.writeable
        assert b.dtype == a.dtype
        np.testing.assert_array_equal(b, a)


def test_little_is_not_put_aside(tmp_path: Path):
    array = np.zeros(shelf.LEAST)
    assert shelf.shelf_for(shelf.LARGE, tmp_path).put(array) is array
    assert shelf.shelf_for(shelf.LARGE + 1, tmp_path).put(array) is not array


@pytest.mark.parametrize("replacement", ["affine", "constant"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_same_bytes_come_out(name: str, replacement: str, tmp_path: Path, request: pytest.FixtureRequest):
    options = Options(keep=0.5, replacement=replacement, batch_size=16)
    model, inputs = golden.model(GRAPHS[name]), np.random.default_rng(0).normal(size=(96, *SHAPES[name])).astype(np.float32)
    plain = compile_model(model, {"x": inputs}, tmp_path / "plain.onnx", options)
    aside = request.getfixturevalue("all_aside")
    again = compile_model(model, {"x": inputs}, tmp_path / "again.onnx", options)
    assert sum(aside) > 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert again.plan.to_json() == plain.plan.to_json()
    for a, b in zip(again.report.sites, plain.report.sites, strict=True):
        assert a.measured_risk == pytest.approx(b.measured_risk, rel=1e-4)


def test_a_full_disk(all_aside: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_file = tempfile.TemporaryFile

    def full(*arguments: Any, **options: Any) -> Any:
        file = open_file(*arguments, **options)

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, _: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ResourceError, match="put aside") as refusal:
        compile_model(mlp(), {"x": samples(64)}, tmp_path / "out.onnx", Options(keep=0.5))
    assert refusal.value.exit_code == 8
    assert "No space left" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


WIDTH, SMALL = 256, 6
"""Of hidden layers, and of what is beside them."""


def held(layers: int) -> tuple[int, int]:
    """Bytes of Python's, numpy's included: the most while statistics are made, and those that new weights leave behind."""
    model = open_dense(mlp((SMALL, *[WIDTH] * layers, SMALL)))
    inputs = data.read({"x": samples(64)}, model.specs)
    measure = Measure(covariance=True, second=True, outputs={model.output: 1.0}, curvature="identity", probes=1)
    memory = 3 * 24 * WIDTH**2
    tracemalloc.start()
    found = calibrate(model.scm, model.sites, inputs, batch_size=16, measure=measure, memory=memory)
    most = tracemalloc.get_traced_memory()[1]
    scores = score(model.scm, model.sites, found, "logit-mse")
    orders = {group: eliminate_by_score(sites, scores).order for group, sites in model.groups.items()}
    counts = resolve_keep(model.scm, model.groups, 0.5)
    plan = make_plan(
        model.scm, found, scores, model.groups, orders, counts, model_sha256="", replacement="constant", swap=0.0
    )
    before = tracemalloc.get_traced_memory()[0]
    compiled = rewrite(model.model, plan)
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(compiled.alignment) == layers
    return most, left


def test_memory_does_not_grow_with_the_number_of_sites(all_aside: list[int]):
    few, many = held(2), held(8)
    one = 8 * WIDTH**2  # a matrix of statistics; new weights are of a quarter of that
    assert many[0] - few[0] < 4 * one  # there would be two of each of six more sites
    assert many[1] - few[1] < one
    assert sum(all_aside) > 10 * 2 * one
