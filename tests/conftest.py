"""What all tests share."""

from __future__ import annotations

import pytest

import mscompile  # noqa: F401  # before tests load onnxruntime: what it is told of telemetry counts then


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of it, and measure operators once instead of for long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("mscompile.network.latency.POINT_SECONDS", 0.0)
    monkeypatch.setattr("mscompile.network.latency.POINT_RUNS", 1)
