"""Latents as tokens: 2x2 patches in row-major order, each with its values ordered by channel first."""

from __future__ import annotations

import torch


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents (batch, channels, height, width) into tokens (batch, height * width / 4, 4 * channels)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Unpack tokens (batch, rows * columns, 4 * channels) into latents (batch, channels, 2 * rows, 2 * columns)."""
    rows, columns = grid
    patches = tokens.view(len(tokens), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 2 * rows, 2 * columns)


def draw_noise(seed: int, channels: int, grid: tuple[int, int]) -> torch.Tensor:
    """Draw the standard normal tokens (rows * columns, 4 * channels), in float32, that an image starts from.

    The noise depends on the seed alone, not on backend, batch or replica: each image has its own generator on the CPU.
    diffusers draws the same noise for `generator=torch.Generator().manual_seed(seed)`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid
    return pack(torch.randn((1, channels, 2 * rows, 2 * columns), generator=generator))[0]
