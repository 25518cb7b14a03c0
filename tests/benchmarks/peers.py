"""What a user could have instead, on the same networks, with the same data, at the same number of parameters.

    python -m venv PEERS && PEERS/bin/pip install '.[torch]' onnxsim==0.8.1 torch-pruning==1.6.1
    for s in 0 1 2; do for a in mlp cnn resnet vit; do
        python -m mscompile.models train $a --data MNIST_FOLDER -o FOLDER/$s --seed $s; done; done
    PEERS/bin/python tests/benchmarks/peers.py FOLDER/0 FOLDER/1 FOLDER/2 -o peers.json

Nothing is retrained. Every method gets the 2000 calibration images beside the model (mscompile holds half of them back, to
choose and to certify) and is asked for a share of the parameters; where it takes a sparsity, that is bisected. Accuracy,
agreement and IIA (one site per trial, swap 0.1, 2 × 5000 pairs) are measured on the 10 000 test images, latency beside that
of the dense model in the same process. Cells: mean over the folders, ± half the range.

- onnxsim 0.8.1: structured pruning by L2 norm or Wanda, alone or with its ridge refit (`apply_pruning_finetune`).
- Torch-Pruning 1.6.1: `BasePruner`, local ratios; L2, Taylor, Hessian (as shipped, sample by sample over 500 images),
  LAMP. In the transformer only feed-forward blocks are offered to it: it knows nothing of this attention's heads.
- VBP: constants at the means, least variance first. r-parent: the paper's affine map of eight parents, additive scores.
  Both with mscompile's rewriting, the same share of every site.

A dash: the method does not get there (what it can cut is not enough), or, for IIA, its units cannot be told: retained ones
are found by their biases and normalisations, which a refit may change.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import torch
import torch_pruning
from candidates import beside, candidate_of, orders_of, samples_of, scores_of, statistics_of, table
from onnxsim.finetune import apply_pruning_finetune
from torch import nn

from mscompile import Options, compile_model
from mscompile.intake.samples import Samples
from mscompile.models.architectures import ARCHITECTURES
from mscompile.models.export import export
from mscompile.network.dense import DenseModel, open_dense
from mscompile.network.sizes import count_parameters, measure_latency
from mscompile.planning.plan import Plan
from mscompile.runtime import Session
from mscompile.verification.interchange import Correspondence, Pair
from mscompile.verification.skeletons import skeleton_of, weightless
from mscompile.verification.surgery import Patch
from mscompile.verification.verify import Interchange, make_pair

NETWORKS = ("mlp", "cnn", "resnet", "vit")
SHARES = (0.75, 0.5, 0.3)
BISECTIONS = 12
"""Halvings of the sparsity: beyond, no channel moves."""
HESSIAN_SAMPLES = 500
BATCH = 64
CLOSE = 0.05
"""Share of the dense parameters by which a method may miss what was asked for: one channel of 32 at every site is 6 % of it;
more counts as not getting there."""


@dataclass(frozen=True)
class Network:
    """One trained network, in every form that a method takes."""

    name: str
    file: Path

    @property
    def dense(self) -> DenseModel:
        """As mscompile reads it."""
        return _dense(self.file)

    def data(self, part: str) -> Samples:
        """Samples beside it."""
        return samples_of(self.dense, beside(self.file, part))

    def module(self) -> nn.Module:
        """As torch has it, with the weights of the file."""
        network = ARCHITECTURES[self.name].build()
        network.load_state_dict(dict(_state(network, onnx.load(self.file))), strict=False)
        return network.eval()


@cache
def _dense(file: Path) -> DenseModel:
    return open_dense(file)


def _state(network: nn.Module, model: onnx.ModelProto) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by their names in torch: the exporter keeps these, but for matrices, which it transposes."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = {o: n for n in model.graph.node for o in n.output if n.op_type == "MatMul"}
    added = {i: n for n in model.graph.node if n.op_type == "Add" for i in n.input}
    for name, value in network.state_dict().items():
        if name in arrays and tuple(arrays[name].shape) == tuple(value.shape):
            yield name, torch.from_numpy(arrays[name].copy())
        elif name.endswith(".weight"):
            addition = added[name.removesuffix("weight") + "bias"]
            product = next(products[i] for i in addition.input if i in products)
            yield name, torch.from_numpy(arrays[product.input[1]].T.copy())
        elif not name.endswith("num_batches_tracked"):
            raise ValueError(f"{name} is not in the file")


@dataclass(frozen=True)
class Made:
    """What a method gave: a model, and which units of the dense one are left, where that is known."""

    model: onnx.ModelProto
    pair: Pair | None


Method = Callable[[Network, float], Made | None]


def ours(network: Network, share: float) -> Made | None:
    """mscompile, as a user calls it."""
    try:
        result = compile_model(network.file, network.file.with_suffix(".calib.npz"), None, Options(params=share))
    except Exception as error:
        if getattr(error, "exit_code", 0) != 6:
            raise
        return None
    return Made(ir.to_proto(result.model), _pair_of_plan(network.dense, result.model, result.plan))


def _pair_of_plan(dense: DenseModel, model: ir.Model, plan: Plan) -> Pair:
    from mscompile.rewrite import rewrite

    return make_pair(dense.scm, model, plan, rewrite(dense.model, plan).alignment)


def baseline(objective: str, replacement: str) -> Method:
    """A uniform share of every site by additive scores."""

    def make(network: Network, share: float) -> Made | None:
        dense = network.dense
        statistics = statistics_of(dense, network.data("calib"))
        scores = scores_of(dense, statistics, objective)
        orders = orders_of(dense, statistics, scores, joint=False)

        def at(sparsity: float) -> Made:
            found = candidate_of(dense, statistics, scores, orders, 1.0 - sparsity, replacement)
            return Made(ir.to_proto(found.compiled.model), found.pair)

        return bisect(at, network, share)

    return make


def bisect(make: Callable[[float], Made], network: Network, share: float) -> Made | None:
    """The sparsity whose parameters come closest to the share; None where that is not close."""
    whole = params(onnx.load(network.file))
    low, high, best, gap = 0.0, 0.98, None, CLOSE
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        made = make(middle)
        found = params(made.model) / whole
        if abs(found - share) <= gap:
            best, gap = made, abs(found - share)
        low, high = (low, middle) if found <= share else (middle, high)
    return best


def params(model: onnx.ModelProto) -> int:
    """Elements of floating-point initializers."""
    return count_parameters(ir.from_proto(model))


def simplifier(*, wanda: bool, refit: bool) -> Method:
    """Structured pruning of onnxsim."""

    def make(network: Network, share: float) -> Made | None:
        original = onnx.load(network.file)
        batches = [dict(batch) for batch in network.data("calib").batches(BATCH)]

        def at(sparsity: float) -> Made:
            if wanda:
                pruned = onnxsim.apply_structured_wanda_pruning(original, calibration_data=batches, sparsity=sparsity)
            else:
                pruned = onnxsim.apply_structured_pruning(original, sparsity=sparsity)
            return Made(pruned, None)

        found = bisect(at, network, share)
        if found is None:
            return None
        model = apply_pruning_finetune(original, found.model, calibration_data=batches) if refit else found.model
        return Made(model, pair_by_parameters(network, model))

    return make


def pruner(importance: Callable[[], object], *, gradient: str = "") -> Method:
    """Torch-Pruning with one of its importances; all of them give the same widths, so that L2 finds the ratio."""

    def make(network: Network, share: float) -> Made | None:
        calib = network.data("calib")
        x = torch.from_numpy(np.array(next(iter(calib.inputs.values()))))
        y = torch.from_numpy(np.array(calib.labels))
        ratio = _ratio(network, share)
        if ratio is None:
            return None
        module, score = network.module(), importance()
        _accumulate(module, score, gradient, x, y)
        prune(network, module, score, ratio, x)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pruned.onnx"
            export(module, x[:2].numpy(), file)
            model = onnx.load(file)
        return Made(model, pair_by_parameters(network, model))

    return make


@cache
def _ratio(network: Network, share: float) -> float | None:
    """The ratio whose parameters come closest to the share; None where that is not close."""
    x = torch.from_numpy(network.data("calib").take(slice(2)).inputs["x"])
    whole = params(onnx.load(network.file))
    low, high, best, gap = 0.0, 0.98, None, CLOSE
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        module = network.module()
        prune(network, module, torch_pruning.importance.GroupMagnitudeImportance(p=2), middle, x)
        tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
        found = sum(tensor.numel() for tensor in tensors) / whole
        if abs(found - share) <= gap:
            best, gap = middle, abs(found - share)
        low, high = (low, middle) if found <= share else (middle, high)
    return best


def _accumulate(module: nn.Module, score: object, gradient: str, x: torch.Tensor, y: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy
    if gradient == "sum":
        for rows in torch.arange(len(x)).split(BATCH):
            (loss(module(x[rows]), y[rows]) * len(rows) / len(x)).backward()
    elif gradient == "each":
        score.zero_grad()  # type: ignore[attr-defined]
        for i in range(HESSIAN_SAMPLES):
            module.zero_grad()
            loss(module(x[i : i + 1]), y[i : i + 1]).backward()
            score.accumulate_grad(module)  # type: ignore[attr-defined]


def prune(network: Network, module: nn.Module, score: object, ratio: float, x: torch.Tensor) -> None:
    """Prune in place."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm)}
    last = list(layers)[-1]
    offered = [m for n, m in layers.items() if (n.endswith("feed.up") if network.name == "vit" else n != last)]
    ignored = [m for m in layers.values() if m not in offered]
    torch_pruning.pruner.BasePruner(
        module, x[:2], importance=score, pruning_ratio=ratio, ignored_layers=ignored, global_pruning=False
    ).step()


