"""Where onnxruntime runs: on the processor or on a GPU. What was asked for is never replaced by something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mscompile.errors import UnsupportedError

Provider = Literal["cpu", "cuda"]
TITLES: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What onnxruntime calls them."""


@dataclass
class _Choice:
    name: Provider = "cpu"


_choice = _Choice()


def chosen() -> Provider:
    """The provider that sessions are opened on."""
    return _choice.name


def choose(name: Provider) -> None:
    """Open all sessions from now on on a provider.

    Raises
    ------
    UnsupportedError
        The onnxruntime that is installed has not got it.
    """
    if name != "cpu":
        import onnxruntime as ort

        if TITLES[name] not in ort.get_available_providers():
            raise absent(name, f"onnxruntime {ort.__version__} here offers {', '.join(ort.get_available_providers())}")
    _choice.name = name


@contextlib.contextmanager
def on(name: Provider) -> Iterator[None]:
    """Open sessions on a provider within a block."""
    before = chosen()
    choose(name)
    try:
        yield
    finally:
        _choice.name = before


def absent(name: Provider, why: str) -> UnsupportedError:
    """The refusal of a provider that is not there."""
    return UnsupportedError(
        "the provider is not there",
        where=f"--provider {name}",
        why=why,
        hint="install the gpu extra on a machine with such a device (see the README), or leave --provider out",
    )
