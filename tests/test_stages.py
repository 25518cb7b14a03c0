"""The stages alone: statistics and plans as files between them, by function and by command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import mlp, samples

from mscompile import cli
from mscompile.calibration.statistics_file import load_statistics, save_statistics
from mscompile.errors import DataError, GoalError, UsageError
from mscompile.models import path as shipped
from mscompile.network.dense import open_dense
from mscompile.options import Options
from mscompile.planning.plan import Plan, resolve_keep
from mscompile.planning.planner import Planner
from mscompile.planning.preparation import eliminate
from mscompile.planning.scores import score
from mscompile.stages import Calibration, apply_plan, calibrate_model, plan_model
from mscompile.verification.verify import FOLD_TOLERANCE

HALF = Options(keep=0.5)
RANKED = {5: 0.89, 20: 0.95}
"""Least rank correlation of predicted and measured risk, by units per site; two near neighbours among five may change places
(0.9, or 0.894 where two others tie at zero)."""
RATIO = 0.1
"""Largest relative error of the median prediction: what is left of one unit's change beyond second order."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped model, its data, and what the three functions write."""
    folder = tmp_path_factory.mktemp("digits")
    for suffix in (".onnx", ".calib.npz"):
        shutil.copy(shipped().with_suffix(suffix), folder)
    model = folder / "digits.onnx"
    calibrate_model(model, None, folder / "s", HALF)
    plan = plan_model(model, folder / "s", folder / "p", HALF)
    done = apply_plan(model, plan, None, folder / "c.onnx")
    assert done.fold_error is not None
    assert 0.0 < done.fold_error < FOLD_TOLERANCE
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=samples())
    calibrate_model(tmp_path / "m.onnx", None, tmp_path / "s", HALF)
    plan_model(tmp_path / "m.onnx", tmp_path / "s", tmp_path / "p", HALF)
    return tmp_path / "m.onnx"


def command(*arguments: object) -> int:
    return cli.run([str(a) for a in arguments])


def same(found: Any, wanted: Any) -> None:
    """Equal to the last bit, dataclasses and mappings all the way down."""
    assert type(found) is type(wanted)
    if is_dataclass(wanted):
        for field in fields(wanted):
            same(getattr(found, field.name), getattr(wanted, field.name))
    elif isinstance(wanted, Mapping):
        assert list(found) == list(wanted)
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    else:
        assert found == wanted


# --- three steps ------------------------------------------------------------------------------------------------------


def test_commands_write_what_the_functions_write(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = digits / "digits.onnx", tmp_path
    assert command("calibrate", model, "-o", out / "s") == 0
    assert command("plan", model, out / "s", "--keep", "0.5", "-o", out / "p") == 0
    assert command("apply", model, out / "p", "-o", out / "c.onnx") == 0
    for name in ("s", "p", "c.onnx"):
        assert (out / name).read_bytes() == (digits / name).read_bytes(), name
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [str(out / name) for name in ("s", "p", "c.onnx")]
    assert "4 sites, 797 samples" in printed[0]
    onnx.checker.check_model(str(out / "c.onnx"), full_check=True)
    assert (out / "c.onnx").stat().st_size < 0.5 * model.stat().st_size


def test_a_plan_file_is_what_a_planner_makes_of_the_statistics(digits: Path) -> None:
    dense = open_dense(digits / "digits.onnx")
    found = load_statistics(digits / "s", model_sha256=dense.sha256)
    scores = score(dense.scm, dense.sites, found, HALF.objective)
    orders = {group: elimination.order for group, elimination in eliminate(dense, found, scores, HALF).items()}
    counts = resolve_keep(dense.scm, dense.groups, 0.5)
    planner = Planner(dense.scm, found, scores, dense.groups, orders, HALF.replacement, HALF.swap)
    plan = planner.plan(counts, dense.sha256)
    assert plan.to_json() == (digits / "p").read_text()
    assert plan.sites
    assert any(site.windows for site in plan.sites)


@pytest.mark.parametrize("units", RANKED)
def test_predictions_are_checked(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], units: int) -> None:
    model = digits / "digits.onnx"
    pages = ("--svg", tmp_path / "p.svg", "--html", tmp_path / "p.html")
    assert command("calibrate", model, "-o", tmp_path / "s", "--check", units, *pages) == 0
    printed = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(printed) if "Spearman" in line)
    assert printed[start].split() == ["site", "units", "Spearman", "variance", "predicted/measured", "of"]
    cells = [line.split() for line in printed[start + 1 :]]
    rows = [row for row in cells if len(row) > 4 and row[1] == str(units)]
    assert [row[0] for row in rows] == [site.tensor for site in open_dense(model).sites]
    for row in rows:
        assert float(row[2]) > RANKED[units], row
        assert abs(float(row[4]) - 1) < RATIO, row
    svg = (tmp_path / "p.svg").read_text()
    assert all(row[0] in svg for row in rows)
    assert svg.count("<title>") > units * len(rows) // 2  # logarithms leave out units without any effect
    page = (tmp_path / "p.html").read_text()
    assert svg in page
    assert page.count("<tr>") == 1 + len(rows)


