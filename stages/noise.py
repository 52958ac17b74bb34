"""The starting latent: a function of the seed alone."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline

# PyTorch's CPU generator looks at no more bits than these: larger seeds would repeat smaller ones' images.
MAX_SEED = 2**32 - 1


def draw_noise(seed: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Standard normal tokens (height * width / 4, 4 * channels) in float32 for a latent of height x width.

    Drawn on the CPU, one generator an image, so that neither backend nor batch nor replica count shows; the
    same numbers as diffusers draws for `generator=torch.Generator().manual_seed(seed)`.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, 1, channels, height, width), generator=generator)
    return QwenImagePipeline._pack_latents(noise, 1, channels, height, width)[0]
