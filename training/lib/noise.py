"""Noise levels to train at."""

from __future__ import annotations

import torch


def draw_sigmas(count: int, mean: float, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels (count,), Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator, device=generator.device))
