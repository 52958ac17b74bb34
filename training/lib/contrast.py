"""Texture, told by place and direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F

WINDOW = 8  # pixels on a side, in which contrast is compared
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # pixels down and to the right


def contrast(pixels: torch.Tensor) -> torch.Tensor:
    """Root mean square of the differences between neighbours of `pixels` (B, 3, 1, H, W), by direction and window.

    (B, 12, H / WINDOW, W / WINDOW).
    """
    frames = pixels.squeeze(2)
    steps = torch.cat([frames - frames.roll(direction, (2, 3)) for direction in DIRECTIONS], dim=1)
    return (F.avg_pool2d(steps**2, WINDOW) + 1e-6).sqrt()  # the root of nothing has no slope
