"""Self-checks of interventions, made before anything is measured with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mscompile.errors import UnsupportedError, VerificationError
from mscompile.network.layout import FIRST
from mscompile.runtime import Session
from mscompile.verification.interventions import Feed, Intervened, Setting

FOLD_TOLERANCE = 1e-4
"""Largest fold error, in standard deviations of the output: float32 rounding through tens of layers stays below it."""
BATCH_EFFECT = 1e-4
"""Change of an output, in standard deviations, that rounding explains when a sample is run alone."""
MINGLED = 0.1
"""The same from which samples are no samples: activations in 8 bits, scaled by all that is in a batch, stay below it."""


def check_patches(
    name: str, model: Intervened, batch: Feed, outputs: Sequence[str], shared: frozenset[str] = frozenset()
) -> None:
    """Null and self patch; `shared` inputs go with every sample, here and below.

    Raises
    ------
    VerificationError
        One of them changes an output.
    """
    values = model.read(batch)
    count = _count(batch, shared)
    for check, value in (("null", False), ("self", True)):
        settings: dict[str, Setting] = {
            patch.tensor: (np.full((count, values[patch.tensor].shape[patch.axis]), value), values[patch.tensor])
            for patch in model.patches
        }
        found = model.run(batch, settings, outputs)
        for output in outputs:
            if not unchanged(found[output], values[output], model.digits):
                raise VerificationError(
                    f"the {check} patch changes the {name} model",
                    where=f"output {output!r}",
                    why="an intervention that changes nothing must leave every output bit as it is",
                    hint="the model may be random or keep state between runs; otherwise please report a bug",
                )


def check_full_source(model: Intervened, batch: Feed, outputs: Sequence[str], shared: frozenset[str] = frozenset()) -> None:
    """All channels of sites that lie on every path, set to what they are on other inputs, give the outputs of these.

    Raises
    ------
    VerificationError
        They do not.
    """
    values = model.read(batch)
    turned = {name: array if name in shared else np.ascontiguousarray(array[::-1]) for name, array in batch.items()}
    count = _count(batch, shared)
    settings: dict[str, Setting] = {
        patch.tensor: (np.ones((count, values[patch.tensor].shape[patch.axis]), dtype=np.bool_), values[patch.tensor])
        for patch in model.patches
    }
    found = model.run(turned, settings, outputs)
    for output in outputs:
        if not unchanged(found[output], values[output], model.digits):
            raise VerificationError(
                "the full-source patch does not reproduce the source",
                where=f"output {output!r}",
                why="the sites lie on every path, so that all their values determine the outputs",
                hint="the model may be random or keep state between runs; otherwise please report a bug",
            )


def _count(batch: Feed, shared: frozenset[str]) -> int:
    """Samples in a batch."""
    return len(next(array for name, array in batch.items() if name not in shared))


def unchanged(found: npt.NDArray[Any], plain: npt.NDArray[Any], digits: int | None) -> bool:
    """Whether outputs are bit for bit the same; in models with 16-bit floats, to a few units in the last place of these.

    onnxruntime computes those in float32 and rounds at the tensors that an intervention adds to the graph.

    Parameters
    ----------
    digits
        Binary digits of the 16-bit type, see `Intervened.digits`.
    """
    if digits is None or found.dtype.kind in "iub?":
        return np.array_equal(found, plain, equal_nan=found.dtype.kind not in "iub?")
    a, b = found.astype(np.float64), plain.astype(np.float64)
    return bool(
        np.allclose(a, b, rtol=0.0, atol=8 * 2.0**-digits * float(np.nanmax(np.abs(b), initial=0.0)), equal_nan=True)
    )


def cuts_all_paths(model: onnx.ModelProto, tensors: Sequence[str], output: str) -> bool:
    """Whether every path from a model input to `output` passes one of `tensors`."""
    inputs = {i.name for i in model.graph.input} - {i.name for i in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output if name}
    waiting, seen = [output], set(tensors)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        if name in inputs:
            return False
        seen.add(name)
        if name in producers:
            node = producers[name]
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                return False  # a subgraph may use any tensor
            waiting += [i for i in node.input if i]
    return True


def check_rows(name: str, model: Intervened, batch: Feed, shared: frozenset[str] = frozenset()) -> None:
    """Tensors must hold each sample where their layout says, so that a unit of one can be told from that of another.

    Of a first axis with a row for each sample nothing else is asked.

    Raises
    ------
    VerificationError
        One does not.
    """
    asked = [patch for patch in model.patches if patch.layout != FIRST]
    if not asked:
        return
    count, names = _count(batch, shared), [patch.tensor for patch in asked]
    values, alone = model.read(batch, names), model.read(_one_alone(batch, shared), names)
    for patch in asked:
        size = values[patch.tensor].shape[patch.layout.axis]
        if patch.layout.first and size == count:
            continue
        try:
            there, here = (patch.layout.front(found[patch.tensor], count)[0] for found in (values, alone))
            same = unchanged(here, there, model.digits)
        except ValueError:
            same = False
        if not same:
            raise VerificationError(
                f"units of the {name} model cannot be set sample by sample",
                where=patch.tensor,
                why=f"{count} samples give {size} places on axis {patch.layout.axis}, which are not theirs in order",
                hint="leave this site alone with --freeze, in an audit out of tau",
            )


def _one_alone(batch: Feed, shared: frozenset[str]) -> Feed:
    """The batch with its first sample in place of all others."""
    return {
        key: array if key in shared else np.ascontiguousarray(np.repeat(array[:1], len(array), axis=0))
        for key, array in batch.items()
    }


def check_independence(model: ir.Model, batch: Feed, outputs: Iterable[str], shared: frozenset[str] = frozenset()) -> None:
    """A sample's result must not depend on the others in its batch, as it does where positions are taken for samples.

    Raises
    ------
    UnsupportedError
        It does.
    """
    names, count = list(outputs), _count(batch, shared)
    if not names or count == 1:
        return
    session = Session(model)
    together, alone = session.run(batch, names), session.run(_one_alone(batch, shared), names)
    for name in names:
        rows, rest = divmod(len(together[name]), count)
        a, b = (found[name][:rows].astype(np.float64) for found in (together, alone))
        spread = max(float(together[name].astype(np.float64).std()), float(np.finfo(np.float32).tiny))
        effect = 0.0 if rest or not a.size else float(np.abs(a - b).max()) / spread
        if rest or effect > MINGLED:
            raise UnsupportedError(
                "the samples do not go through the model one by one",
                where=f"output {name!r}",
                why=f"{count} samples give {len(together[name])} results"
                if rest
                else f"that of one sample changes by {effect:.2g} standard deviations with the others in its batch",
                hint="axis 0 of every input must count samples, not positions: export with the batch axis first",
            )


def depends_on_batch(model: Intervened, batch: Feed, output: str, shared: frozenset[str] = frozenset()) -> bool:
    """Whether a sample's output depends on the others in its batch, as with dynamic quantisation of activations."""
    count = min(_count(batch, shared), 4)
    together = model.read(batch, [output])[output][:count].astype(np.float64)
    rows = ({k: v if k in shared else v[i : i + 1] for k, v in batch.items()} for i in range(count))
    alone = np.concatenate([model.read(row, [output])[output] for row in rows])
    spread = max(float(together.std()), float(np.finfo(np.float32).tiny))
    return bool(np.abs(together - alone.astype(np.float64)).max() > BATCH_EFFECT * spread)


