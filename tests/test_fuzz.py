"""A little of what `tests/fuzz/readers.py` does for as long as one likes, and what the source must not contain."""

from __future__ import annotations

import ast
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import readers
from fuzz.mutations import seal, written
from fuzz.seeds import made

import mscompile
from mscompile.errors import UsageError
from mscompile.pages import render

INPUTS = 150
"""Mutations of each reader's seeds."""


@pytest.mark.parametrize("target", readers.TARGETS)
def test_readers_take_or_refuse(tmp_path: Path, target: str):
    readers.prepare(tmp_path)
    known, rng, read = list(readers.seeds(target)), random.Random(0), readers.TARGETS[target]
    taken = [readers.attempt(read, seed, tmp_path) for seed in known]
    assert any(taken)
    for _ in range(INPUTS):
        readers.attempt(read, readers.changed(rng.choice(known), rng), tmp_path)


def test_changed_certificates_get_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: what each step refuses is counted, and some certificates are taken in the end."""
    from mscompile.audit import setup, tau
    from mscompile.audit.report import AuditReport
    from mscompile.errors import UsageError, VerificationError

    readers.prepare(tmp_path)
    reached: Counter[str] = Counter()
    parse, resolve, made = AuditReport.parse, tau.resolve, setup.AuditOptions.__post_init__

    def counted(step: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            try:
                found = function(*arguments)
            except (UsageError, VerificationError):
                reached[f"{step} refuses"] += 1
                raise
            reached[f"{step} takes"] += 1
            return found

        return run

    monkeypatch.setattr(AuditReport, "parse", staticmethod(counted("parse", parse)))
    monkeypatch.setattr(setup.AuditOptions, "__post_init__", counted("options", made))
    monkeypatch.setattr(tau, "resolve", counted("tau", resolve))
    known, rng = list(readers.seeds("certificate")), random.Random(1)
    for _ in range(4 * INPUTS):
        readers.attempt(readers.read_certificate, readers.changed(rng.choice(known), rng), tmp_path)
    assert set(reached) == {f"{step} {found}" for step in ("parse", "options", "tau") for found in ("takes", "refuses")}
    assert reached["tau takes"] > INPUTS // 3


# --- the findings -------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
TORN = b'{"name": "a"}\n' + DEEP.encode()
KEPT = (TORN,)
"""Journals are taken for what is sound in them."""


def sealed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A certificate that says something else, and seems to be as it was written."""
    document = json.loads(made()["small.audit.json"])
    change(document)
    document["digest"] = seal(document)
    return written(document).encode()


def parcel(kind: str) -> bytes:
    """A parcel of an array of a type."""
    inner = json.dumps({"header": {}, "arrays": {"x": [kind, [0]]}})
    head = json.dumps({"__metadata__": {"parcel": inner}, "x": {"data_offsets": [0, 0]}}).encode()
    return len(head).to_bytes(8, "little") + head


@pytest.mark.parametrize(
    ("target", "content"),
    [
        pytest.param("tau", DEEP.encode(), id="tau too deep"),
        pytest.param("metadata", DEEP.encode(), id="metadata too deep"),
        pytest.param("plan", DEEP.encode(), id="plan too deep"),
        pytest.param("report", DEEP.encode(), id="report too deep"),
        pytest.param("certificate", DEEP.encode(), id="certificate too deep"),
        pytest.param("latencies", DEEP.encode(), id="latencies too deep"),
        pytest.param("latencies", b'{"a": 1' + b"0" * 400 + b"}", id="a latency beyond floats"),
        pytest.param("latencies", b'{"a": NaN, "b": -1, "c": 1e999}', id="latencies that are none"),
        pytest.param("journal", TORN, id="a journal too deep"),
        pytest.param("journal", b'{"name": "data", "value": 5}', id="a journal with a number for a digest"),
        pytest.param("tau", b'{"h0": []}', id="no channel"),
        pytest.param("tau", b'{"h0": [1' + b"0" * 30 + b"]}", id="a channel beyond integers"),
        pytest.param("parcel", DEEP.encode(), id="no parcel"),
        pytest.param("parcel", parcel(",loat64"), id="a type that is none"),
        pytest.param("parcel", parcel("object"), id="a type of objects"),
        pytest.param("certificate", lambda c: c["claims"].clear(), id="no claim"),
        pytest.param("certificate", lambda c: c["laws"][0].update(iia_own=7.0), id="an IIA above 1"),
        pytest.param("certificate", lambda c: c["claims"][0].update(trials=1 << 62), id="more trials than there can be"),
        pytest.param("certificate", lambda c: c["plain"].update(agreement=float("nan")), id="no number"),
        pytest.param("certificate", lambda c: c["tau"][0].update(dense_channels=[]), id="a site without channels"),
    ],
)
def test_what_was_found_is_refused(tmp_path: Path, target: str, content: Any):
    readers.prepare(tmp_path)
    taken = readers.attempt(readers.TARGETS[target], sealed(content) if callable(content) else content, tmp_path)
    assert taken == (content in KEPT)


def test_a_report_that_contradicts_itself(tmp_path: Path):
    path = tmp_path / "c.json"
    output = {"dense": "other", "compiled": "other", "weight": 1.0, "metrics": ["argmax"]}
    path.write_bytes(sealed(lambda c: c["outputs"].append(output)))
    with pytest.raises(UsageError, match="contradicts itself"):
        render(path, "html")


# --- the source ---------------------------------------------------------------------------------------------------------

ROOT = Path(mscompile.__file__).parent
_PICKLES = "pickle cPickle dill cloudpickle joblib shelve marshal pty commands"
_NETWORK = "socket ssl http urllib urllib3 requests httpx aiohttp ftplib smtplib telnetlib xmlrpc webbrowser huggingface_hub"
UNWANTED = frozenset([*_PICKLES.split(), *_NETWORK.split(), "torch.hub", "onnx.hub"])
"""Modules that unpickle, or reach for the network."""
CALLS = frozenset(["eval", "exec", "__import__", "compile"])
SCRIPT = ("sources.py", "metrics.py")
"""Where a script that the user names is run; nowhere else is anything."""


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in (ROOT, ROOT / "passes"):
        for path in sorted(folder.rglob("*.py")):
            if "models" not in path.relative_to(ROOT).parts:
                yield path, ast.parse(path.read_text())


def test_source_neither_unpickles_nor_evaluates_nor_reaches_out():
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name in UNWANTED or name.split(".")[0] in UNWANTED for name in names):
                found.append((path.name, node.lineno, names))
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            dotted = ast.unparse(node.func)
            if (name in CALLS and path.name not in SCRIPT) or dotted in ("os.system", "os.popen", "np.fromstring"):
                found.append((path.name, node.lineno, dotted))
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
                if (keyword.arg, value) in (("allow_pickle", True), ("shell", True)):
                    found.append((path.name, node.lineno, ast.unparse(keyword)))
    assert found == []


def test_only_the_trial_and_workers_start_processes():
    starting = {path.relative_to(ROOT).as_posix() for path, tree in sources() if "subprocess" in ast.unparse(tree)}
    assert starting <= {"intake/trial.py"} | {name for name in starting if name.startswith("runs/")}
