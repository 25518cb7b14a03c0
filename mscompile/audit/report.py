"""The certificate of an audit: what was asked, what was run, what was found, and what it does not say.

It holds all that is needed to run the trials again. Its JSON Schema is shipped as ``audit.schema.json``; write it again
after a change with ``python -m mscompile.audit.report``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mscompile.errors import UsageError, VerificationError
from mscompile.intake.documents import faults
from mscompile.verification.certificate import Verdict
from mscompile.verification.interchange import Law

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("audit.schema.json")

Convention = Literal["matched", "own"]
Text = Annotated[
    str, BeforeValidator(lambda text: text.encode("utf-8", "replace").decode() if isinstance(text, str) else text)
]
"""Text from the file system, where names may hold bytes that are no characters."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(gt=0.0, lt=1.0)]
MOST_TRIALS = 1 << 31
"""Up to here bounds can be computed."""
Count = Annotated[int, Field(ge=0, le=MOST_TRIALS)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AuditedFile(_Section):
    """A file and its digest."""

    path: Text
    sha256: str


class AuditedData(_Section):
    """The data, and whether it took part in making the compiled model.

    `disjoint` is ``yes`` where the digest of every sample was compared with those used in compiling, ``no`` where `shared`
    of them were found there, ``unknown`` where no digests are at hand. `compared_with` says whose. `sha256` is that of the
    samples used: the first `limit` of the source but those `left_out`, with the labels named.
    """

    source: Text
    sha256: str
    samples: int
    pairs: int
    disjoint: Literal["yes", "no", "unknown"]
    shared: int
    compared_with: Text | None
    labels: str | None
    limit: int | None
    left_out: list[int]
    repeated: int
    notes: list[Text]


class AuditedSite(_Section):
    """A site of tau: dense channel `dense_channels[i]` is compiled channel `compiled_channels[i]`.

    `alike` is the share of the dense channels' variance that the compiled ones show without intervention.
    """

    dense: str
    compiled: str
    dense_axis: int
    compiled_axis: int
    size: int
    width: int
    dense_channels: list[int] = Field(min_length=1)
    compiled_channels: list[int]
    alike: float | None


class ComparedOutput(_Section):
    """An output of both models, how it is compared, and its weight among several, see `Claim`."""

    dense: str
    compiled: str
    weight: float
    metrics: list[str]


class Asked(_Section):
    """What was asked for: all that running the audit again needs beside files and data. None where that was left open."""

    fidelity: float
    delta: float
    laws: list[Law]
    swaps: list[float]
    conventions: list[Convention]
    metrics: list[str | None]
    outputs: dict[str, float] | None
    trials: int | None
    table: int
    explain: bool
    provenance: bool
    seed: int


class Check(_Section):
    """A self-check made before any verdict; None where it does not apply."""

    name: str
    passed: bool | None
    detail: Text


class Claim(_Section):
    """IIA ≥ `fidelity` under one law, convention and metric, of one output or of several together.

    The loss of several outputs in a trial is the largest of theirs, each times its weight over the largest weight: where
    weights are equal and metrics count disagreements, all must agree.

    Trials were looked at one by one, and stopped as soon as either verdict was sure: each is wrong with probability at most
    `delta`. `disagreements` is the sum of losses in [0, 1]. `iia_lower` and `iia_upper` hold at that confidence each.
    `hoeffding_lower` and `betting_lower` are what other bounds make of the same trials.
    """

    outputs: list[str]
    law: Law
    swap: Share
    convention: Convention
    metric: str
    fidelity: Probability
    delta: Probability
    verdict: Verdict
    trials: Count
    disagreements: Annotated[float, Field(ge=0.0)]
    iia: float
    iia_lower: float
    iia_upper: float
    hoeffding_lower: float
    betting_lower: float


class LawFound(_Section):
    """Measured under one law, not certified: IIA in both conventions, and differences of the first output, matched.

    Of several outputs, IIA is that of all together, and `by_output` that of each, matched.
    """

    law: Law
    swap: Share
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)]
    iia_matched: Share
    iia_own: Share
    by_output: dict[str, float]
    logit_mse_relative: float
    kl: float | None


