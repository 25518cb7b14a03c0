"""How many threads linear algebra takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import mscompile
from mscompile import machine
from mscompile.machine import WIDE, blas_threads, cores, free_memory
from mscompile.options import Options

ROOT = Path(__file__).parents[1]


def threads() -> set[int]:
    """Of each BLAS that is loaded."""
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("max 100000",), 8),
        (("150000 100000",), 2),
        (("50000 100000",), 1),
        (("-1", "100000"), 8),
        (("300000", "100000"), 3),
    ],
)
def test_a_container_has_no_more_cores_than_its_quota(
    files: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = tuple(str(tmp_path / str(i)) for i in range(len(files)))
    for path, content in zip(paths, files, strict=True):
        Path(path).write_text(content + "\n", encoding="ascii")
    monkeypatch.setattr(machine, "QUOTAS", (("/nowhere",), paths))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.__wrapped__() == expected


def test_a_container_has_no_more_memory_than_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    without = free_memory()
    assert without > 1 << 20
    for name, text in {"max": "max", "current": "700", "stat": "anon 400\ninactive_file 200\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text, encoding="ascii")
    assert free_memory() > 1 << 20, "no limit"
    (tmp_path / "memory.max").write_text("1000\n", encoding="ascii")
    assert free_memory() == 500, "pages of files that are not in use can be had"


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
