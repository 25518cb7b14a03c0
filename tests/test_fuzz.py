"""A little of what `tests/fuzz/readers.py` does for as long as one likes, and what the source must not contain."""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import mscompile

_spec = importlib.util.spec_from_file_location("readers", Path(__file__).parent / "fuzz" / "readers.py")
assert _spec is not None
assert _spec.loader is not None
readers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readers)

INPUTS = 150
"""Mutations of each reader's seeds."""


@pytest.mark.parametrize("target", readers.TARGETS)
def test_readers_take_or_refuse(tmp_path: Path, target: str):
    readers.prepare(tmp_path)
    known, rng, read = list(readers.seeds(target)), random.Random(0), readers.TARGETS[target]
    taken = [readers.attempt(read, seed, tmp_path) for seed in known]
    assert any(taken) or target == "certificate"
    for _ in range(INPUTS):
        readers.attempt(read, readers.mutated(rng.choice(known), rng), tmp_path)


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
