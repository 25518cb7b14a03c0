"""The survey: what one batch tells before a graph is built that sums over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from mscompile.calibration.reverse import sample_shapes
from mscompile.network.scm import Scm, Site
from mscompile.operators import Shape
from mscompile.operators.backward import Builder
from mscompile.runtime import Arrays, Session

NEAR = 64.0
"""Squared mean over variance up to which squares are summed in float32 as they are: that costs a variance log2(64) of its 24
bits, and a subtraction less per element. Elsewhere the mean of a first batch is taken away before."""


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes
    ----------
    samples
        Samples in the batch.
    batch
        Samples in the batches to come.
    shapes
        Of every tensor, for that batch.
    extents
        Shape per sample of each output that is differentiated.
    means
        [channels] by site.
    near
        By site: whether every channel's squared mean is at most `NEAR` times its variance.
    """

    samples: int
    batch: int
    shapes: Mapping[str, Shape]
    extents: Mapping[str, tuple[int, ...]]
    means: Mapping[str, npt.NDArray[np.float32]]
    near: Mapping[str, bool]


def survey(scm: Scm, sites: Sequence[Site], first: Arrays, samples: int, outputs: Iterable[str] = ()) -> Survey:
    """Run the network on one batch of a number of samples."""
    model, outputs = scm.model.clone(), list(outputs)
    graph, build = model.graph, Builder(model.graph, model.graph.opset_imports.get("", 1))
    values = {v.name or "": v for node in graph for v in node.outputs}
    asked = [values[output] for output in outputs]
    for site in sites:
        others = [a for a in range(len(scm.shapes[site.tensor])) if a != site.axis]
        number = build.op("Cast", values[site.tensor], to=int(ir.DataType.FLOAT))
        mean = build.reduce("ReduceMean", number, others)
        apart = build.op("Sub", number, mean)
        for value in (mean, build.reduce("ReduceMean", build.op("Mul", apart, apart), others)):
            flat = build.op("Reshape", value, build.integers([-1]))
            flat.dtype, flat.shape = ir.DataType.FLOAT, ir.Shape([site.size])
            asked.append(flat)
    graph.outputs.clear()
    graph.outputs.extend(asked)
    common.RemoveUnusedNodesPass()(model)
    found = list(Session(model, optimise=False).run(first).values())
    extents = {output: found.pop(0).shape[1:] for output in outputs}
    means = {site.tensor: mean for site, mean in zip(sites, found[::2], strict=True)}
    near = {site.tensor: bool(np.all(m**2 <= NEAR * v)) for site, m, v in zip(sites, found[::2], found[1::2], strict=True)}
    return Survey(samples, samples, sample_shapes(scm.model, first), extents, means, near)
