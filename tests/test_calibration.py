"""Calibration against numpy: the sums that leave onnxruntime are those of the activations and gradients themselves."""

from __future__ import annotations

from typing import Any

import golden
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mscompile.calibration.calibration import calibrate
from mscompile.calibration.instrument import Measure
from mscompile.calibration.reverse import differentiate, sample_shapes
from mscompile.calibration.seeds import random_signs
from mscompile.calibration.statistics import Statistics
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, read_scm
from mscompile.operators.backward import Builder
from mscompile.runtime import Session

FLOAT32 = 2e-5
"""Relative to the largest entry: sums of a few thousand float32 products."""

MLP = """(float[N,6] x) => (float[N,5] y) <float[6,8] w1, float[8] b1, float[8,7] w2, float[7] b2, float[7,5] w3> {
    a = Gemm(x, w1, b1)
    h = Relu(a)
    c = Gemm(h, w2, b2)
    g = Tanh(c)
    y = MatMul(g, w3)
}"""
CNN = """(float[N,2,6,5] x) => (float[N,4] y)
    <float[6,2,3,3] w1, float[6] b1, float[5,6,3,3] w2, float[5] b2, float[5,4] w3> {
    a = Conv <pads = [1,1,1,1]> (x, w1, b1)
    h = Relu(a)
    c = Conv <pads = [1,1,1,1]> (h, w2, b2)
    g = Sigmoid(c)
    p = GlobalAveragePool(g)
    f = Flatten(p)
    y = MatMul(f, w3)
}"""
TOKENS = """(float[N,3,6] x) => (float[N,3,4] y) <float[6,8] w1, float[8] b1, float[8,4] w2> {
    a = MatMul(x, w1)
    s = Add(a, b1)
    h = Sigmoid(s)
    y = MatMul(h, w2)
}"""
POOLED = """(float[N,2,6,4] x) => (float[N,3,3,2] y)
    <float[5,2,3,3] w1, float[5] scale, float[5] bias, float[5] mean, float[5] var, float[4,5,3,3] w2, float[4] b2,
     float[3,4,1,1] w3> {
    a = Conv <pads = [1,1,1,1]> (x, w1)
    n = BatchNormalization(a, scale, bias, mean, var)
    h = Relu(n)
    c = Conv <pads = [1,1,1,1]> (h, w2, b2)
    g = Relu(c)
    p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (g)
    y = Conv(p, w3)
}"""
GRAPHS = {"mlp": MLP, "cnn": CNN, "tokens": TOKENS, "pooled": POOLED}
SHAPES = {"mlp": (6,), "cnn": (2, 6, 5), "tokens": (3, 6), "pooled": (2, 6, 4)}


def opened(name: str, count: int = 45) -> tuple[Scm, Samples]:
    model = golden.model(GRAPHS[name])
    x = np.random.default_rng(1).standard_normal((count, *SHAPES[name])).astype(np.float32) + 0.5
    y = Session(model).run({"x": x})["y"]
    return read_scm(model), Samples({"x": x}, y.argmax(axis=-1), "test")


def activations(scm: Scm, samples: Samples) -> dict[str, npt.NDArray[np.float64]]:
    """[samples, positions, channels] of each site."""
    model = scm.model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs.clear()
    for site in scm.sites:
        values[site.tensor].dtype = ir.DataType.FLOAT
        model.graph.outputs.append(values[site.tensor])
    found = Session(model).run(samples.inputs)
    return {site.tensor: channels_last(found[site.tensor], site.axis) for site in scm.sites}


def channels_last(array: npt.NDArray[Any], axis: int) -> npt.NDArray[np.float64]:
    moved = np.moveaxis(array.astype(np.float64), axis, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1])


