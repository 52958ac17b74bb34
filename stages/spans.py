"""What was done for an image, and when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One stage's work on one image.

    Attributes:
        stage: `encode`, `base`, `bridge`, `distilled` or `decode`.
        start, end: seconds since the epoch.
        nfe: network evaluations; what a cache skipped is not counted.
    """

    stage: str
    start: float
    end: float
    nfe: float = 0.0
