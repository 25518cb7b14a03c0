"""Onnx's own node models, every operator in every form: each is cut, passed through, or refused in clean words.

    python tests/benchmarks/backend_models.py [--every 1] [--match REGEX]

Each model is read as it is, and once more in the middle of a network: its operands but the first of floating point become
parameters, that one's channels (axis 1) begin at a matrix product, and its outputs are flattened and read by another. What
can be cut is cut at random, by constants and by affine maps, and compared with the dense graph under the same replacements.
The table counts models by outcome; refusals come with their exit code.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import plan_for

import mscompile
from mscompile.errors import MscompileError
from mscompile.intake.samples import Samples
from mscompile.network.dense import open_dense
from mscompile.rewrite import rewrite
from mscompile.verification.verify import FOLD_TOLERANCE, fold_error, make_pair

FEATURES = 4
KEEP = 0.6
REFUSALS = (3, 6, 7)
"""Exit codes of a model that is malformed, cannot be cut, or holds what is not supported."""
KINDS = ("constant", "affine")
Arrays = Mapping[str, np.ndarray[Any, Any]]


def node_models() -> list[tuple[str, onnx.ModelProto, Arrays]]:
    """Name, model and inputs of every case; quiet about how onnx makes its expected outputs."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = []
    for case in cases:
        feed = case.data_sets[0][0] if case.data_sets else ()
        arrays = {v.name: a for v, a in zip(case.model.graph.input, feed, strict=False) if isinstance(a, np.ndarray)}
        found.append((case.name, case.model, arrays))
    return found


def inside(model: onnx.ModelProto, feed: Arrays) -> tuple[onnx.ModelProto, Arrays] | None:
    """The model in the middle of a network; None where it takes no floating-point tensor with channels, or makes none."""
    graph = model.graph
    live = next((v for v in graph.input if v.name in feed and _maps(feed[v.name])), None)
    others = [v for v in graph.input if live is not None and v.name != live.name]
    if live is None or any(v.name not in feed or feed[v.name].dtype.kind not in "fiub" for v in others):
        return None
    array, rng = feed[live.name], np.random.default_rng(0)
    order = [a for a in range(array.ndim) if a != 1] + [1]
    shape = [array.shape[a] for a in order[:-1]] + [FEATURES]
    first = rng.standard_normal((FEATURES, array.shape[1])).astype(np.float32)
    around = onnx.ModelProto()
    around.CopyFrom(model)
    del around.graph.input[:], around.graph.output[:]
    around.graph.input.append(helper.make_tensor_value_info("mscompile.x", onnx.TensorProto.FLOAT, shape))
    around.graph.initializer.extend(numpy_helper.from_array(feed[v.name], v.name) for v in others)
    around.graph.initializer.append(numpy_helper.from_array(first, "mscompile.first"))
    begin = [
        helper.make_node("MatMul", ["mscompile.x", "mscompile.first"], ["mscompile.made"]),
        helper.make_node("Transpose", ["mscompile.made"], [live.name], perm=np.argsort(order).tolist()),
    ]
    nodes = [*begin, *around.graph.node]
    for i, value in enumerate(graph.output):
        tensor = value.type.tensor_type
        sizes = [d.dim_value for d in tensor.shape.dim]
        if tensor.elem_type != onnx.TensorProto.FLOAT or len(sizes) < 2 or not all(sizes):
            around.graph.output.append(value)
            continue
        last = rng.standard_normal((int(np.prod(sizes[1:])), 3)).astype(np.float32)
        around.graph.initializer.append(numpy_helper.from_array(last, f"mscompile.last.{i}"))
        nodes.append(helper.make_node("Flatten", [value.name], [f"mscompile.flat.{i}"]))
        nodes.append(helper.make_node("MatMul", [f"mscompile.flat.{i}", f"mscompile.last.{i}"], [f"mscompile.y.{i}"]))
        around.graph.output.append(helper.make_tensor_value_info(f"mscompile.y.{i}", onnx.TensorProto.FLOAT, [sizes[0], 3]))
    del around.graph.node[:]
    around.graph.node.extend(nodes)
    return around, {"mscompile.x": rng.standard_normal(shape).astype(np.float32)}


def _maps(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype == np.float32 and array.ndim > 1 and array.shape[1] > 1 and array.size > 0


def outcome(model: onnx.ModelProto, feed: Arrays) -> str:
    """What becomes of a model: cut, passed through, or why it is refused; whatever else is raised is a bug."""
    try:
        mscompile.inspect(model)
        source = open_dense(model)
        if not source.groups:
            mscompile.compile_model(model)
            return "passed through"
        for kind in KINDS:
            plan = plan_for(source.model, kind, np.random.default_rng(0), lambda size: max(1, round(KEEP * size)))
            compiled = rewrite(source.model, plan)
            onnx.checker.check_model(ir.to_proto(compiled.model))
            pair = make_pair(source.scm, compiled.model, plan, compiled.alignment)
            count = len(next(iter(feed.values())))
            error = fold_error(pair, plan, Samples(dict(feed), None, "generated"), count)
            assert error <= FOLD_TOLERANCE
    except MscompileError as error:
        if error.exit_code not in REFUSALS:
            raise
        return f"refused with exit code {error.exit_code}: {error.what}"
    return "cut" if compiled.alignment else "nothing cut"


def outcomes(every: int = 1, match: str = "") -> Iterator[tuple[str, str]]:
    """Name and outcome of every so many models that match, as they are and in the middle of a network."""
    chosen = [case for case in node_models() if re.search(match, case[0])]
    for name, model, feed in chosen[::every]:
        yield name, outcome(model, feed)
        network = inside(model, feed)
        if network is not None:
            yield f"{name}, in a network", outcome(*network)


@click.command()
@click.option("--every", default=1, help="Take every so many models.")
@click.option("--match", default="", help="Only those whose names match this regular expression.")
def main(every: int, match: str) -> None:
    """Print how many models come out how."""
    plain, network = Counter[str](), Counter[str]()
    for name, found in outcomes(every, match):
        (network if name.endswith("network") else plain)[found] += 1
    for title, counts in (("as they are", plain), ("in a network", network)):
        print(f"{title}: {counts.total()}")
        for found, count in counts.most_common():
            print(f"{count:6}  {found}")


if __name__ == "__main__":
    main()
