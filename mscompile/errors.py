"""Errors a user can act on: what happened, where, why, and what to try next.

Every error carries the exit code of the command line:

==  ==========================================================
1   a bug of ours (any other exception)
2   usage or configuration
3   model rejected: malformed or unsafe
4   calibration or audit data rejected
5   verification failed; nothing written unless asked
6   goal not reached, or nothing to do
7   unsupported operator, opset, provider or runtime
8   resource limit: memory, time, disk
==  ==========================================================
"""

from __future__ import annotations

from typing import ClassVar


class MscompileError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    what
        What went wrong, one clause without a final stop.
    where
        File, tensor, node or option.
    why
        The rule that was broken, with the values found.
    hint
        One thing to try.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str, why: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.hint = what, where, why, hint

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  why:   {self.why}\n  try:   {self.hint}"


class UsageError(MscompileError):
    """The command or its configuration does not make sense."""

    exit_code = 2


class ModelError(MscompileError):
    """The model file is malformed or unsafe."""

    exit_code = 3


class DataError(MscompileError):
    """Calibration or audit data cannot be used."""

    exit_code = 4


class VerificationError(MscompileError):
    """A compiled model failed its proof or its checks."""

    exit_code = 5


class GoalError(MscompileError):
    """The goal was not reached, or there is nothing to do."""

    exit_code = 6


class UnsupportedError(MscompileError):
    """An operator, opset, provider or runtime that is not supported."""

    exit_code = 7


class ResourceError(MscompileError):
    """Memory, time or disk ran out."""

    exit_code = 8
