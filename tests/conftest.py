"""What all tests share."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Ran, Run
from small_models import mlp, samples

import mscompile  # noqa: F401  # before anything loads onnxruntime: what it is told of telemetry counts then
from mscompile import cli
from mscompile.models import path as shipped


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of it, and measure operators once instead of for long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("mscompile.network.latency.POINT_SECONDS", 0.0)
    monkeypatch.setattr("mscompile.network.latency.POINT_RUNS", 1)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure models once instead of for long."""
    monkeypatch.setattr("mscompile.network.sizes.LATENCY_SECONDS", 0.0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, in an empty folder; crash files go there, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    for suffix in (".onnx", ".calib.npz"):
        shutil.copy(shipped().with_suffix(suffix), tmp_path)
    return tmp_path / "digits.onnx"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small model beside its data."""
    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=samples())
    return tmp_path / "m.onnx"
