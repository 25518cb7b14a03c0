"""What can be asked of a compile."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mscompile.errors import UsageError
from mscompile.planning.plan import Keep
from mscompile.planning.replacements import REPLACEMENTS
from mscompile.planning.scores import OBJECTIVES
from mscompile.verification.metrics import METRICS
from mscompile.verification.verify import Law


def _is_pattern(text: str | None) -> bool:
    try:
        re.compile(text or "")
    except re.error:
        return False
    return True


USUAL = 64
"""Samples of a batch, where there is room."""


@dataclass(frozen=True)
class Options:
    """How to compile. Defaults are those of the command line.

    Attributes
    ----------
    keep
        Share of every site's channels to keep, or shares (float) and numbers (int) by site. None: search for `fidelity`.
    params, macs, latency
        Share of the dense model's parameters, multiply–accumulates or measured time to reach, at least risk over all sites.
    fidelity
        Interchange-intervention accuracy to certify, where no other goal is given.
    objective, replacement
        Keys of `OBJECTIVES` and `REPLACEMENTS`.
    selection
        ``joint``: backward elimination, which only affine replacement under an objective with curvature has; ``additive``:
        by score. See `joint` for what is in force.
    probes
        Random seeds per sample of the reverse pass.
    anchors
        Units per site that are intervened on, to scale the predictions for constants; 0 for none.
    output
        Weight by name of the outputs whose change is scored; None for all of floating point, see
        `DenseModel.weighted_outputs`.
    recalibrate
        Fit readers once more on the network as compiled so far, see `mscompile.planning.recalibration`.
    cache
        Keep measured latencies of operators in the user's cache folder.
    law, swap
        Interchange law, see `Fidelity`, and its swap probability.
    delta
        Error probability of the certificate.
    metric
        Key of `METRICS`; chosen by the output's shape if None.
    labels
        Name of the labels in the data; recognised by itself if None.
    samples
        Samples to use at most; all if None.
    batch_size, seed
        Of calibration and verification, `USUAL` if None, or fewer where those take too much memory; of splits and
        interchanges.
    only, freeze
        Regular expressions on site names: cut only these, never those.
    """

    keep: Keep | Mapping[str, Keep] | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    fidelity: float = 0.95
    objective: Literal["logit-mse", "kl", "cross-entropy", "cwvar", "variance", "magnitude", "random"] = "logit-mse"
    selection: Literal["joint", "additive"] = "joint"
    probes: int = 4
    anchors: int = 4
    output: Mapping[str, float] | None = None
    replacement: Literal["affine", "affine-pointwise", "affine-parents", "constant"] = "affine"
    recalibrate: bool = True
    cache: bool = True
    law: Law = "one-site"
    swap: float = 0.1
    delta: float = 0.05
    metric: Literal["argmax", "kl", "distance", "cosine", "equality"] | None = None
    labels: str | None = None
    samples: int | None = None
    batch_size: int | None = None
    seed: int = 0
    only: str | None = None
    freeze: str | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("fidelity", 0.0 < self.fidelity < 1.0, "lies between 0 and 1"),
            *((name, share is None or 0.0 < share <= 1.0, "is a share in (0, 1]") for name, share in self._costs),
            ("goals", len(self._given) <= 1, "is one of keep, params, macs and latency"),
            ("swap", 0.0 <= self.swap <= 1.0, "lies in [0, 1]"),
            ("delta", 0.0 < self.delta < 1.0, "lies between 0 and 1"),
            ("selection", self.selection in ("joint", "additive"), "is joint or additive"),
            ("probes", self.probes >= 1, "is at least 1"),
            ("anchors", self.anchors >= 0, "is not negative"),
            (
                "output",
                self.output is None or (bool(self.output) and all(0.0 < w < math.inf for w in self.output.values())),
                "gives outputs positive weights",
            ),
            ("batch_size", self.batch >= 1, "is at least 1"),
            ("seed", self.seed >= 0, "is not negative"),
            ("objective", self.objective in OBJECTIVES, f"is one of {', '.join(OBJECTIVES)}"),
            ("replacement", self.replacement in REPLACEMENTS, f"is one of {', '.join(REPLACEMENTS)}"),
            ("law", self.law in get_args(Law), f"is one of {', '.join(get_args(Law))}"),
            ("metric", self.metric is None or self.metric in METRICS, f"is one of {', '.join(METRICS)}"),
            ("keep", not isinstance(self.keep, float) or 0.0 < self.keep <= 1.0, "is a share in (0, 1]"),
            (
                "keep",
                not isinstance(self.keep, Mapping)
                or all(0.0 < k <= 1.0 if isinstance(k, float) else k >= 1 for k in self.keep.values()),
                "gives each site a share in (0, 1] or a number from 1 on",
            ),
            ("only", _is_pattern(self.only), "is a regular expression"),
            ("freeze", _is_pattern(self.freeze), "is a regular expression"),
        )
        for name, holds, rule in checks:
            if not holds:
                raise UsageError(
                    f"option {name} makes no sense",
                    where=f"{name} = {getattr(self, name, self._given)!r}",
                    why=f"it {rule}",
                    hint="see `mscompile compile --help`",
                )

    @property
    def batch(self) -> int:
        """Samples at a time."""
        return USUAL if self.batch_size is None else self.batch_size

    @property
    def _costs(self) -> tuple[tuple[str, float | None], ...]:
        return (("params", self.params), ("macs", self.macs), ("latency", self.latency))

    @property
    def _given(self) -> tuple[str, ...]:
        """Goals given."""
        costs = tuple(name for name, share in self._costs if share is not None)
        return costs if self.keep is None else ("keep", *costs)

    @property
    def sized(self) -> bool:
        """Whether the goal is a size or a time, for which units have to be ranked."""
        return bool(self._given)

    @property
    def share(self) -> float | None:
        """Share of the dense model's cost that is the goal; None where the goal is none."""
        return next((share for _, share in self._costs if share is not None), None)

    @property
    def joint(self) -> bool:
        """Whether units are chosen jointly."""
        return (
            self.selection == "joint"
            and self.replacement in ("affine", "affine-pointwise")
            and OBJECTIVES[self.objective].curvature != "none"
        )

    @property
    def goal(self) -> str:
        """The goal in the words of the command line."""
        for name, share in self._costs:
            if share is not None:
                return f"--{name} {share:g}"
        if self.keep is None:
            return f"--fidelity {self.fidelity:g}"
        if isinstance(self.keep, Mapping):
            return " ".join(f"--keep {name}={value}" for name, value in self.keep.items())
        return f"--keep {self.keep:g}"


def idle(options: Options, given: Collection[str]) -> list[str]:
    """What is to be said of options that are given and change nothing beside the others, by their names."""
    curvature = OBJECTIVES[options.objective].curvature != "none"
    scaled = options.replacement == "constant" and curvature and options.objective not in ("cross-entropy", "cwvar")
    idle = {
        "selection": options.selection == "joint" and not options.joint,
        "probes": not curvature,
        "anchors": not scaled,
    }
    rest = f"--objective {options.objective} --replacement {options.replacement}"
    return [f"--{name} changes nothing with {rest}" for name, unused in idle.items() if unused and name in given]


def what_candidates_depend_on(options: Options) -> dict[str, Any]:
    """All options but those that only choose among candidates."""
    goals = ("keep", "params", "macs", "latency", "fidelity", "delta", "cache")
    return {name: value for name, value in vars(options).items() if name not in goals}
