"""The certificate as an in-toto Statement, unsigned: signing is left to the user's tool.

The predicate is that of the open proposal for results of evaluations,
https://github.com/in-toto/attestation/blob/main/spec/predicates/eval-result.md.
"""

from __future__ import annotations

import datetime
import json
from pathlib import PurePath
from typing import Any

from mscompile.audit.report import AuditReport

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/eval-result/v0.1"


def make_statement(report: AuditReport, at: datetime.datetime) -> dict[str, Any]:
    """Subjects are the two model files; each claim is ``metric >= threshold``, passed where it is certified."""
    version = report.versions["mscompile"]
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": PurePath(file.path).name, "digest": {"sha256": file.sha256}} for file in (report.compiled, report.dense)
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "verifier": {"id": "https://pypi.org/project/mscompile"},
            "evaluatedAt": at.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "suite": {"name": "mscompile audit", "version": version},
            "harness": {"name": "mscompile", "version": version},
            "claims": [
                {
                    "metric": f"IIA ({c.metric}, {c.law}, swap {c.swap:g}, {c.convention} values)",
                    "comparator": ">=",
                    "threshold": f"{c.fidelity:g}",
                    "passed": c.verdict == "certified" and report.verdict == "certified",
                    "verdict": c.verdict,
                    "confidence": f"{1 - c.delta:g}",
                    "sampleSize": c.trials,
                    "disagreements": f"{c.disagreements:g}",
                }
                for c in report.claims
            ],
            "sampleSize": max((c.trials for c in report.claims), default=0),
            "commitments": {
                "model": {"alg": "sha256", "value": report.compiled.sha256, "salted": False},
                "dataset": {"alg": "sha256", "value": report.data.sha256, "salted": False},
            },
            "assuranceLevel": "self_attested",
            "subjectProfile": "public-model",
            "receipt": {"schema": f"mscompile-audit/v{report.schema_version}", "sha256": report.digest},
        },
    }


def statement_text(report: AuditReport, at: datetime.datetime) -> str:
    """The Statement as JSON."""
    return json.dumps(make_statement(report, at), indent=1) + "\n"
