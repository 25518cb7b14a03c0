"""What the weights alone prove: planted dead, constant and duplicate units are found, removed exactly, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from golden import inputs, model, run, shapes

from mscompile.network.scm import read_scm
from mscompile.planning.plan import selectable
from mscompile.planning.weights import exact_plan
from mscompile.rewrite import rewrite

ROUNDING = 1e-5
"""Largest difference over the largest output: the same float32 products summed in another order."""

Weights = dict[str, np.ndarray]

PERCEPTRON = """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] b1, float[8,3] w2, float[3] b2> {
    a = Gemm(x, w1, b1)
    h = Relu(a)
    y = Gemm(h, w2, b2)
}"""
PADDED = """(float[N,3,6,6] x) => (float[N,4,6,6] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    h = Relu(a)
    y = Conv<pads=[1,1,1,1]>(h, w2)
}"""
NORMALISED = """(float[N,3,6,6] x) => (float[N,4,4,4] y)
<float[8,3,1,1] w1, float[8] g, float[8] b1, float[8] m, float[8] var, float[4,8,3,3] w2> {
    a = Conv(x, w1)
    n = BatchNormalization(a, g, b1, m, var)
    h = Relu(n)
    y = Conv(h, w2)
}"""
RESIDUAL = """(float[N,4] x) => (float[N,3] y, float[N,3] z)
<float[4,8] w1, float[8,6] w2, float[6,8] w3, float[8,3] w4, float[8,3] w5> {
    r = MatMul(x, w1)
    i = MatMul(r, w2)
    k = Relu(i)
    j = MatMul(k, w3)
    s = Add(r, j)
    y = MatMul(s, w4)
    t = Tanh(s)
    z = MatMul(t, w5)
}"""
NARROW_INPUT = PERCEPTRON.replace("[N,4]", "[N,1]").replace("[4,8]", "[1,8]")
SCALED = PERCEPTRON.replace("Gemm(x", "Gemm<alpha=0.5, beta=3.0>(x")
ONE_BIAS = PERCEPTRON.replace("float[8] b1", "float[] b1")
NO_BIAS = PERCEPTRON.replace("float[8] b1, ", "").replace(", b1", "")
STRETCHED = """(float[N,1] x) => (float[N,3] y) <float[8] s, float[8,3] w2> {
    a = Mul(x, s)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
SUMMED = """(float[N,3,L] x) => (float[N,3] y) <float[8,3,1] w1, float[8] b1, float[8,3] w2, int64[1] axes = {2}> {
    a = Conv(x, w1, b1)
    s = ReduceSum<keepdims=0>(a, axes)
    h = Relu(s)
    y = MatMul(h, w2)
}"""


def unread(*units: int, axis: int = 0, weights: str = "w2") -> Callable[[Weights], None]:
    def plant(w: Weights) -> None:
        for name in weights.split():
            np.moveaxis(w[name], axis, 0)[list(units)] = 0

    return plant


def constant(*units: int, axis: int = 1, bias: float | None = 0.7, weight: str = "w1") -> Callable[[Weights], None]:
    def plant(w: Weights) -> None:
        np.moveaxis(w[weight], axis, 0)[list(units)] = 0
        if bias is not None:
            w["b1"][list(units)] = bias

    return plant


def copied(unit: int, *onto: int, axis: int = 1, names: str = "w1 b1") -> Callable[[Weights], None]:
    def plant(w: Weights) -> None:
        for name in names.split():
            array = np.moveaxis(w[name], axis if w[name].ndim > 1 else 0, 0)
            array[list(onto)] = array[unit]

    return plant


def nudged(name: str, unit: int) -> Callable[[Weights], None]:
    """The smallest change of one number."""

    def plant(w: Weights) -> None:
        w[name].reshape(-1)[unit] = np.nextafter(w[name].reshape(-1)[unit], np.float32(np.inf))

    return plant


@dataclass(frozen=True)
class Case:
    """A graph, what is planted, the channels that must be found by site, and how many of them stay to carry constants."""

    text: str
    plant: tuple[Callable[[Weights], None], ...]
    found: dict[str, list[int]]
    carriers: int = 0


CASES = {
    "nothing": Case(PERCEPTRON, (), {}),
    "unread": Case(PERCEPTRON, (unread(1, 6),), {"h": [1, 6]}),
    "constant": Case(PERCEPTRON, (constant(2), constant(5, bias=-0.7)), {"h": [2, 5]}),
    "constant without a bias": Case(NO_BIAS, (constant(2, bias=None),), {"h": [2]}),
    "constant under alpha and beta": Case(SCALED, (constant(2),), {"h": [2]}),
    "constant up to one bias for all": Case(ONE_BIAS, (constant(2, bias=None),), {}),
    "duplicate": Case(PERCEPTRON, (copied(2, 4, 7), copied(0, 3)), {"h": [3, 4, 7]}),
    "duplicate but for its weights": Case(PERCEPTRON, (copied(2, 4, names="b1"),), {}),
    "all three": Case(PERCEPTRON, (unread(1), constant(2), copied(3, 6)), {"h": [1, 2, 6]}),
    "all unread": Case(PERCEPTRON, (unread(*range(8)),), {"h": [1, 2, 3, 4, 5, 6, 7]}),
    "hardly read": Case(PERCEPTRON, (unread(1), nudged("w2", 3)), {}),
    "hardly constant": Case(PERCEPTRON, (constant(2), nudged("w1", 2)), {}),
    "hardly duplicate": Case(PERCEPTRON, (copied(2, 4), nudged("b1", 4)), {}),
    "one input is one weight a unit, which is no bias": Case(NARROW_INPUT, (), {}),
    "one input, constant": Case(NARROW_INPUT, (constant(2),), {"h": [2]}),
    "a factor is no bias": Case(STRETCHED, (), {}),
    "a factor, duplicate": Case(STRETCHED, (copied(2, 4, names="s"),), {"h": [4]}),
    "constant, summed over positions of any number": Case(SUMMED, (constant(2, axis=0),), {}),
    "unread at a border": Case(PADDED, (unread(1, 6, axis=1),), {"h": [1, 6]}),
    "duplicate at a border": Case(PADDED, (copied(2, 4, axis=0),), {"h": [4]}),
    "constants at a border": Case(PADDED, (constant(2, 5, axis=0), constant(6, axis=0, bias=0.1)), {"h": [2, 5, 6]}, 1),
    "one constant at a border would have to carry itself": Case(PADDED, (constant(2, axis=0),), {}),
    "one constant of zero at a border": Case(PADDED, (constant(2, axis=0, bias=-0.7),), {"h": [2]}),
    "constant and unread at a border": Case(PADDED, (constant(2, axis=0), unread(4, axis=1)), {"h": [2, 4]}, 1),
    "constant in front of a normalisation": Case(NORMALISED, (constant(2, axis=0, bias=None),), {"h": [2]}),
    "duplicate in front of a normalisation that differs": Case(NORMALISED, (copied(2, 4, axis=0, names="w1"),), {}),
    "duplicate with its normalisation": Case(NORMALISED, (copied(2, 4, axis=0, names="w1 g b1 m var"),), {"h": [4]}),
    "unread inside a residual block": Case(RESIDUAL, (unread(1, weights="w3"),), {"k": [1]}),
    "unread by some of the readers": Case(RESIDUAL, (unread(1, weights="w4 w5"),), {}),
    "unread by all readers": Case(RESIDUAL, (unread(1, weights="w2 w4 w5"),), {"r": [1], "s": [1], "t": [1]}),
    "duplicate in one of two producers": Case(RESIDUAL, (copied(2, 4, names="w1"),), {}),
    "duplicate in both producers": Case(RESIDUAL, (copied(2, 4, names="w1 w3"),), {"r": [4], "s": [4], "t": [4]}),
}


@pytest.mark.parametrize("case", CASES)
def test_planted_units_are_found_and_removed_exactly(case: str):
    planted = CASES[case]
    dense = model(planted.text)
    weights = {name: value.const_value.numpy().copy() for name, value in dense.graph.initializers.items()}
    for plant in planted.plant:
        plant(weights)
    for name, array in weights.items():
        dense.graph.initializers[name].const_value = ir.tensor(array, name=name)

    scm = read_scm(dense)
    plan = exact_plan(scm, selectable(scm), model_sha256="")
    assert {site.tensor: site.replaced.tolist() for site in plan.sites} == planted.found

    compiled = rewrite(dense, plan)
    for site in plan.sites:
        assert len(compiled.alignment[site.tensor]) == len(site.kept) + planted.carriers
    feed = inputs(dense, samples=5)
    wanted, found = run(dense, feed), run(compiled.model, feed)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=ROUNDING * np.abs(array).max())
    if not planted.found:
        assert shapes(compiled.model) == shapes(dense)
