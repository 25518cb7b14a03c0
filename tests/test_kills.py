"""A compile or an audit that is killed leaves the old output or the new, no lock, no process, and what is gone on with."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kills import SUBJECTS, kill


def test_kills(tmp_path: Path):
    for name, given in (("compile", None), ("workers", None), ("audit", tmp_path / "compile-fresh")):
        found = kill(SUBJECTS[name], 1, 1, tmp_path, given=given)
        assert found.bad == 0
        assert sum(found.codes.values()) == sum(found.stages.values()) == 1
