"""A record of the work on an image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One stage's work on one image.

    Attributes:
        stage: `encode`, `base`, `bridge`, `distilled` or `decode`.
        start, end: seconds since the epoch.
        nfe: network evaluations; blocks that a cache skipped are not counted.
    """

    stage: str
    start: float
    end: float
    nfe: float = 0.0
