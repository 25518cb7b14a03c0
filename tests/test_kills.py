"""A compile that is killed leaves the old output or the new one, no lock, and what the next run goes on with."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kills import kill


def test_kills(tmp_path: Path):
    found = kill(2, 1, tmp_path)
    assert found.bad == 0
    assert sum(found.codes.values()) == 2