def pair_by_parameters(network: Network, model: onnx.ModelProto) -> Pair | None:
    """Pair a pruned model with the dense one, units told by their biases and normalisations; None where that fails."""
    dense = network.dense
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    try:
        shapes = _shapes(model, network)
    except Exception:
        return None
    found = []
    for site in dense.sites:
        slots = [s for s in dense.scm.slots if np.isin(s.units, site.units).any()]
        vectors = {}
        for slot in slots:
            value = slot.node.inputs[slot.operand]
            if value is not None and value.const_value is not None and len(value.const_value.shape) == 1:
                vectors[value.name or ""] = value.const_value.numpy()
        vectors = {name: array for name, array in vectors.items() if len(array) == site.size and name in arrays}
        if not vectors or site.tensor not in shapes:
            return None
        rows = {row.tobytes(): i for i, row in enumerate(np.stack(list(vectors.values()), axis=1))}
        left = [rows.get(row.tobytes()) for row in np.stack([arrays[name] for name in vectors], axis=1)]
        width = shapes[site.tensor][site.axis]
        if len(rows) < site.size or None in left or len(left) != width:
            return None
        patch = Patch(site.tensor, dense.ranks[site.tensor], site.axis)
        if width < site.size:
            kept = np.array(left, dtype=np.int64)
            order = np.argsort(kept)
            found.append(Correspondence(patch, patch, site.size, width, kept[order], order))
    return Pair(skeleton_of(dense.model), weightless(model), tuple(found)) if found else None


