"""tau: which units of the dense model the units of the compiled one are, and where that is known from.

In order: given by hand (``--tau``), a plan file (``--plan``), the compiled file's metadata, or inferred from the weights.
Whatever its origin, it is a claim that the audit tests, and the certificate holds all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mscompile.audit.alignment import infer
from mscompile.errors import UsageError
from mscompile.intake.documents import parse
from mscompile.intake.provenance import METADATA
from mscompile.runtime import Arrays
from mscompile.verification.interchange import Correspondence
from mscompile.verification.skeletons import Skeleton
from mscompile.verification.surgery import Patch

Origin = Literal["given", "plan", "metadata", "weights"]


class SiteClaim(BaseModel):
    """One site as a file claims it; what is left out follows from the shapes.

    Attributes
    ----------
    dense, compiled
        Tensors; the compiled one has the same name if None.
    dense_axis, compiled_axis
        Channel axes; negative ones count from the end.
    dense_channels, compiled_channels
        Pairs of channels. By default the compiled channels are 0, 1, ….
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: str
    compiled: str | None = None
    dense_axis: int | None = None
    compiled_axis: int | None = None
    dense_channels: tuple[int, ...] = Field(min_length=1)
    compiled_channels: tuple[int, ...] | None = None


class TauFile(BaseModel):
    """A tau written by hand: ``{"sites": [{"dense": "relu", "dense_channels": [0, 3, 4]}]}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: tuple[SiteClaim, ...] = Field(min_length=1)


MOST_CHANNELS = 1 << 31
"""No tensor has more."""


@dataclass(frozen=True)
class Tau:
    """The sites of both models side by side.

    Attributes
    ----------
    sites
        Resolved against the shapes that the tensors have.
    origin
        Where it is known from.
    notes
        What was left out, and how sure an inferred one is.
    """

    sites: tuple[Correspondence, ...]
    origin: Origin
    notes: tuple[str, ...] = ()


def claims_of_file(path: Path) -> list[SiteClaim]:
    """Read a tau written by hand: a `TauFile`, or a mapping from tensors to retained channels."""
    try:
        content = parse(path.read_bytes())
        if isinstance(content, Mapping) and "sites" not in content:
            content = {"sites": [{"dense": name, "dense_channels": kept} for name, kept in content.items()]}
        return list(TauFile.model_validate(content).sites)
    except (OSError, ValueError) as error:
        raise UsageError(
            "the tau file cannot be read",
            where=str(path),
            why=str(error)[:400],
            hint='write {"sites": [{"dense": NAME, "compiled": NAME, "dense_channels": [0, 3], …}]}',
        ) from error


def claims_of_plan(plan: Mapping[str, Any], metadata: Mapping[str, str]) -> list[SiteClaim]:
    """The retained channels of a plan file, placed as the compiled file's metadata says.

    Raises
    ------
    UsageError
        They are not what a plan has.
    """
    try:
        channels = _channels(metadata)
        return [_placed(s["tensor"], s["kept"], s["axis"], channels) for s in plan["sites"]]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(
            "the plan cannot be read",
            where="its sites, or the metadata of the compiled model",
            why=str(error)[:400],
            hint="give the .plan.json of this pair, or another tau with --tau",
        ) from error


def claims_of_metadata(metadata: Mapping[str, str]) -> list[SiteClaim] | None:
    """The tau that `mscompile` writes into the models it compiles; None where there is none.

    Raises
    ------
    UsageError
        There is one, but it cannot be read.
    """
    if METADATA + "tau" not in metadata:
        return None
    try:
        tau = parse(metadata[METADATA + "tau"])
        channels = _channels(metadata)
        return [_placed(name, kept, None, channels) for name, kept in tau.items()]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(
            "the metadata of the compiled model cannot be read",
            where=METADATA + "tau",
            why=str(error)[:400],
            hint="it was changed after compiling; give --plan or --tau",
        ) from error


def _channels(metadata: Mapping[str, str]) -> Mapping[str, tuple[int, list[int]]]:
    found: Mapping[str, tuple[int, list[int]]] = parse(metadata.get(METADATA + "channels", "{}"))
    return found


def _placed(tensor: str, kept: Sequence[int], axis: int | None, channels: Mapping[str, Any]) -> SiteClaim:
    """A site by its retained channels; those that nothing reads may have gone with the others."""
    if tensor not in channels:
        return SiteClaim(dense=tensor, dense_axis=axis, compiled_axis=axis, dense_channels=tuple(kept))
    axis, left = channels[tensor]
    places = {channel: place for place, channel in enumerate(left)}
    still = [channel for channel in kept if channel in places]
    return SiteClaim(
        dense=tensor,
        dense_axis=axis,
        compiled_axis=axis,
        dense_channels=tuple(still),
        compiled_channels=tuple(places[channel] for channel in still),
    )


def resolve(claims: Sequence[SiteClaim], origin: Origin, dense: Arrays, compiled: Arrays) -> Tau:
    """Check claims against the tensors of a plain run of either model, and fill in what they leave open.

    Raises
    ------
    UsageError
        A claim does not fit them.
    """
    sites = tuple(_resolve(claim, dense, compiled) for claim in claims)
    doubled = [s.dense.tensor for i, s in enumerate(sites) if s.dense.tensor in {t.dense.tensor for t in sites[:i]}]
    if doubled:
        raise _misfit(doubled[0], "it is there twice")
    return Tau(sites, origin)


def _resolve(claim: SiteClaim, dense: Arrays, compiled: Arrays) -> Correspondence:
    target = claim.compiled if claim.compiled is not None else claim.dense
    a, b = dense[claim.dense].shape, compiled[target].shape
    numbered = claim.dense_channels, claim.compiled_channels
    if not all(0 <= channel < MOST_CHANNELS for channels in numbered for channel in channels or ()):
        raise _misfit(claim.dense, "channels are numbered from 0")
    kept = np.array(claim.dense_channels, dtype=np.int64)
    places = np.arange(len(kept)) if claim.compiled_channels is None else np.array(claim.compiled_channels, dtype=np.int64)
    if not len(kept):
        raise _misfit(claim.dense, "no channel is paired with any")
    if len(places) != len(kept):
        raise _misfit(claim.dense, f"{len(kept)} channels are paired with {len(places)}")
    if claim.dense_axis is None or claim.compiled_axis is None:
        axis = _axis(claim, a, b)
        axes = (axis, axis)
    else:
        axes = tuple(x + len(s) if x < 0 else x for x, s in ((claim.dense_axis, a), (claim.compiled_axis, b)))  # type: ignore[assignment]
    for axis, shape, channels, name in ((axes[0], a, kept, claim.dense), (axes[1], b, places, target)):
        if not 1 <= axis < len(shape):
            raise _misfit(name, f"axis {axis} is no channel axis of shape {list(shape)}")
        if channels.min() < 0 or channels.max() >= shape[axis] or len(np.unique(channels)) < len(channels):
            raise _misfit(name, f"its {shape[axis]} channels do not hold {len(channels)} different ones as numbered")
    if claim.compiled_channels is None and b[axes[1]] != len(kept):
        raise _misfit(claim.dense, f"{len(kept)} channels are retained, and {b[axes[1]]} are there: which is which?")
    return Correspondence(
        Patch(claim.dense, len(a), axes[0]), Patch(target, len(b), axes[1]), a[axes[0]], b[axes[1]], kept, places
    )


def _axis(claim: SiteClaim, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The one axis on which the tensors differ or, where none does, that has as many entries as channels are retained."""
    if len(a) == len(b):
        differ = [i for i in range(1, len(a)) if a[i] != b[i]]
        full = [i for i in range(1, len(a)) if b[i] == len(claim.dense_channels)]
        for found in (differ, full):
            if len(found) == 1:
                return found[0]
    raise _misfit(claim.dense, f"its channel axis does not follow from the shapes {list(a)} and {list(b)}")


