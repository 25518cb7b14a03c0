"""One interchange on which the two models disagree, as small as it can be made, for anyone to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mscompile.audit.claims import stream
from mscompile.audit.outputs import Measure, largest
from mscompile.audit.report import Counterexample
from mscompile.audit.setup import AuditOptions, Setup
from mscompile.errors import UsageError
from mscompile.files import staged_folder
from mscompile.verification.interchange import Trials
from mscompile.verification.surgery import patched

LARGEST = 1 << 28
"""Bytes of both models up to which they are written beside a counterexample."""
SEARCHED = 2000
"""Trials searched for one."""
FILES = ("dense.onnx", "compiled.onnx", "inputs.npz", "replay.py")
"""What is in its folder."""
REPLAY = """\
import numpy as np, onnxruntime as ort
case = np.load("inputs.npz")
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
for name, output in {outputs!r}:
    session = ort.InferenceSession(name + ".onnx", options, providers=["CPUExecutionProvider"])
    feed = {{i.name: case[name + " " + i.name] for i in session.get_inputs()}}
    answer = session.run([output], feed)[0][0]
    print(name, answer.argmax(-1), answer)
"""
"""Needs onnxruntime and numpy alone."""

Unit = tuple[int, int]
"""Site, and which of its pairs of channels."""


@dataclass(frozen=True)
class Case:
    """A trial on which the models disagree, its loss, and the output that shows it."""

    trials: Trials
    row: int
    loss: float
    measure: Measure


@dataclass(frozen=True)
class Found:
    """A counterexample and the masks that make it."""

    report: Counterexample
    masks: list[npt.NDArray[np.bool_]]


def find(setup: Setup, options: AuditOptions) -> Found | None:
    """The first disagreement under the first claim's law, preferably of samples on which the models agree by themselves."""
    law, swap = options.laws[0], options.swaps[0]
    measure = setup.measures[0]
    fallback: Case | None = None
    for trials in stream(setup, options, law, swap, SEARCHED, own=False):
        by_output = measure.by_output(trials.dense, trials.matched)
        losses = largest(by_output.values())
        for row in np.flatnonzero(losses >= max(losses.max(), 1e-9)) if losses.max() > 0 else ():
            part = next(p for p in measure.parts if by_output[p[0]][row] == losses[row])
            here = Case(trials, int(row), float(losses[row]), Measure((part,)))
            fallback = fallback or here
            if _losses(setup, here, [[]])[0] < 0.5 * here.loss:
                return _shrunk(setup, here)
    return None if fallback is None else _shrunk(setup, fallback)


def _shrunk(setup: Setup, case: Case) -> Found:
    """Take units out in ever smaller parts while at least half of the loss stays (delta debugging, Zeller 1999)."""
    trials, row, loss, output = case.trials, case.row, case.loss, case.measure.outputs[0]
    units: list[Unit] = [(i, int(u)) for i, mask in enumerate(trials.masks) for u in np.flatnonzero(mask[row])]
    before, parts = len(units), 1
    while units:
        pieces = [list(map(tuple, piece)) for piece in np.array_split(np.array(units), parts)]
        candidates = [piece for piece in pieces if parts > 1]
        candidates += [[unit for unit in units if unit not in set(piece)] for piece in pieces]
        losses = _losses(setup, case, candidates)
        still = np.flatnonzero(losses >= 0.5 * loss)
        if len(still):
            units = candidates[int(min(still, key=lambda i: len(candidates[i])))]
            parts = max(min(parts - 1, len(units)), 1)
        elif parts >= len(units):
            break
        else:
            parts = min(2 * parts, len(units))
    masks = _masks(trials, [units])
    one = slice(row, row + 1)
    found = setup.engine.interchange(setup.samples, trials.base[one], trials.source[one], masks)
    swapped: dict[str, list[int]] = {}
    for site, unit in units:
        pair = setup.tau.sites[site]
        swapped.setdefault(pair.dense.tensor, []).append(int(pair.kept[unit]))
    report = Counterexample(
        base=int(trials.base[row]),
        source=int(trials.source[row]),
        swapped=swapped,
        swapped_before=before,
        dense_answer=_shown(found.dense[output][0]),
        compiled_answer=_shown(found.matched[output][0]),
        outputs=(output, setup.engine.answers[output]),
        folder=None,
    )
    return Found(report, masks)


def _losses(setup: Setup, case: Case, candidates: Sequence[Sequence[Unit]]) -> npt.NDArray[np.float64]:
    """[candidates] losses of the case with other units swapped."""
    trials, row, losses = case.trials, case.row, []
    for start in range(0, len(candidates), setup.engine.batch_size):
        some = candidates[start : start + setup.engine.batch_size]
        base, source = (np.full(len(some), part[row]) for part in (trials.base, trials.source))
        found = setup.engine.interchange(setup.samples, base, source, _masks(trials, some))
        losses.append(case.measure.loss(found.dense, found.matched))
    return np.concatenate(losses)


def _masks(trials: Trials, candidates: Sequence[Sequence[Unit]]) -> list[npt.NDArray[np.bool_]]:
    masks = [np.zeros((len(candidates), mask.shape[1]), dtype=np.bool_) for mask in trials.masks]
    for number, units in enumerate(candidates):
        for site, unit in units:
            masks[site][number, unit] = True
    return masks


def _shown(answer: npt.NDArray[np.generic]) -> list[float]:
    """The first numbers of an output, with the digits that float32 has."""
    return [float(f"{v:.9g}") for v in answer.astype(np.float64).ravel()[:100]]


def write(found: Found, setup: Setup, folder: Path) -> Counterexample:
    """Write both models with the patch written in, what they are given, and ten lines that run them.

    Nothing is written where the models are too large.
    """
    engine = setup.engine
    models = {"dense": engine.pair.dense, "compiled": engine.pair.compiled}
    if sum(model.weight_bytes for model in models.values()) > LARGEST:
        return found.report
    base, source = (setup.samples.take([i]).inputs for i in (found.report.base, found.report.source))
    values = engine.dense.read(source, [site.dense.tensor for site in engine.pair.sites])
    feeds = {
        "dense": engine.dense.feeds(base, engine.dense_settings(found.masks, values)),
        "compiled": engine.compiled.feeds(base, engine.matched_settings(found.masks, values)),
    }
    patches = {"dense": [s.dense for s in engine.pair.sites], "compiled": [s.compiled for s in engine.pair.sites]}
    report = found.report.model_copy(update={"folder": folder.name})
    with staged_folder(folder) as draft:
        for name, model in models.items():
            graph = patched(model, patches[name]).whole()
            (draft / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        arrays = {f"{name} {key}": array for name, feed in feeds.items() for key, array in feed.items()}
        np.savez_compressed(draft / "inputs.npz", **arrays)  # type: ignore[arg-type]
        (draft / "replay.py").write_text(replay_lines(report), encoding="utf-8")
    return report


def folder_of(output: Path) -> Path:
    """Where a counterexample goes, beside the certificate."""
    return output.with_name(f"{output.name.removesuffix('.json')}.counterexample")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds what no counterexample does: it would be replaced.

    Raises
    ------
    UsageError
        It does, or is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        why = "it is no folder"
    else:
        why = next((f"there is {path.name!r} in it" for path in folder.glob("*") if path.name not in FILES), "")
    if why:
        raise UsageError("a counterexample cannot be written", where=str(folder), why=why, hint="give another -o")


def replay_lines(report: Counterexample) -> str:
    """The script of a counterexample."""
    return REPLAY.format(outputs=tuple(zip(("dense", "compiled"), report.outputs, strict=True)))