class PlainFound(_Section):
    """Without intervention; differences and accuracies are of the first output, see `LawFound`."""

    agreement: float
    by_output: dict[str, float]
    logit_mse_relative: float
    accuracy_dense: float | None
    accuracy_compiled: float | None


class Unmapped(_Section):
    """How often the dense answer stays when units outside tau are resampled from a third input and the others are kept."""

    trials: int
    agreement: float
    agreement_lower: float
    agreement_upper: float
    delta: float


class Blame(_Section):
    """The squared difference of the outputs under the first claim's law, over their variance, and what it consists of.

    `set`: what no affine fold of the retained units could avoid without interchange; `law`: what interchange adds to that,
    since dense units outside tau keep base values; `fold`: what this fold adds to the best one. `floor` = set + law. To
    second order in the change, and additive over sites; None, with a `note`, where the compiler has no statistics of a site.
    """

    measured: float
    floor: float | None
    set: float | None
    law: float | None
    fold: float | None
    note: str


class Explanation(_Section):
    """What explains the number: effects and blame on the first output.

    `effect_r2` is the share of the squared changes of the dense output by interchange that the compiled one shows.
    """

    output: str
    effect_r2: float | None
    blame: Blame
    unmapped: Unmapped | None


class Counterexample(_Section):
    """One interchange on which the models disagree, with as few units swapped as were found to suffice.

    `swapped` gives dense channels by tensor; `folder` holds it for onnxruntime alone.
    """

    base: int
    source: int
    swapped: dict[str, list[int]]
    swapped_before: int
    dense_answer: list[float]
    compiled_answer: list[float]
    outputs: tuple[str, str]
    folder: Text | None


class Comparison(_Section):
    """Another compiled model on the same trials: how much more often it disagrees, with an interval valid at any time.

    The paired test looks at trials in which one loss is larger than the other: `for_other` and `against_other` count them up
    to the `verdict`, which says whether the other model is better or worse, wrong with probability at most `delta`.
    """

    other: AuditedFile
    trials: int
    iia: float
    iia_other: float
    difference: float
    difference_lower: float
    difference_upper: float
    for_other: int
    against_other: int
    verdict: Literal["better", "worse", "undecided"]
    delta: float


class AuditReport(_Section):
    """The whole certificate."""

    schema_version: Literal[2] = 2
    kind: Literal["audit"] = "audit"
    versions: dict[str, str]
    command: Text
    verdict: Verdict
    because: str
    dense: AuditedFile
    compiled: AuditedFile
    tau_origin: Literal["given", "plan", "metadata", "weights"]
    tau: list[AuditedSite]
    data: AuditedData
    outputs: list[ComparedOutput]
    asked: Asked
    batch_size: int
    checks: list[Check]
    claims: Annotated[list[Claim], Field(min_length=1)]
    laws: list[LawFound]
    plain: PlainFound
    explanation: Explanation | None
    counterexample: Counterexample | None
    comparison: Comparison | None
    scope: list[str]
    warnings: list[Text]
    digest: str = ""

    def sealed(self) -> Self:
        """The certificate with the digest of everything else in it."""
        return self.model_copy(update={"digest": self._digest()})

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """Text of the file; there is only one for each content."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, content: bytes, where: str) -> AuditReport:
        """Read a certificate's file.

        Raises
        ------
        UsageError
            It is none.
        VerificationError
            It was changed after it was written.
        """
        try:
            report = cls.model_validate_json(content)
        except ValidationError as error:
            raise UsageError(
                "this is no certificate", where=where, why=faults(error), hint="give what `audit` wrote"
            ) from error
        if report.digest != report._digest() or content != report.to_json().encode():
            raise VerificationError(
                "the certificate was changed",
                where=where,
                why="its content does not have the digest it carries, or is not written as it was",
                hint="get the original file",
            )
        return report


def schema() -> dict[str, Any]:
    """JSON Schema of the certificate."""
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **AuditReport.model_json_schema(mode="serialization"),
    }
    return {**described, "title": "Certificate of an audit by mscompile"}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
