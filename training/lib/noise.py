"""Random noise levels for training."""

from __future__ import annotations

import torch


def draw_sigmas(count: int, mean: float, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Draw logit-normal noise levels (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Args:
        count: number of levels.
        mean: mean of their logits.
        deviation: standard deviation of their logits.
        generator: source of randomness.

    Returns:
        (count,), on the generator's device.
    """
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator, device=generator.device))