def _shapes(model: onnx.ModelProto, network: Network) -> dict[str, tuple[int, ...]]:
    names = [site.tensor for site in network.dense.sites]
    from mscompile.verification.surgery import probe

    batch = next(network.data("calib").batches(2))
    values = Session(probe(weightless(model), names), optimise=False).run(batch, names)
    return {name: array.shape for name, array in values.items()}


METHODS: dict[str, Method] = {
    "mscompile": ours,
    "onnxsim L2": simplifier(wanda=False, refit=False),
    "onnxsim Wanda": simplifier(wanda=True, refit=False),
    "onnxsim L2 + refit": simplifier(wanda=False, refit=True),
    "onnxsim Wanda + refit": simplifier(wanda=True, refit=True),
    "Torch-Pruning L2": pruner(lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2)),
    "Torch-Pruning LAMP": pruner(lambda: torch_pruning.importance.LAMPImportance(p=2)),
    "Torch-Pruning Taylor": pruner(torch_pruning.importance.GroupTaylorImportance, gradient="sum"),
    "Torch-Pruning Hessian": pruner(torch_pruning.importance.GroupHessianImportance, gradient="each"),
    "VBP": baseline("variance", "constant"),
    "r-parent": baseline("logit-mse", "affine-parents"),
}


def measured(network: Network, made: Made | None, seconds: float, samples: int | None) -> dict[str, float | None] | None:
    """The cells of one method."""
    if made is None:
        return None
    test, dense = network.data("test"), network.dense
    if samples is not None:
        test = test.take(slice(samples))
    name, answer = dense.output, made.model.graph.output[0].name
    wanted = Session(dense.model).run_all(test.batches(BATCH), [name])[name].argmax(-1)
    found = Session(made.model).run_all(test.batches(BATCH), [answer])[answer].argmax(-1)
    before, after = measure_latency(dense.model, ir.from_proto(made.model), test, BATCH)
    iia = None
    if made.pair is not None:
        interchange = Interchange(made.pair, test, batch_size=250)
        runs = [interchange.run(test, law="one-site", swap=0.1, seed=seed, delta=0.05) for seed in range(2)]
        iia = float(np.mean([run.iia for run in runs]))
    return {
        "params": params(made.model) / params(onnx.load(network.file)),
        "accuracy": float((found == test.labels).mean()),
        "dense": float((wanted == test.labels).mean()),
        "agreement": float((found == wanted).mean()),
        "iia": iia,
        "latency": after / before,
        "seconds": seconds,
    }


