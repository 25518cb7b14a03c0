"""What is built from the repository holds all that it needs, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("passes", "models")
SHIPPED = {
    "py.typed",
    "report.schema.json",
    "audit/audit.schema.json",
    "pages/page.css",
    "pages/base.html",
    "pages/audit.html",
    "pages/compile.html",
    "pages/figures.html",
    "pages/audit.md",
    "pages/compile.md",
    "models/digits.onnx",
    "models/digits.calib.npz",
    "models/digits.md",
}

pytest.importorskip("setuptools", minversion="77")
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("there is no repository around the tests", allow_module_level=True)


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def copy(folder: Path, *, links: bool) -> Path:
    """A copy of the repository; without links, git writes their targets into text files."""
    ignored = shutil.ignore_patterns(".*", "venv", "build", "dist", "*.egg-info", "__pycache__")
    repository = folder / "repository"
    shutil.copytree(ROOT, repository, symlinks=True, ignore=ignored)
    if not links:
        for name in LINKS:
            (repository / "mscompile" / name).unlink()
            (repository / "mscompile" / name).write_text(f"../{name}")
    (repository / "README.md").touch()
    return repository


def built(folder: Path, kind: str, *, links: bool = True) -> Path:
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(folder)!r})"
    python("-c", code, cwd=copy(folder, links=links))
    (archive,) = folder.glob("mscompile-*.*")
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), "wheel")


def sources() -> set[str]:
    """Python files of the package, by their place in it."""
    own = {p.relative_to(ROOT / "mscompile") for p in (ROOT / "mscompile").rglob("*.py")}
    linked = {p.relative_to(ROOT) for name in LINKS for p in (ROOT / name).rglob("*.py")}
    return {path.as_posix() for path in own | linked}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mscompile"}
    held = {name.removeprefix("mscompile/") for name in names if name.startswith("mscompile/")}
    assert held == sources() | SHIPPED
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_clone_without_links_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(built(tmp_path, "wheel", links=False)) as other:
        for name in {*one.namelist(), *other.namelist()}:
            assert name.endswith("RECORD") or one.read(name) == other.read(name)


def test_the_source_distribution_holds_the_repository(tmp_path: Path):
    with tarfile.open(built(tmp_path, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    package = {name if name.startswith(LINKS) else f"mscompile/{name}" for name in sources() | SHIPPED}
    assert names >= tests | package | {"LICENSE", "README.md", "pyproject.toml", "MANIFEST.in"}


def test_the_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path):
    place, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    python("-m", "zipfile", "-e", str(wheel), str(place), cwd=empty)
    environment = {"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    code = "import mscompile.passes, mscompile.models; print(mscompile.passes.__file__, mscompile.models.path(), sep='\\n')"
    assert [Path(line).parts[len(place.parts)] for line in python("-c", code, cwd=empty, **environment).splitlines()] == [
        "mscompile",
        "mscompile",
    ]
    version = wheel.name.split("-")[1]
    assert python("-m", "mscompile", "--version", cwd=empty, **environment) == f"mscompile {version}\n"
    model = str(place / "mscompile" / "models" / "digits.onnx")
    assert "can be cut" in python("-m", "mscompile", "inspect", model, cwd=empty, **environment)
    assert list(empty.iterdir()) == []
