"""Whether an image's numbers are finite: one that is not fails alone."""

from __future__ import annotations

import torch

from stages.errors import NotFinite


def check_finite(tensor: torch.Tensor, stage: str) -> torch.Tensor:
    """Return `tensor`, of one image after `stage`; raises NotFinite."""
    if not torch.isfinite(tensor).all():
        raise NotFinite(stage)
    return tensor