def cell(values: list[float | None], form: str = ".4f") -> str:
    """Mean ± half the range."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    spread = f" ± {(max(known) - min(known)) / 2:{form}}" if len(known) > 1 else ""
    return f"{np.mean(known):{form}}{spread}"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Cells as JSON; those in it are not measured again.")
@click.option("--network", "networks", multiple=True, default=NETWORKS, show_default=True)
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="Methods to run. [default: all]")
@click.option("--samples", type=int, help="Test images to use. [default: all]")
def main(
    folders: tuple[Path, ...], output: Path | None, networks: tuple[str, ...], methods: tuple[str, ...], samples: int | None
) -> None:
    """Measure what is missing and print the table."""
    cells = json.loads(output.read_text()) if output is not None and output.exists() else {}
    for folder in folders:
        for name in networks:
            network = Network(name, folder / f"{name}.onnx")
            for share in SHARES:
                for method in methods:
                    key = f"{folder.name}/{name}/{share}/{method}"
                    if key in cells:
                        continue
                    torch.manual_seed(0)
                    began = time.perf_counter()
                    made = METHODS[method](network, share)
                    cells[key] = measured(network, made, time.perf_counter() - began, samples)
                    click.echo(f"{key}: {cells[key]}", err=True)
                    if output is not None:
                        output.write_text(json.dumps(cells, indent=1))
    columns = {"accuracy": ".4f", "agreement": ".4f", "iia": ".4f", "params": ".3f", "latency": ".2f", "seconds": ".0f"}
    for name in networks:
        rows: list[list[object]] = []
        for share in SHARES:
            for method in methods:
                found = [cells.get(f"{folder.name}/{name}/{share}/{method}") for folder in folders]
                values = [[None if entry is None else entry[column] for entry in found] for column in columns]
                rows.append([f"{share:.0%}", method, *map(cell, values, columns.values())])
        dense = [entry["dense"] for key, entry in cells.items() if f"/{name}/" in key and entry]
        click.echo(f"\n{name}, dense accuracy {np.mean(dense):.4f}\n")
        click.echo(table(["parameters asked", "method", *columns], rows))


if __name__ == "__main__":
    main()
