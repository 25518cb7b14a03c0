"""Audit pairs that mscompile did not make: a reference model against what other tools make of it.

    python -m venv --system-site-packages PEERS && PEERS/bin/pip install onnxsim onnxconverter-common torch-pruning
    PEERS/bin/python tests/benchmarks/audit_peers.py FOLDER/mlp.onnx FOLDER/resnet.onnx

NAME.onnx and NAME.test.npz come from ``python -m mscompile.models train NAME``. Peers: onnxsim (simplified),
onnxconverter-common (float16 inside), onnxruntime's dynamic quantisation (int8 weights and activations), Torch-Pruning (L2
norm, a share of the channels of every layer; no compensation, no fine-tuning). None of them leaves a tau: it is inferred
from the weights. Then every pair is audited once more with a tau given by hand: what Torch-Pruning recorded that it cut, all
channels in order for the others. ``given`` says of how many sites that is known (of channels cut in step, Torch-Pruning
records one layer's), how many of these were inferred alike, and what the verdict is after how many trials.

``alike`` is the least share of a site's variance that the smaller model's units show without intervention; ``set`` and
``fold`` are parts of the logit MSE under the claimed law: what no affine fold of the units kept could avoid, and what this
one adds.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx
from candidates import beside, table

from mscompile.audit.pipeline import audit
from mscompile.audit.report import AuditReport
from mscompile.audit.setup import AuditOptions
from mscompile.errors import MscompileError

Cut = dict[str, list[int]]
"""Output channels taken out, by layer."""


def peers(model: Path, folder: Path, ratios: tuple[float, ...]) -> Iterator[tuple[str, Path, Cut]]:
    """What other tools make of a model."""
    onnxsim = importlib.import_module("onnxsim")
    simplified, equal = onnxsim.simplify(onnx.load(model))
    assert equal
    onnx.save(simplified, folder / "onnxsim.onnx")
    yield "onnxsim", folder / "onnxsim.onnx", {}
    float16 = importlib.import_module("onnxconverter_common.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(model), keep_io_types=True), folder / "float16.onnx")
    yield "float16", folder / "float16.onnx", {}
    quantization = importlib.import_module("onnxruntime.quantization")
    quantization.quantize_dynamic(model, folder / "int8.onnx", weight_type=quantization.QuantType.QInt8)
    yield "dynamic int8", folder / "int8.onnx", {}
    for ratio in ratios:
        target = folder / f"pruned{ratio:g}.onnx"
        yield f"Torch-Pruning, {1 - ratio:.0%} kept", target, prune(model, target, ratio)


def prune(model: Path, target: Path, ratio: float) -> Cut:
    """Torch-Pruning by L2 norm, on the network that the reference model was exported from; what it recorded."""
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
    return {layer: list(channels) for layer, outputs, channels in pruner.pruning_history() if outputs}


def recorded(report: AuditReport, model: Path, cut: Cut) -> list[dict[str, object]]:
    """The tau that is known, as `--tau` takes it: of sites whose layer was cut as recorded, or not at all."""
    makers = {name: node for node in onnx.load(model).graph.node for name in node.output}
    sites: list[dict[str, object]] = []
    for site in report.tau:
        node = makers[site.dense]
        while node.op_type not in ("Conv", "Gemm", "MatMul"):
            node = makers[node.input[0]]
        kept = sorted(set(range(site.size)) - set(cut.get(node.input[1].removesuffix(".weight"), ())))
        if len(kept) == site.width:
            entry = site.model_dump(include={"dense", "compiled", "dense_axis", "compiled_axis"})
            sites.append({**entry, "dense_channels": kept, "compiled_channels": list(range(site.width))})
    return sites


def given(report: AuditReport, model: Path, path: Path, cut: Cut, options: AuditOptions) -> str:
    """The audit with the recorded tau, in words."""
    sites = recorded(report, model, cut)
    tau = path.with_suffix(".tau.json")
    tau.write_text(json.dumps({"sites": sites}))
    (claim,) = audit(model, path, beside(model, "test"), replace(options, explain=False), tau=tau).claims
    inferred = {site.dense: site.dense_channels for site in report.tau}
    alike = sum(inferred[str(site["dense"])] == site["dense_channels"] for site in sites)
    return f"{alike} of {len(sites)} alike; {claim.verdict}, {claim.trials}"


def row(name: str, report: AuditReport, by_hand: str) -> list[object]:
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
        by_hand,
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
        "given",
    ]
    for model in models:
        rows: list[list[object]] = []
        with tempfile.TemporaryDirectory() as folder:
            for name, path, cut in peers(model, Path(folder), ratios):
                try:
                    options = AuditOptions(fidelity=fidelity, table=0)
                    report = audit(model, path, beside(model, "test"), options)
                    rows.append(row(name, report, given(report, model, path, cut, options)))
                except MscompileError as error:
                    rows.append([name, *[""] * 6, error.what, "", "", ""])
        print(f"\n{model.stem}:\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
