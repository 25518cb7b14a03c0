"""The report: what was done, what it costs, what was proved, and what was left alone.

Its JSON Schema is shipped as ``report.schema.json``; write it again after a change with ``python -m mscompile.report``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

from mscompile.network.sizes import Sizes

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

Text = Annotated[
    str, BeforeValidator(lambda text: text.encode("utf-8", "replace").decode() if isinstance(text, str) else text)
]
"""Text from the file system, where names may hold bytes that are no characters."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileReport(_Section):
    """A file and its digest."""

    path: Text | None
    sha256: str


class DataReport(_Section):
    """The data and how it was split: `calibrate` to fit, `choose` to choose among candidates, `certify` to certify.

    `fingerprints` are the first 48 bits of the sha256 of each sample's inputs, sorted, as base64: an audit can then tell
    whether its data took part.
    """

    source: Text
    sha256: str
    samples: int
    split: dict[str, int]
    seed: int
    fingerprints: str
    notes: list[Text]


class SiteReport(_Section):
    """One site: what was kept, or why it was left alone.

    Sites of one `group` hold the same units, which go together. `lossless` counts replaced channels that are, on the
    calibration data, affine functions of the others to float32 rounding. `predicted_risk` and `measured_risk` are half
    the expected squared error of the same quantity, which `basis` names; measured is None where no prediction of the
    same quantity exists.
    """

    name: str
    axis: int
    group: int
    size: int
    kept: int
    width: int
    lossless: int
    readers: list[str]
    basis: str | None
    predicted_risk: float | None
    measured_risk: float | None
    left_alone: str | None


class CoverageReport(_Section):
    """One weight tensor: ``cut``, ``whole`` (could be cut, was not) or ``left alone`` with the reason."""

    tensor: str
    node: str
    operator: str
    shape: list[int]
    status: str
    reason: str | None


class SizeReport(_Section):
    """Sizes before and after."""

    dense: Sizes
    compiled: Sizes
    latency_batch: int | None


class LawReport(_Section):
    """Interchange under one law and swap probability."""

    law: str
    swap: float
    trials: int
    iia: float
    logit_mse_relative: float
    kl: float | None


class FidelityReport(LawReport):
    """Agreement under interchange on data that took no part in calibration or choice.

    `iia_lower` is certified for interchange by `law` with probability `swap`, with error probability `delta`. Of the last of
    several candidates tested in a fixed order (`attempts`) it is the goal that they were tested for. `stress` holds other
    laws, measured and not certified.
    """

    metric: str
    iia_lower: float
    delta: float
    attempts: int
    disagreements: float
    agreement: float
    accuracy_dense: float | None
    accuracy_compiled: float | None
    full_source_checked: bool
    stress: list[LawReport]


class GoalReport(_Section):
    """What was asked for, and what was reached: ``keep``, ``params``, ``macs``, ``latency`` or ``fidelity``.

    Costs are shares of the dense model's, the latency as `sizes` has it; fidelity is the certified bound. `asked` and
    `reached` are None where sizes were given site by site.
    """

    kind: str
    asked: float | None
    reached: float | None


class StepReport(_Section):
    """What replacing one more site did to the outputs, in the order of the graph, on samples held out.

    `predicted` is the risk measured before plus the site's own predicted one, `measured` that of all sites up to this one.
    `refitted` lists the readers with new weights; `rolled_back` says that those did worse than the plan's and were taken
    back.
    """

    site: str
    predicted: float | None
    measured: float
    refitted: list[str]
    rolled_back: bool


class CandidateReport(_Section):
    """One point of the frontier, before re-calibration, measured on the `choose` part.

    Shares are of the dense model's: `size` is the mean of those of parameters and multiply–accumulates, `latency` is
    foretold by a table of this machine's operators.
    """

    size: float
    params: float
    macs: float
    latency: float
    trials: int
    iia: float
    iia_lower: float
    agreement: float


class Report(_Section):
    """The whole report. `reused` says what was found in the work folder, and not done again."""

    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str]
    command: Text
    goal: str
    goal_reached: GoalReport | None
    options: dict[str, JsonValue]
    objective: str
    replacement: str
    seed: int
    dense: FileReport
    compiled: FileReport | None
    plan_sha256: str
    data: DataReport | None
    sites: list[SiteReport]
    coverage: list[CoverageReport]
    sizes: SizeReport
    fold_error: float | None
    fold_check: str
    deployment_difference: float | None
    fidelity: FidelityReport | None
    recalibration: list[StepReport]
    candidates: list[CandidateReport]
    timings: dict[str, float]
    warnings: list[Text]
    reused: list[str] = []


def schema() -> dict[str, object]:
    """JSON Schema of the report."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="serialization")}
    return {**described, "title": "Report of mscompile"}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
