"""From torch to a clean ONNX file, checked against the network it came from."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule
from torch import nn

from mscompile.errors import VerificationError

OPSET = 20
TOLERANCE = 1e-4


def input_name(model: nn.Module) -> str:
    """Name the input: ``tokens`` where the network says so, else ``x``."""
    return "tokens" if "tokens" in inspect.signature(model.forward).parameters else "x"


def fold(model: nn.Module) -> nn.Module:
    """Return a copy with every batch normalisation folded into the convolution before it."""
    folded = copy.deepcopy(model).eval()
    for chain in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
        for i, (first, second) in enumerate(pairwise(list(chain))):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                chain[i] = nn.utils.fusion.fuse_conv_bn_eval(first, second)
                chain[i + 1] = nn.Identity()
    return folded


def tidy(model: onnx_ir.Model) -> onnx.ModelProto:
    """Remove what the exporter leaves behind: idle nodes, and where on this machine each node came from.

    The exporter's own optimisation is not used: it folds batch normalisation, which some reference models keep.
    """
    optimizer.fold_constants(model, onnx_shape_inference=True)
    rewriter.rewrite(model, [materialize_reshape_shape_rule])
    onnx_ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    proto = onnx_ir.to_proto(model)
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto


def run(file: Path, x: NDArray[Any], batch: int = 500) -> NDArray[np.float32]:
    """Run an ONNX file of one input with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)])


def export(model: nn.Module, x: NDArray[Any], file: Path) -> None:
    """Write a trained network as ONNX and compare the file with it.

    Parameters
    ----------
    model
        The network; its one input has the batch as its first axis.
    x
        Inputs to trace it and to compare on, at least two.
    file
        The ONNX file to write.
    """
    model.eval()
    sample = torch.from_numpy(x)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages it can do without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (sample,),
            input_names=[input_name(model)],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            optimize=False,
            verbose=False,
        )
    proto = tidy(program.model)
    proto.producer_name, proto.producer_version = "mscompile.models", ""
    proto.graph.name = file.stem
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, file)
    with torch.no_grad():
        gap = float(np.abs(run(file, x) - model(sample).numpy()).max())
    if not gap <= TOLERANCE:
        raise VerificationError(
            "the exported file does not compute what the network computes",
            where=str(file),
            why=f"the outputs differ by {gap:.3g}, more than {TOLERANCE:.3g}",
            hint="try other versions of torch, onnxscript and onnxruntime",
        )
