"""The check that an image's numbers are finite, so that a bad image fails alone."""

from __future__ import annotations

import torch

from stages.errors import NotFinite


def check_finite(tensor: torch.Tensor, stage: str) -> torch.Tensor:
    """Return `tensor`, which belongs to one image after `stage`; raises NotFinite."""
    if not torch.isfinite(tensor).all():
        raise NotFinite(stage)
    return tensor
