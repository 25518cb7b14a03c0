"""Reverse mode against onnx-ad, an independent implementation for ONNX graphs, on generated networks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from onnx import helper
from test_generated import networks

from mscompile.calibration.reverse import differentiate, sample_shapes
from mscompile.network.scm import infer_shapes
from mscompile.operators.backward import Builder
from mscompile.runtime import Session

onnx_ad = pytest.importorskip("onnx_ad")

EXAMPLES = 60
SAMPLES = 3
FLOAT32 = 1e-4
"""Of the largest entry: both sum in float32, in orders of their own."""
CANCELLED = 1e-2
"""Gradients of this size are taken for it where all are smaller: what normalisations cancel leaves rounding behind."""


def with_source(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its input behind a node, a tensor to differentiate by, and with a fixed number of samples."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    (source,) = found.graph.input
    for value in (source, *found.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = SAMPLES  # onnx-ad takes no convolution without
    source.name = "source"
    nodes = [helper.make_node("Identity", ["source"], ["x"], name="source_node"), *found.graph.node]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(source=networks(), seed=st.integers(0, 2**16))
def test_gradients_of_generated_networks_agree(source: onnx.ModelProto, seed: int) -> None:
    proto, rng = with_source(source), np.random.default_rng(seed)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = {"source": rng.standard_normal(shape).astype(np.float32)}
    outputs = [output.name for output in proto.graph.output]
    vectors = {o: rng.standard_normal(y.shape).astype(np.float32) for o, y in Session(proto).run(x).items()}
    try:
        theirs = onnx_ad.reverse(proto, layout="onnx")
    except Exception as reason:
        event(f"onnx-ad refuses: {type(reason).__name__}")
        return
    expected = Session(theirs, optimise=False).run({**x, **{f"adj_{o}": v[..., None] for o, v in vectors.items()}})
    model = ir.from_proto(proto)
    dense, build = model.clone(), Builder(model.graph, model.graph.opset_imports[""])
    seeds = {}
    for output, vector in vectors.items():
        kind = ir.TensorType(ir.DataType.FLOAT)
        seeds[output] = ir.Value(name=f"v:{output}", shape=ir.Shape(vector.shape), type=kind)
        model.graph.inputs.append(seeds[output])
    shapes = sample_shapes(dense, x)
    found = differentiate(model.graph, build, seeds, ["x"], shapes=shapes, declared=infer_shapes(dense))
    assert not found.refused
    model.graph.outputs.clear()
    if "x" not in found.values:
        event("no output depends on the input")
        assert np.abs(expected.get("adj_source", np.zeros(1))).max() == 0
        return
    gradient = found.values["x"]
    gradient.dtype = ir.DataType.FLOAT
    model.graph.outputs.append(gradient)
    ours = Session(model, optimise=False).run({**x, **{f"v:{o}": v for o, v in vectors.items()}})[gradient.name or ""]
    wanted = expected["adj_source"][..., 0]
    event(f"compared, {len(outputs)} outputs")
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=FLOAT32 * max(float(np.abs(wanted).max()), CANCELLED))
