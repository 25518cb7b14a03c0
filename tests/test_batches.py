"""Batches that follow from what the summing graph holds, and sums over maps a block of positions after the other."""

from __future__ import annotations

import golden
import numpy as np
import onnx_ir as ir
import pytest
from test_calibration import assert_close, opened

from mscompile.calibration import batches, blocks
from mscompile.calibration.batches import fitting_batch, held_by
from mscompile.calibration.calibration import calibrate
from mscompile.calibration.footprint import footprint
from mscompile.calibration.instrument import Measure
from mscompile.errors import ResourceError
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, read_scm
from mscompile.runs.run import Run
from mscompile.runs.workers import Crew, Process

ALL = Measure(shared=True, windows=True, outputs={"y": 1.0}, curvature="identity", probes=2, second=True)
STRIDED = """(float[N,2,11,9] x) => (float[N,4,a,b] y)
    <float[5,2,3,3] w1, float[5] b1, float[6,5,3,2] w2, float[6] b2, float[4,6,1,1] w3> {
    a = Conv <pads = [1,1,1,1]> (x, w1, b1)
    h = Relu(a)
    c = Conv <strides = [2,1], dilations = [1,2], pads = [1,0,0,1]> (h, w2, b2)
    g = Sigmoid(c)
    y = Conv(g, w3)
}"""


def strided(count: int) -> tuple[Scm, Samples]:
    x = np.random.default_rng(2).standard_normal((count, 2, 11, 9)).astype(np.float32) + 0.5
    return read_scm(golden.model(STRIDED)), Samples({"x": x}, None, "test")


@pytest.mark.parametrize("block", [1, 3000, 20_000])
@pytest.mark.parametrize("name", ["cnn", "tokens", "pooled", "strided"])
def test_sums_over_blocks_are_those_over_whole_maps(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scm, samples = strided(45) if name == "strided" else opened(name)
    monkeypatch.setattr("mscompile.calibration.windows.ROWS_PER_FEATURE", 1)  # windows are thinned
    whole = calibrate(scm, scm.sites, samples, batch_size=8, measure=ALL)
    monkeypatch.setattr(blocks, "WHOLE_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    found = calibrate(scm, scm.sites, samples, batch_size=8, measure=ALL)
    assert whole.windows.keys() == found.windows.keys()
    for tensor, moments in whole.moments.items():
        assert_close(found.moments[tensor].scatter, moments.scatter)
        assert_close(found.curvature[tensor].second, whole.curvature[tensor].second)
        if moments.shared is not None:
            assert_close(found.moments[tensor].shared, moments.shared)
    for reader, seen in whole.windows.items():
        assert found.windows[reader].count == seen.count
        assert_close(found.windows[reader].products, seen.products)
        assert seen.shared is not None
        assert_close(found.windows[reader].shared, seen.shared)


def test_a_footprint_is_what_is_held_at_once() -> None:
    """Of a chain two tensors at a time; of one that is read again in the end, that one as well; of a view nothing."""
    model = golden.model("""(float[N,10] x) => (float[N,1] y) {
        a = Exp(x)
        b = Exp(a)
        c = Exp(b)
        d = Identity(c)
        e = Add(a, d)
        y = ReduceMax<axes = [1]>(e)
    }""")
    sizes = dict.fromkeys("abcde", 10) | {"y": 1}
    assert footprint(model.graph, sizes.__getitem__) == 30  # a, b and c; a, c and e


def test_a_size_of_minus_one_is_free() -> None:
    """As some exporters write it."""
    model, (known, samples) = golden.model(STRIDED), strided(45)
    model.graph.inputs[0].shape = ir.Shape([-1, 2, 11, 9])
    scm = read_scm(model)
    found, wanted = (held_by(one, one.sites, samples, ALL, 8, closely=True) for one in (scm, known))
    assert found == wanted


def test_a_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    scm, samples = opened("cnn", 40)
    assert fitting_batch(scm, scm.sites, samples, ALL, None) == 64
    assert fitting_batch(scm, scm.sites, samples, ALL, 50) == 50
    monkeypatch.setattr(batches, "SMALL_BYTES", 0)
    held = {size: held_by(scm, scm.sites, samples, ALL, size) for size in (1, 5, 10, 40)}
    assert held[1] < held[5] < held[10] < held[40] <= 40 * held[1]
    monkeypatch.setattr(batches, "ROOM_BYTES", held[10])
    assert fitting_batch(scm, scm.sites, samples, ALL, None) == 10
    assert fitting_batch(scm, scm.sites, samples, ALL, 7) == 7
    with pytest.raises(ResourceError, match="batches of 20") as refusal:
        fitting_batch(scm, scm.sites, samples, ALL, 20)
    assert "--batch-size 10" in refusal.value.hint
    monkeypatch.setattr(batches, "ROOM_BYTES", held[1] - 1)
    with pytest.raises(ResourceError, match="one sample at a time"):
        fitting_batch(scm, scm.sites, samples, ALL, None)


def test_workers_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    scm, samples = opened("cnn", 40)
    monkeypatch.setattr(batches, "SMALL_BYTES", 0)
    held = held_by(scm, scm.sites, samples, ALL, 40)
    monkeypatch.setattr(batches, "free_memory", lambda: int(held / batches.SHARE) + 1)
    found = [
        fitting_batch(scm, scm.sites, samples, ALL, None, Run(crew=Crew(4, Process, elsewhere=elsewhere)))
        for elsewhere in (True, False)
    ]
    assert found == [64, 10]


def test_a_memory_limit_decides_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    scm, samples = opened("cnn", 40)
    monkeypatch.setattr("mscompile.calibration.room.PROGRAM_BYTES", 0)
    with pytest.raises(ResourceError, match="the memory limit is too low"):
        fitting_batch(scm, scm.sites, samples, ALL, None, Run(memory=20_000))
    limits = (400_000, 800_000, 1_600_000, 100_000_000)
    found = [fitting_batch(scm, scm.sites, samples, ALL, None, Run(memory=limit)) for limit in limits]
    assert found == sorted(found)
    assert found[0] < found[1] < 40
    assert found[-1] == 64


def test_nothing_is_kept_for_later_where_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are the same either way, to the last bit."""
    scm, samples = opened("pooled")
    usual = calibrate(scm, scm.sites, samples, batch_size=8, measure=ALL)
    monkeypatch.setattr("mscompile.calibration.calibration.SMALL_BYTES", 0)
    lean = calibrate(scm, scm.sites, samples, batch_size=8, measure=ALL)
    for tensor, moments in usual.moments.items():
        assert moments.scatter is not None
        np.testing.assert_array_equal(moments.scatter, lean.moments[tensor].scatter)
        np.testing.assert_array_equal(usual.curvature[tensor].s22, lean.curvature[tensor].s22)
