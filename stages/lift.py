"""A latent carried to twice its rows and columns at its own noise level, without training.

As in progressive-resolution sampling (arXiv 2605.18736): the foreseen clean latent is enlarged, and noise is added of
which the low frequencies are the small latent's own, so that the image goes on as it was begun.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stages.latents import draw_noise, pack, unpack

_SEED_STRIDE = 0x9E3779B97F4A7C15  # keeps seeds of neighbouring images apart from those of their lifts
_SEEDS = 2**63


def lift(latent: torch.Tensor, clean: torch.Tensor, sigma: float, grid: tuple[int, int], seed: int) -> torch.Tensor:
    """Return the latent (4 * rows * columns, channels) of twice the grid, in float32.

    Args:
        latent: (rows * columns, channels), at noise level `sigma`.
        clean: the clean latent that the last step foresees, likewise.
        sigma: noise level, above 0.
        grid: rows and columns of tokens.
        seed: the image's seed, which decides the noise that is added.
    """
    small, large = latent.float()[None], (2 * grid[0], 2 * grid[1])
    foreseen = unpack(clean.float()[None], grid)
    noise = (unpack(small, grid) - (1 - sigma) * foreseen) / sigma
    fresh = draw_noise((seed + _SEED_STRIDE) % _SEEDS, foreseen.shape[1], large).to(small.device)
    high = unpack(fresh[None], large)
    # White noise has half its deviation in the means of 2x2 blocks.
    low = noise / 2 - F.avg_pool2d(high, 2)
    white = high + F.interpolate(low, scale_factor=2.0, mode="nearest")
    enlarged = F.interpolate(foreseen, scale_factor=2.0, mode="bicubic", align_corners=False)
    return pack((1 - sigma) * enlarged + sigma * white)[0]