def _misfit(where: str, why: str) -> UsageError:
    return UsageError(
        "tau does not fit the models", where=where, why=why, hint="give the tau of this pair with --tau or --plan"
    )


def inferred(dense: Skeleton, compiled: Skeleton) -> tuple[list[SiteClaim], tuple[str, ...]]:
    """Claims from matching weights, and what to say of them.

    Raises
    ------
    UsageError
        Nothing could be matched.
    """
    matches, reasons = infer(dense, compiled)
    if not matches:
        raise UsageError(
            "tau cannot be inferred",
            where="weights of the two models",
            why="; ".join(reasons[:5]) or "neither has a hidden linear layer",
            hint="give it with --tau FILE.json",
        )
    claims = [
        SiteClaim(
            dense=m.dense,
            compiled=m.compiled,
            dense_axis=m.axis,
            compiled_axis=m.axis,
            dense_channels=tuple(m.kept.tolist()),
            compiled_channels=tuple(m.places.tolist()),
        )
        for m in matches
    ]
    least = min(matches, key=lambda m: m.margin)
    cosine = min(m.likeness for m in matches)
    confidence = (
        f"tau was inferred from the weights at {len(matches)} sites: cosine {cosine:.3f} or more on average, the second "
        f"best unit at least {least.margin:.3f} behind (`{least.dense}`)"
    )
    return claims, (confidence, *reasons)