def test_statistics_files_are_exact(digits: Path, tmp_path: Path) -> None:
    found: Calibration = calibrate_model(digits / "digits.onnx", None, tmp_path / "s", HALF)
    assert found.statistics.windows
    assert found.statistics.curvature
    same(load_statistics(tmp_path / "s", model_sha256=found.dense.sha256), found.statistics)


@pytest.mark.parametrize("options", [Options(replacement="constant"), Options(objective="variance", swap=0.0)])
def test_statistics_without_covariance_or_curvature(small: Path, tmp_path: Path, options: Options) -> None:
    """What was not measured is not in the file either."""
    found = calibrate_model(small, None, tmp_path / "bare", options)
    back = load_statistics(tmp_path / "bare", model_sha256=found.dense.sha256)
    same(back, found.statistics)
    assert (back.moments["h0"].scatter is None) == (options.replacement == "constant")
    assert bool(back.curvature) == (options.objective != "variance")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: object, code: int = 2) -> None:
    assert command(*arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_statistics_of_another_model(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(seed=1), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="do not belong to this model"):
        plan_model(tmp_path / "other.onnx", tmp_path / "s", None, HALF)
    arguments = ("plan", tmp_path / "other.onnx", tmp_path / "s", "--keep", "0.5")
    refused(capsys, "the statistics do not belong to this model", *arguments)


def broken(content: bytes, **header: Any) -> bytes:
    """The file with another header of ours."""
    size = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + size])
    inner = {**json.loads(outer["__metadata__"]["mscompile"]), **header}
    outer["__metadata__"]["mscompile"] = json.dumps({key: value for key, value in inner.items() if value is not None})
    text = json.dumps(outer).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"not a statistics file\n" * 20,
    "cut short": lambda content: content[: len(content) // 2],
    "header alone": lambda content: content[:8],
    "no header of ours": lambda content: content.replace(b'"mscompile"', b'"something"'),
    "another schema": lambda content: broken(content, schema_version=99),
    "no model": lambda content: broken(content, model_sha256=None),
    "moments of the wrong kind": lambda content: broken(content, moments=[1, 2]),
    "windows of the wrong kind": lambda content: broken(content, windows={"y": 3}),
    "header of the wrong kind": lambda content: content.replace(b'"{\\"schema', b'"[\\"schema'),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_files_that_are_no_statistics(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "g").write_bytes(GARBAGE[kind](content))
    assert (tmp_path / "g").read_bytes() != content
    refused(capsys, "the statistics", "plan", small, tmp_path / "g", "--keep", "0.5")
    assert not (tmp_path / "m.plan.json").exists()


def test_statistics_that_are_not_there(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        refused(capsys, "the statistics cannot be read", "plan", small, place, "--keep", "0.5")


def test_a_plan_of_another_model(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(seed=1), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="the plan is of another model"):
        apply_plan(tmp_path / "other.onnx", Plan.read(tmp_path / "p"))
    refused(capsys, "the plan is of another model", "apply", tmp_path / "other.onnx", tmp_path / "p")
    assert not (tmp_path / "other.ms.onnx").exists()


IMPOSSIBLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "no such tensor": ({"tensor": "nowhere"}, "no such site"),
    "the input": ({"tensor": "x"}, "no such site"),
    "the output": ({"tensor": "y"}, "no such site"),
    "another axis": ({"axis": 0}, "it has 16 channels on axis 1"),
    "a site of another size": ({"tensor": "h1"}, "it has 8 channels on axis 1"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_plans_with_impossible_sites(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    change, words = IMPOSSIBLE[kind]
    document = json.loads((tmp_path / "p").read_text())
    document["sites"][0].update(change)
    (tmp_path / "q").write_text(json.dumps(document))
    refused(capsys, words, "apply", small, tmp_path / "q")
    assert not (tmp_path / "m.ms.onnx").exists()


def test_a_site_planned_twice(small: Path, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "p").read_text())
    document["sites"].insert(1, document["sites"][0])
    (tmp_path / "q").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="cannot be cut so"):
        apply_plan(small, Plan.read(tmp_path / "q"), None, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_plans_need_sizes_and_stages_need_data(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "a plan needs sizes", "plan", small, tmp_path / "s")
    with pytest.raises(DataError, match="there is no calibration data"):
        calibrate_model(mlp())
    with pytest.raises(GoalError, match="nothing in this model can be cut"):
        calibrate_model(mlp((6, 3)), {"x": samples()})
    with pytest.raises(UsageError):
        calibrate_model(small, None, tmp_path / "s", HALF)  # exists
    with pytest.raises(UsageError):
        apply_plan(small, Plan.read(tmp_path / "p"), None, small)


def test_a_plan_is_proved_on_generated_inputs_where_there_is_no_data(small: Path, tmp_path: Path) -> None:
    (tmp_path / "m.calib.npz").unlink()
    done = apply_plan(small, Plan.read(tmp_path / "p"), None, tmp_path / "out.onnx")
    assert done.fold_error is not None
    assert done.fold_error < FOLD_TOLERANCE
    assert done.path == tmp_path / "out.onnx"
    assert done.path.exists()


def test_only_sites_in_the_statistics_are_cut(small: Path, tmp_path: Path) -> None:
    found = calibrate_model(small, None, tmp_path / "one", Options(only="h1"))
    assert list(found.statistics.moments) == ["h1"]
    assert [site.tensor for site in plan_model(small, tmp_path / "one", None, HALF).sites] == ["h1"]


def test_an_interrupted_write_leaves_the_old_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (tmp_path / "s").read_bytes()
    found = load_statistics(tmp_path / "s", model_sha256=open_dense(small).sha256)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(Exception, match="disk full"):
        save_statistics(found, tmp_path / "s", model_sha256="")
    assert (tmp_path / "s").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.calib.npz", "s", "p"}


def test_statistics_must_hold_what_a_plan_needs(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_model(small, None, tmp_path / "poor", Options(replacement="constant", objective="variance"))
    refused(
        capsys, "lack covariances", "plan", small, tmp_path / "poor", "--keep", "0.5", "--objective", "variance", "--force"
    )
    poor = ("--replacement", "constant", "--keep", "0.5", "--force")
    refused(capsys, "lack curvature", "plan", small, tmp_path / "poor", *poor)


EDITS: Mapping[str, Callable[[dict[str, Any]], None]] = {
    "no such reader": lambda window: window.update(reader="other"),
    "a tap too few": lambda window: window.update(columns=[row[1:] for row in window["columns"]]),
    "another response": lambda window: window.update(response=window["response"] * 2),
    "not finite": lambda window: window["columns"][0][0].__setitem__(0, None),
}


@pytest.mark.parametrize("kind", EDITS)
def test_new_weights_must_fit_their_reader(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    edited = json.loads((digits / "p").read_text())
    EDITS[kind](next(site for site in edited["sites"] if site["windows"])["windows"][0])
    (tmp_path / "edited").write_text(json.dumps(edited))
    refused(capsys, "plan", "apply", digits / "digits.onnx", tmp_path / "edited", "-o", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_plan_of_another_schema(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = json.loads((digits / "p").read_text()) | {"schema_version": 7}
    (tmp_path / "edited").write_text(json.dumps(edited))
    refused(capsys, "schema_version", "apply", digits / "digits.onnx", tmp_path / "edited", "-o", tmp_path / "out.onnx")


def test_damaged_statistics(small: Path, tmp_path: Path) -> None:
    sha256 = open_dense(small).sha256
    found = load_statistics(tmp_path / "s", model_sha256=sha256)
    for moments in found.moments.values():
        assert moments.scatter is not None
        moments.scatter[0, 0] = np.nan
    save_statistics(found, tmp_path / "damaged", model_sha256=sha256)
    with pytest.raises(UsageError, match="cannot be read"):
        load_statistics(tmp_path / "damaged", model_sha256=sha256)
