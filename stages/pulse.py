"""A sign of life of a device: since when it has been at the same piece of work, and how long it has worked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pulse:
    """Knows how long the thread of a device has been at its piece of work: a step, a prompt or a batch of images.

    Attributes:
        busy: seconds that all pieces of work together took that have ended.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self._started: float | None = None

    def during(self, work: Callable[P, T]) -> Callable[P, T]:
        """Wrap a piece of work; the device has a single thread, so that none begins before another has ended."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            self._started = started = time.monotonic()
            try:
                return work(*args, **kwargs)
            finally:
                self._started = None
                self.busy += time.monotonic() - started

        return timed

    @property
    def seconds(self) -> float:
        """Seconds since the piece of work at hand began, 0 if there is none; for any thread."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started
