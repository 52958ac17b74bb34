"""Numbers that are none: what fails an image, and that image alone."""

from __future__ import annotations

import torch


class NotFinite(ArithmeticError):
    """An image whose numbers overflowed, or were NaN; `stage` says where that was first seen."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the image is not finite after stage {stage}")
        self.stage = stage

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str]]:
        return type(self), (self.stage,)


def check_finite(tensor: torch.Tensor, stage: str) -> torch.Tensor:
    """`tensor`, of one image after `stage`; raises NotFinite."""
    if not torch.isfinite(tensor).all():
        raise NotFinite(stage)
    return tensor
