"""A clock to set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Seconds since the epoch, as a test has them."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now
