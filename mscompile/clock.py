"""Where the time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by stage; those of a stage within another count for the inner one alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list, repr=False)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken, inner = time.perf_counter() - start, self._inner.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken - inner
            if self._inner:
                self._inner[-1] += taken