def planted_defects(
    model: Intervened,
    batch: Feed,
    kept: Mapping[str, npt.NDArray[np.int64]],
    outputs: Sequence[str],
    shared: frozenset[str] = frozenset(),
) -> dict[str, list[str]]:
    """Which sites show each of three defects, planted in a copy of the dense model while half of its units are interchanged.

    The copy without defect must answer exactly as the model does, or nothing could be concluded from a difference.

    Parameters
    ----------
    kept
        Units by tensor that the audit sets.

    Returns
    -------
    dict
        By defect, the tensors at which it changed an output.

    Raises
    ------
    VerificationError
        The copy without defect gives other outputs.
    """
    values, count = model.read(batch), _count(batch, shared)
    rng = np.random.default_rng(0)
    settings: dict[str, Setting] = {}
    for patch in model.patches:
        mask = np.zeros((count, values[patch.tensor].shape[patch.axis]), dtype=np.bool_)
        mask[:, kept[patch.tensor]] = rng.random((count, len(kept[patch.tensor]))) < 0.5
        layout = patch.layout.of(values[patch.tensor].shape, count)
        source = layout.back(layout.front(values[patch.tensor], count)[::-1])
        settings[patch.tensor] = (mask, np.ascontiguousarray(source))
    wanted = model.run(batch, settings, outputs)

    def same(changed: Mapping[str, Setting]) -> bool:
        found = model.run(batch, changed, outputs)
        return all(unchanged(found[output], wanted[output], model.digits) for output in outputs)

    if not same(settings):
        raise VerificationError(
            "the dense model does not agree with itself",
            where=f"outputs {', '.join(outputs)}",
            why="the same interchange gave two answers",
            hint="the model may be random or keep state between runs",
        )
    seen: dict[str, list[str]] = {"a unit is dropped": [], "a column is scaled": [], "units are shuffled": []}
    for patch in model.patches:
        mask, source = settings[patch.tensor]
        channels = kept[patch.tensor]
        flat = np.moveaxis(source, patch.axis, 0).reshape(source.shape[patch.axis], -1)
        unit = int(channels[np.argmax(flat[channels].astype(np.float64).std(axis=1))])
        for defect, tensors in seen.items():
            broken = np.moveaxis(source.copy(), patch.axis, 0)
            wide = mask
            if defect == "units are shuffled":
                broken[channels] = broken[np.roll(channels, 1)]
            else:
                broken[unit] = broken[unit] * (0.0 if defect == "a unit is dropped" else 1.5)
                wide = mask.copy()
                wide[:, unit] = True
            changed = {**settings, patch.tensor: (wide, np.ascontiguousarray(np.moveaxis(broken, 0, patch.axis)))}
            if not same(changed):
                tensors.append(patch.tensor)
    return seen
