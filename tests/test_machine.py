"""How many threads linear algebra takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import mscompile
from mscompile.machine import WIDE, blas_threads
from mscompile.options import Options

ROOT = Path(__file__).parents[1]


def threads() -> set[int]:
    """Of each BLAS that is loaded."""
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.skipif(not threads(), reason="this BLAS cannot be asked for its threads")
def test_small_matrices_have_one_thread_and_wide_ones_all() -> None:
    before = threads()
    with blas_threads():
        assert threads() == {1}
        with blas_threads(WIDE):
            assert threads() == {max(before)}
        assert threads() == {1}
    assert threads() == before


@pytest.mark.skipif(not threads(), reason="this BLAS cannot be asked for its threads")
def test_a_compile_takes_one_and_gives_back_what_there_was() -> None:
    before, during = threads(), set()

    def watch(steps, _title, _count=None):
        during.update(threads())
        yield from steps

    mscompile.compile_model(ROOT / "models" / "digits.onnx", options=Options(keep=0.5), progress=watch)
    assert during == {1}
    assert threads() == before
