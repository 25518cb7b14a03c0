"""Seconds by stage."""

from __future__ import annotations

import time

import pytest

from mscompile.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock by which one second passes at every look."""
    looks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    return Clock()


def test_seconds_add_up(clock: Clock) -> None:
    for _ in range(3):
        with clock.time("plan"):
            pass
    assert clock.seconds == {"plan": 3.0}


def test_a_stage_within_another_counts_once(clock: Clock) -> None:
    with clock.time("search"):  # looks 0 to 5
        for _ in range(2):
            with clock.time("plan"):
                pass
    assert clock.seconds == {"plan": 2.0, "search": 3.0}


def test_a_stage_within_itself_counts_once(clock: Clock) -> None:
    with clock.time("plan"), clock.time("plan"):
        pass
    assert clock.seconds == {"plan": 3.0}


def test_seconds_of_a_stage_that_failed_count(clock: Clock) -> None:
    with pytest.raises(ValueError, match="no"), clock.time("load"):
        raise ValueError("no")
    assert clock.seconds == {"load": 1.0}
