"""Plans: which units stay, and what stands in for the others. A plan is a file that a person can read and edit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from mscompile.errors import UsageError
from mscompile.intake.documents import faults
from mscompile.network.scm import Scm, Site
from mscompile.operators import IntArray
from mscompile.planning.constants import has_carriers
from mscompile.runs.shelf import Shelf

Integers = Annotated[
    npt.NDArray[np.int64],
    BeforeValidator(lambda a: np.asarray(a, dtype=np.int64)),
    PlainSerializer(lambda a: a.tolist(), when_used="json"),
]
# Nine digits give back every float32.
Floats = Annotated[
    npt.NDArray[np.float32],
    BeforeValidator(lambda a: np.asarray(a, dtype=np.float32)),
    PlainSerializer(lambda a: np.vectorize(lambda v: float(f"{v:.9g}"), otypes=[object])(a).tolist(), when_used="json"),
]


class WindowPlan(BaseModel):
    """New weights of one reader, fitted over its window; see `mscompile.calibration.windows`.

    Attributes
    ----------
    reader
        Output name of the reader.
    places
        [retained, taps]: for a product, the weight's row or column of each feature; None for a convolution, whose taps are
        those of its kernel.
    columns
        [retained, taps, outputs]: the weight on retained channels. It is zero on the others.
    response
        [taps, outputs] carried by a channel of ones where the reader pads, else [1, outputs], added to the reader's output.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True, extra="forbid")

    reader: str
    places: Integers | None = None
    columns: Floats
    response: Floats


class SitePlan(BaseModel):
    """What happens at one site.

    Attributes
    ----------
    name, tensor
        The tensor the readers read; `name` is how `inspect` prints it.
    axis, size
        Channel axis and number of channels.
    kept
        Retained channels, ascending; the others are replaced.
    constants
        [replaced]: value, or intercept, of each replaced channel in ascending order, in the units of the activation.
    lossless
        Replaced channels that are, on the calibration data, affine functions of the others to float32 rounding.
    affine
        [replaced, retained] coefficients; None where all replacements are constants.
    windows
        Readers that take new weights instead of what the above would fold into them.
    basis
        What the scores that chose the channels estimate.
    predicted_risk
        ½ tr(G_PP R_PP) of the site, of what `basis` names; None where that is no risk.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True, extra="forbid")

    name: str
    tensor: str
    axis: int
    size: int
    kept: Integers
    constants: Floats
    lossless: Integers = Field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    affine: Floats | None = None
    windows: tuple[WindowPlan, ...] = ()
    basis: str = ""
    predicted_risk: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.kept) == 0 or (np.diff(self.kept) <= 0).any() or self.kept[0] < 0 or self.kept[-1] >= self.size:
            raise ValueError(f"site {self.name}: `kept` must be ascending channel numbers from 0 to {self.size - 1}")
        replaced = self.size - len(self.kept)
        if self.constants.shape != (replaced,):
            raise ValueError(f"site {self.name}: {replaced} channels are replaced but {self.constants.size} constants given")
        if self.affine is not None and self.affine.shape != (replaced, len(self.kept)):
            raise ValueError(f"site {self.name}: `affine` must be [{replaced}, {len(self.kept)}]")
        if len({window.reader for window in self.windows}) < len(self.windows):
            raise ValueError(f"site {self.name}: a reader has new weights twice")
        for window in self.windows:
            if window.columns.ndim != 3 or len(window.columns) != len(self.kept) or window.response.ndim != 2:
                raise ValueError(
                    f"site {self.name}: the weights of reader {window.reader} do not fit {len(self.kept)} channels"
                )
            if not np.isfinite(window.columns).all() or not np.isfinite(window.response).all():
                raise ValueError(f"site {self.name}: the weights of reader {window.reader} must be finite")
            if window.places is not None and window.places.shape != window.columns.shape[:2]:
                raise ValueError(f"site {self.name}: `places` of reader {window.reader} must be {window.columns.shape[:2]}")
        if not np.isfinite(self.constants).all() or (self.affine is not None and not np.isfinite(self.affine).all()):
            raise ValueError(f"site {self.name}: constants and coefficients must be finite")
        return self

    @property
    def sha256(self) -> str:
        """Digest over all that is done at the site."""
        total = hashlib.sha256(repr((self.tensor, self.axis, self.size, [w.reader for w in self.windows])).encode())
        arrays: list[npt.NDArray[Any] | None] = [self.kept, self.constants, self.affine]
        arrays += [array for window in self.windows for array in (window.places, window.columns, window.response)]
        for array in arrays:
            total.update(b"" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def on(self, shelf: Shelf) -> SitePlan:
        """The same with its matrices on a shelf."""
        windows = tuple(window.model_copy(update={"columns": shelf.put(window.columns)}) for window in self.windows)
        affine = None if self.affine is None else shelf.put(self.affine)
        return self.model_copy(update={"affine": affine, "windows": windows})

    @property
    def replaced(self) -> IntArray:
        """Replaced channels, ascending."""
        return np.setdiff1d(np.arange(self.size, dtype=np.int64), self.kept)


class Plan(BaseModel):
    """A whole plan, bound to the dense model by its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model_sha256: str
    objective: str
    replacement: str
    swap: float
    sites: tuple[SitePlan, ...]

    def to_json(self) -> str:
        """Text of the plan file."""
        return self.model_dump_json(indent=None) + "\n"

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan file; UsageError where it is not one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, TypeError, OverflowError) as error:  # the latter two from arrays
            why = faults(error) if isinstance(error, ValidationError) else str(error)
            raise UsageError(
                "the plan cannot be read", where=str(path), why=why, hint="write one with `mscompile MODEL`"
            ) from error


