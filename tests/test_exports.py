"""Networks as exporters and onnxruntime's optimiser write them; ``tests/benchmarks/exports.py`` takes more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnx
import pytest

import mscompile
from mscompile.network.dense import open_dense
from mscompile.network.inspection import Inspection, inspect_scm
from mscompile.network.layout import Layout
from mscompile.passes import CANONICALISE
from mscompile.report import Report
from mscompile.verification.verify import FOLD_TOLERANCE

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from exports import HEADS, WIDTH, exported, made_up, optimised  # noqa: E402
from networks import NETWORKS  # noqa: E402

OPSET = 14
"""What onnxruntime's optimiser knows the patterns of; what torch.onnx wrote before it had dynamo."""
WRITTEN = {"Attention", "EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"}


def written(name: str, folder: Path, *, dynamo: bool = False, opset: int = OPSET) -> Path:
    """One of the networks as TorchScript's exporter, or dynamo, writes it."""
    build, make = NETWORKS[name]
    torch.manual_seed(0)
    exported(build().eval(), make(), folder / "model.onnx", dynamo=dynamo, opset=opset)
    return folder / "model.onnx"


def compiled(name: str, file: Path) -> Report:
    """Half of every site kept."""
    options = mscompile.Options(keep=0.5, probes=1, recalibrate=False)
    return mscompile.compile_model(file, made_up(NETWORKS[name][1]()), None, options).report


def cuttable(inspection: Inspection) -> int:
    return sum(reason is None for reason in inspection.left_alone.values())


@pytest.mark.parametrize(
    ("name", "reachable"),
    [("class token, no norm", 0.97), ("rotary, normalised heads", 0.95)],
)
def test_exports_are_cut(name: str, reachable: float, tmp_path: Path) -> None:
    file = written(name, tmp_path)
    dense = open_dense(file)
    assert inspect_scm(dense.scm).reachable >= reachable
    assert not CANONICALISE(dense.model).modified
    report = compiled(name, file)
    assert report.fold_error <= FOLD_TOLERANCE
    assert report.sizes.compiled.params < 0.75 * report.sizes.dense.params


@pytest.mark.parametrize(
    ("name", "dynamo"), [("nn.TransformerEncoder", True), ("nn.TransformerEncoder, positions first", False)]
)
def test_layers_that_put_positions_first_are_cut(name: str, dynamo: bool, tmp_path: Path) -> None:
    """Torch's attention does, whatever it is given; a file holds every tensor that an audit sets."""
    file = written(name, tmp_path, dynamo=dynamo, opset=20 if dynamo else 17)
    dense = open_dense(file)
    assert len(dense.sites) == cuttable(inspect_scm(dense.scm)) == 6
    assert {site.layout for site in dense.sites} >= {Layout(1, 1, 1), Layout(0, 10, 1)}
    computed = {name for node in onnx.load(file).graph.node for name in node.output}
    assert computed.issuperset(site.tensor for site in dense.sites)
    assert compiled(name, file).fold_error <= FOLD_TOLERANCE


def test_what_onnxruntime_optimises_is_cut_as_before(tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime.transformers") is None:
        pytest.skip("onnxruntime comes without its optimiser for transformers")
    plain = written("BERT", tmp_path)
    file = optimised(plain, HEADS, WIDTH)
    assert {node.op_type for node in onnx.load(file).graph.node} >= WRITTEN
    before, after = (inspect_scm(open_dense(path).scm) for path in (plain, file))
    assert cuttable(after) == cuttable(before) == 6
    left = {entry.operator for entry in after.coverage if entry.status == "left alone"}
    assert left == {"EmbedLayerNormalization", "Gemm"}  # tables that are normalised, and the outputs' weight
    report = compiled("BERT", file)
    assert report.fold_error <= FOLD_TOLERANCE
    assert report.sizes.compiled.params < 0.75 * report.sizes.dense.params
