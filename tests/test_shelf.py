"""What is made site by site of a large model lies in files without names. Here small models go the same way."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from small_models import mlp, samples
from test_calibration import FLOAT32, GRAPHS, SHAPES, opened

from mscompile import Options, compile_model
from mscompile.calibration import recording
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.recording import cut, recordable
from mscompile.calibration.survey import survey
from mscompile.errors import ResourceError
from mscompile.intake import data
from mscompile.intake.mapped import place_of
from mscompile.network.dense import open_dense
from mscompile.planning.plan import resolve_keep
from mscompile.planning.planner import Planner
from mscompile.planning.scores import score
from mscompile.planning.selection import eliminate_by_score
from mscompile.rewrite import rewrite
from mscompile.runs import limits, shelf

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
    del board
    for a, b in zip(given, found, strict=True):
        assert (b is a) == (a.nbytes < 100)
        assert b is a or not b.flags.writeable
        assert b.dtype == a.dtype
        np.testing.assert_array_equal(b, a)
        place = place_of(b)
        assert (place is None) == (b is a)
        assert place is None or np.array_equal(np.fromfile(place.path, b.dtype, b.size, offset=place.offset), b.ravel())
    del found, b
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_is_put_aside_is_not_memory_in_use(tmp_path: Path):
    size = 1 << 26
    before = limits._resident()
    held = shelf.Shelf(tmp_path).put(np.ones(size // 8))
    assert held.sum() == size // 8
    assert limits._resident() - before < size // 4


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
    def full(table: shelf.Table, *_: Any) -> None:
        with table._writing():
            raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "aside"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(shelf.Table, "write", full)
    with pytest.raises(ResourceError, match="put aside") as refusal:
        compile_model(mlp(), {"x": samples(64)}, tmp_path / "out.onnx", Options(keep=0.5))
    assert refusal.value.exit_code == 8
    assert "No space left" in str(refusal.value)
    refusal.value.__traceback__ = None
    del refusal
    gc.collect()
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


KILLED = """
import os, sys
import numpy as np
from pathlib import Path
from mscompile.runs.shelf import Shelf
held = Shelf(Path(sys.argv[1])).put(np.ones(1 << 18))
print(len(os.listdir(sys.argv[1])), flush=True)
if len(sys.argv) > 2:
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path):
    def run(*more: str) -> int:
        command = [sys.executable, "-c", KILLED, str(tmp_path), *more]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return int(found.stdout)

    assert run() == 1
    assert list(tmp_path.iterdir()) == []
    assert run("killed") == 1
    assert len(list(tmp_path.iterdir())) == 1
    held = shelf.Shelf(tmp_path).put(np.ones(1 << 18))
    assert len(list(tmp_path.iterdir())) == 1
    assert run() == 2  # what another process holds stays
    assert held.sum() == 1 << 18
    del held
    gc.collect()
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
    plan = Planner(model.scm, found, scores, model.groups, orders, "constant", 0.0).plan(counts, "")
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    compiled = rewrite(model.model, plan)
    gc.collect()
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


def test_sites_are_recorded_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch):
    model = open_dense(mlp((SMALL, *[8] * 5, SMALL)))
    inputs = data.read({"x": samples(40)}, model.specs)
    measure = Measure(covariance=True, outputs={model.output: 1.0}, curvature="identity", probes=2, second=True)
    first = survey(model.scm, model.sites, next(inputs.batches(16)), 16, [model.output])
    sizes = recordable(model.scm, model.sites, inputs, first, measure)
    each = 4 * (1 + 2) * 8  # activations, and gradients for two seeds
    assert sizes == {site.tensor: each for site in model.sites}
    groups = [[site] for site in model.sites]
    assert cut(groups, sizes, 40, 16) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(recording, "MOST", 2 * 40 * each)
    assert cut(groups, sizes, 40, 16) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(recording, "MOST_PER_BATCH", 3 * 16 * each)
    monkeypatch.setattr(recording, "MOST", 1 << 30)
    assert cut(groups, sizes, 40, 16) == [[0, 1, 2], [3, 4]]
    assert cut(groups, {**sizes, "h1": 1 << 30}, 40, 16) == [[0], [2, 3, 4]]
    assert cut(groups, {tensor: size for tensor, size in sizes.items() if tensor != "h2"}, 40, 16) == [[0, 1], [3, 4]]


@pytest.mark.parametrize("most", [1 << 30, 700])
@pytest.mark.parametrize("options", [{"windows": True, "shared": True}, {"gradient": True, "curvature": "fisher"}])
@pytest.mark.parametrize("name", GRAPHS)
def test_recorded_sites_give_the_same_sums(name: str, options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch):
    scm, inputs = opened(name)
    measure = Measure(**{"outputs": {"y": 1.0}, "curvature": "identity", "probes": 3, "second": True, **options})
    whole = calibrate(scm, scm.sites, inputs, batch_size=16, measure=measure)
    runs: list[int] = []
    made = recording.there_and_back
    monkeypatch.setattr(recording, "there_and_back", lambda *given: (runs.append(1), made(*given))[1])
    monkeypatch.setattr(recording, "MOST_PER_BATCH", most * 16)
    apart = calibrate(scm, scm.sites, inputs, batch_size=16, measure=measure, memory=1000)
    assert len(runs) == 1 or most == 700  # as much as there is room for, or none of it
    for tensor in whole.moments:
        for quantity in ("count", "mean", "squares", "scatter", "shared", "low", "high"):
            assert_near(getattr(apart.moments[tensor], quantity), getattr(whole.moments[tensor], quantity))
        for quantity in ("samples", "s11", "s12", "s22", "g1", "g2", "second"):
            assert_near(getattr(apart.curvature[tensor], quantity), getattr(whole.curvature[tensor], quantity))
    for reader, window in whole.windows.items():
        assert_near(apart.windows[reader].products, window.products)


def assert_near(found: Any, wanted: Any) -> None:
    if wanted is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32 * max(float(np.abs(wanted).max()), 1e-30))