Keep = float | int
"""A share of a site's channels (float up to 1.0) or their number (int)."""


def selectable(scm: Scm, *, only: str | None = None, freeze: str | None = None) -> dict[int, list[Site]]:
    """Sites by group, for the groups whose units can all be removed exactly and that the patterns admit."""
    groups: dict[int, list[Site]] = {}
    for site in scm.sites:
        groups.setdefault(site.group, []).append(site)
    return {
        group: sites
        for group, sites in groups.items()
        if all(refusal(scm, site) is None for site in sites)
        and (only is None or any(re.search(only, site.tensor) for site in sites))
        and (freeze is None or not any(re.search(freeze, site.tensor) for site in sites))
    }


def refusal(scm: Scm, site: Site) -> str | None:
    """Why a site is left alone, or None if its units can be replaced and removed exactly."""
    if site.refusal is not None:
        return str(site.refusal)
    if len(np.unique(site.units)) < 2:
        return "has a single unit"
    if not has_carriers(scm, site):
        return "is read with zero padding, and no channel can be made constant to carry the bias to the border exactly"
    return None


def resolve_keep(scm: Scm, groups: Mapping[int, Sequence[Site]], keep: Keep | Mapping[str, Keep]) -> dict[int, int]:
    """Channels to keep per group, carrier included. Groups that are not named stay whole.

    Raises
    ------
    UsageError
        A named site does not exist, is left alone, or gets an impossible number.
    """
    if not isinstance(keep, Mapping):
        return {group: _count(keep, _units(sites), "every site") for group, sites in groups.items()}
    known = {site.tensor: site for site in scm.sites}
    chosen: dict[int, int] = {}
    for name, value in keep.items():
        if name not in known:
            raise UsageError(
                f"there is no site {name!r}",
                where=f"--keep {name}={value}",
                why=f"the sites are {', '.join(known) or 'none'}",
                hint="`mscompile inspect MODEL` lists them",
            )
        group = known[name].group
        if group not in groups:
            raise UsageError(
                f"site {name!r} is left alone",
                where=f"--keep {name}={value}",
                why=next((r for s in scm.sites if s.group == group and (r := refusal(scm, s))), "it is frozen"),
                hint="name another site",
            )
        chosen[group] = _count(value, _units(groups[group]), name)
    return chosen


def _units(sites: Sequence[Site]) -> int:
    return len(np.unique(np.concatenate([site.units for site in sites])))


def _count(keep: Keep, size: int, where: str) -> int:
    count = max(1, round(keep * size)) if isinstance(keep, float) else keep
    if not 1 <= count <= size:
        raise UsageError(
            f"cannot keep {keep} of {size} units",
            where=f"--keep for {where}",
            why="a share lies in (0, 1], a number between 1 and the size of the site",
            hint="give a share such as 0.5 or a number such as 128",
        )
    return count
