"""Local contrast as a measure of texture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

WINDOW = 8  # side in pixels of the windows over which contrast is averaged
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # pixels down and to the right


def contrast(pixels: torch.Tensor) -> torch.Tensor:
    """Return the root mean square difference of neighbouring pixels, for each channel, direction and window.

    Args:
        pixels: (batch, 3, 1, height, width).

    Returns:
        (batch, 12, height / WINDOW, width / WINDOW).
    """
    frames = pixels.squeeze(2)
    steps = torch.cat([frames - frames.roll(direction, (2, 3)) for direction in DIRECTIONS], dim=1)
    return (F.avg_pool2d(steps**2, WINDOW) + 1e-6).sqrt()  # the gradient of the root is infinite at 0