def slopes(scm: Scm, samples: Samples, seed: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float64]]:
    model = scm.model.clone()
    vector = ir.Value(name="seed", shape=ir.Shape([None] * seed.ndim), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(vector)
    build = Builder(model.graph, model.graph.opset_imports[""])
    tensors = [site.tensor for site in scm.sites]
    found = differentiate(model.graph, build, {"y": vector}, tensors, shapes=sample_shapes(scm.model, samples.inputs))
    model.graph.outputs.clear()
    for value in found.values.values():
        value.dtype = ir.DataType.FLOAT
        model.graph.outputs.append(value)
    result = Session(model).run({**samples.inputs, "seed": seed})
    return {s.tensor: channels_last(result[found.values[s.tensor].name or ""], s.axis) for s in scm.sites}


def assert_close(found: npt.NDArray[Any] | None, wanted: npt.NDArray[Any]) -> None:
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32 * max(float(np.abs(wanted).max()), 1e-3))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("batch", [1, 7, 45, 64])
def test_moments(name: str, batch: int) -> None:
    scm, samples = opened(name)
    found = calibrate(scm, scm.sites, samples, batch_size=batch, measure=Measure(shared=True))
    plain = calibrate(scm, scm.sites, samples, batch_size=batch, measure=Measure(covariance=False))
    for tensor, a in activations(scm, samples).items():
        moments, rows = found.moments[tensor], a.reshape(-1, a.shape[-1])
        centred = rows - rows.mean(axis=0)
        assert moments.count == plain.moments[tensor].count == len(rows)
        assert_close(moments.mean, rows.mean(axis=0))
        assert_close(moments.scatter, centred.T @ centred)
        assert_close(moments.squares, np.square(centred).sum(axis=0))
        assert_close(plain.moments[tensor].squares, np.square(centred).sum(axis=0))
        assert plain.moments[tensor].scatter is None
        for either in (moments, plain.moments[tensor]):
            np.testing.assert_array_equal(either.low, rows.min(axis=0))
            np.testing.assert_array_equal(either.high, rows.max(axis=0))


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_channels_far_from_zero_keep_their_variance(name: str, covariance: bool) -> None:
    """A mean of 500 standard deviations leaves float32 sums of squares nothing of the variance, unless it is taken away."""
    scm, samples = opened(name)
    model = scm.model.clone()
    bias = next(v for v in model.graph.initializers.values() if v.name == "b1")
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(500.0), name="b1")
    scm = read_scm(model)
    measure = Measure(covariance=covariance, outputs={"y": 1.0}, curvature="identity", probes=100)
    found = calibrate(scm, scm.sites, samples, batch_size=7, measure=measure)
    a = activations(scm, samples)["h"]
    rows = a.reshape(-1, a.shape[-1])
    np.testing.assert_allclose(found.moments["h"].variance, rows.var(axis=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["cnn", "tokens"])
def test_what_samples_share_at_a_position(name: str) -> None:
    scm, samples = opened(name, 40)
    found = calibrate(scm, scm.sites, samples, batch_size=40, measure=Measure(shared=True))
    for tensor, a in activations(scm, samples).items():
        if a.shape[1] == 1:
            assert found.moments[tensor].shared is None
            continue
        centred = a - a.mean(axis=(0, 1))
        other = np.roll(centred, -1, axis=0)
        product = np.einsum("npi,npj->ij", centred, other)
        assert_close(found.moments[tensor].shared, 0.5 * (product + product.T))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("probes", [2, 100])
@pytest.mark.parametrize("batch", [16, 45])
def test_curvature(name: str, probes: int, batch: int) -> None:
    scm, samples = opened(name)
    measure = Measure(outputs={"y": 1.0}, curvature="identity", probes=probes, seed=3, second=True)
    found = calibrate(scm, scm.sites, samples, batch_size=batch, measure=measure)
    extent = Session(scm.model).run(samples.inputs)["y"].shape[1:]
    size = int(np.prod(extent))
    if size <= probes:
        seeds, share = [np.tile(v, (45, 1)).reshape(45, *extent) for v in np.eye(size, dtype=np.float32)], 1.0
    else:
        signs = random_signs(3, 0, 45, probes * size).reshape(45, probes, *extent)
        seeds, share = [np.ascontiguousarray(signs[:, k]) for k in range(probes)], 1.0 / probes
    a = activations(scm, samples)
    for tensor in a:
        lam = [slopes(scm, samples, seed)[tensor] for seed in seeds]
        s1 = [value.sum(axis=1) for value in lam]
        s2 = [(value * a[tensor]).sum(axis=1) for value in lam]
        curvature = found.curvature[tensor]
        assert curvature.samples == 45
        assert_close(curvature.s11, share * sum((x * x).sum(axis=0) for x in s1))
        assert_close(curvature.s12, share * sum((x * y).sum(axis=0) for x, y in zip(s1, s2, strict=True)))
        assert_close(curvature.s22, share * sum((y * y).sum(axis=0) for y in s2))
        assert_close(curvature.second, share * sum(np.einsum("npi,npj->ij", x, x) for x in lam))


@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_fisher_curvature_and_the_gradient_of_the_cross_entropy(name: str) -> None:
    """Over all signs, the seeds' second moment is diag p − p pᵀ; g is the softmax less the labels."""
    scm, samples = opened(name, 30)
    measure = Measure(outputs={"y": 1.0}, curvature="fisher", gradient=True, probes=400, second=True)
    found = calibrate(scm, scm.sites, samples, batch_size=30, measure=measure)
    logits = Session(scm.model).run(samples.inputs)["y"].astype(np.float64)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    assert samples.labels is not None
    hot = np.eye(p.shape[-1])[samples.labels]
    a = activations(scm, samples)
    loss = slopes(scm, samples, (p - hot).astype(np.float32))
    for tensor in a:
        assert_close(found.curvature[tensor].g1, loss[tensor].sum(axis=(0, 1)))
        assert_close(found.curvature[tensor].g2, (loss[tensor] * a[tensor]).sum(axis=(0, 1)))
        classes = p.shape[-1]
        if logits.ndim == 2:  # unit seeds r = e_k through diag √p − p √pᵀ, summed
            wanted = np.zeros_like(found.curvature[tensor].s11)
            for k in range(classes):
                v = -p * np.sqrt(p[:, k : k + 1])
                v[:, k] += np.sqrt(p[:, k])
                wanted += np.square(slopes(scm, samples, v.astype(np.float32))[tensor].sum(axis=1)).sum(axis=0)
            assert_close(found.curvature[tensor].s11, wanted)


def test_statistics_of_shards_add_up() -> None:
    scm, samples = opened("cnn", 48)
    measure = Measure(shared=False, windows=True, outputs={"y": 1.0}, curvature="identity", probes=100, second=True)

    def over(part: Samples) -> Statistics:
        return calibrate(scm, scm.sites, part, batch_size=8, measure=measure)

    whole, halves = over(samples), over(samples.take(slice(0, 24))) + over(samples.take(slice(24, 48)))
    assert halves.samples == whole.samples
    for tensor in whole.moments:
        assert_close(halves.moments[tensor].scatter, whole.moments[tensor].covariance * whole.moments[tensor].count)
        assert_close(halves.curvature[tensor].s22, whole.curvature[tensor].s22)
    for reader in whole.windows:
        centred = halves.windows[reader].recentred(whole.windows[reader].centre)
        assert_close(centred.products, whole.windows[reader].products)


@pytest.mark.parametrize("name", ["cnn", "tokens"])
@pytest.mark.parametrize("memory", [1, 24 * 3 * 20, 10_000])
def test_sites_apart_and_in_blocks_of_channels_give_the_same(name: str, memory: int) -> None:
    scm, samples = opened(name)
    measure = Measure(shared=True, windows=True, outputs={"y": 1.0}, curvature="identity", probes=100, second=True)
    whole = calibrate(scm, scm.sites, samples, batch_size=16, measure=measure)
    parts = calibrate(scm, scm.sites, samples, batch_size=16, measure=measure, memory=memory)
    assert list(parts.moments) == list(whole.moments)
    assert parts.windows.keys() == whole.windows.keys()
    for tensor, moments in whole.moments.items():
        found = parts.moments[tensor]
        assert found.count == moments.count
        for quantity in ("mean", "squares", "scatter", "shared", "low", "high"):
            if getattr(moments, quantity) is not None:
                assert_close(getattr(found, quantity), getattr(moments, quantity))
        for quantity in ("s11", "s12", "s22", "second"):
            assert_close(getattr(parts.curvature[tensor], quantity), getattr(whole.curvature[tensor], quantity))


def test_windows_are_what_the_reader_sees() -> None:
    """The second moments of the features give those of the reader's own output."""
    scm, samples = opened("cnn", 32)
    found = calibrate(scm, scm.sites, samples, batch_size=8, measure=Measure(windows=True))
    (name,) = found.windows
    moments = found.windows[name]
    assert (name, moments.count, moments.window.features) == ("c", 32 * 30, 7 * 9)
    weight = golden.array(scm.model, "w2").astype(np.float64)  # [outputs, channels, 3, 3]
    by_tap = weight.reshape(5, 6, 9)
    features = np.concatenate([by_tap.reshape(5, -1), np.einsum("oct,c->ot", by_tap, moments.centre)], axis=1)
    model = scm.model.clone()
    value = next(v for node in model.graph for v in node.outputs if v.name == "c")
    value.dtype = ir.DataType.FLOAT
    model.graph.outputs[:] = [value]
    outputs = channels_last(Session(model).run(samples.inputs)["c"], 1).reshape(-1, 5) - golden.array(scm.model, "b2")
    assert_close(features @ moments.products @ features.T, outputs.T @ outputs)


def test_signs_do_not_depend_on_batches() -> None:
    whole = random_signs(5, 0, 20, 300)
    np.testing.assert_array_equal(whole[7:12], random_signs(5, 7, 5, 300))
    assert set(np.unique(whole)) == {-1.0, 1.0}
    assert abs(float(whole.mean())) < 0.05  # 6000 signs: four standard deviations
