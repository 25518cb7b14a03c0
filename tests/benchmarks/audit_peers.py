"""Audit pairs that mscompile did not make: a reference model against what other tools make of it.

    python -m venv --system-site-packages PEERS && PEERS/bin/pip install onnxsim onnxconverter-common torch-pruning
    PEERS/bin/python tests/benchmarks/audit_peers.py FOLDER/mlp.onnx FOLDER/resnet.onnx

NAME.onnx and NAME.test.npz come from ``python -m mscompile.models train NAME``. Peers: onnxsim (simplified),
onnxconverter-common (float16 inside), onnxruntime's dynamic quantisation (int8 weights and activations), Torch-Pruning (L2
norm, a share of the channels of every layer; no compensation, no fine-tuning). None of them leaves a tau: it is inferred
from the weights.

``alike`` is the least share of a site's variance that the smaller model's units show without intervention; ``set`` and
``fold`` are parts of the logit MSE under the claimed law: what no affine fold of the units kept could avoid, and what this
one adds.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
from candidates import beside, table

from mscompile.audit.pipeline import audit
from mscompile.audit.report import AuditReport
from mscompile.audit.setup import AuditOptions
from mscompile.errors import MscompileError


def peers(model: Path, folder: Path, ratios: tuple[float, ...]) -> Iterator[tuple[str, Path]]:
    """What other tools make of a model."""
    onnxsim = importlib.import_module("onnxsim")
    simplified, equal = onnxsim.simplify(onnx.load(model))
    assert equal
    onnx.save(simplified, folder / "onnxsim.onnx")
    yield "onnxsim", folder / "onnxsim.onnx"
    float16 = importlib.import_module("onnxconverter_common.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(model), keep_io_types=True), folder / "float16.onnx")
    yield "float16", folder / "float16.onnx"
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(model, folder / "int8.onnx", weight_type=quantization.QuantType.QInt8)
    yield "dynamic int8", folder / "int8.onnx"
    for ratio in ratios:
        target = folder / f"pruned{ratio:g}.onnx"
        prune(model, target, ratio)
        yield f"Torch-Pruning, {1 - ratio:.0%} kept", target


def prune(model: Path, target: Path, ratio: float) -> None:
    """Torch-Pruning by L2 norm, on the network that the reference model was exported from."""
    torch, tp = importlib.import_module("torch"), importlib.import_module("torch_pruning")
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.export import export

    net = ARCHITECTURES[model.stem].build().eval()
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(model).graph.initializer}
    state = net.state_dict()
    missing = [name for name in state if name not in stored and "num_batches" not in name]
    assert not missing, missing
    net.load_state_dict({name: stored.get(name, value) for name, value in state.items()})
    with np.load(beside(model, "test")) as data:
        x = data["x"][:4]
    last = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
    pruner = tp.pruner.MagnitudePruner(
        net,
        torch.from_numpy(x),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
    )
    pruner.step()
    export(net, x, target)


def row(name: str, report: AuditReport) -> list[object]:
    """One line of the table."""
    (claim,), blame = report.claims, report.explanation.blame if report.explanation else None
    parts = ["", ""] if blame is None or blame.floor is None else [f"{blame.set:.2g}", f"{blame.fold:.2g}"]
    units = f"{sum(len(s.dense_channels) for s in report.tau)} at {len(report.tau)}"
    alike = min(s.alike for s in report.tau if s.alike is not None)
    accuracy = f"{report.plain.accuracy_compiled:.4f}"
    return [
        name,
        report.tau_origin,
        units,
        f"{alike:.4f}",
        accuracy,
        f"{claim.iia:.4f}",
        claim.trials,
        claim.verdict,
        *parts,
    ]


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--fidelity", default=0.95, show_default=True)
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    type=float,
    default=(0.0625, 0.25, 0.5),
    show_default=True,
    help="Cut by Torch-Pruning.",
)
def main(models: tuple[Path, ...], fidelity: float, ratios: tuple[float, ...]) -> None:
    """Print one table a model."""
    warnings.simplefilter("ignore")
    head = [
        "made by",
        "tau from",
        "units, sites",
        "alike",
        "accuracy",
        "IIA",
        "trials",
        f"IIA ≥ {fidelity:g}",
        "set",
        "fold",
    ]
    for model in models:
        rows: list[list[object]] = []
        with tempfile.TemporaryDirectory() as folder:
            for name, path in peers(model, Path(folder), ratios):
                try:
                    rows.append(
                        row(name, audit(model, path, beside(model, "test"), AuditOptions(fidelity=fidelity, table=0)))
                    )
                except MscompileError as error:
                    rows.append([name, *[""] * 6, error.what, "", ""])
        print(f"\n{model.stem}:\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
