"""The Qwen-Image autoencoder on single images."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from stages.families.base import Autoencoder
from stages.internals.diffusers import QwenImageCausalConv3d, image_padding
from stages.latents import unpack


class QwenImageAutoencoder(Autoencoder):
    """A video autoencoder applied to single frames; latents have zero mean and unit deviation."""

    kind = AutoencoderKLQwenImage

    def __init__(self, module: Any) -> None:
        super().__init__(convolve_images(module))
        config = module.config
        for key, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
            values = config[key]
            numbers = [value for value in values if isinstance(value, int | float) and least < value < math.inf]
            if len(numbers) != len(values) or len(numbers) != config.z_dim:
                above = "" if least < 0 else " above 0"
                raise ValueError(f"{key} must be z_dim, {config.z_dim}, numbers{above}")

    def decode(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        weight = next(self.module.parameters())  # diffusers' own `device` and `dtype` visit every module each time
        mean, std = moments(self.module, weight.device)
        frames = unpack(latents.to(weight.device), grid)[:, :, None] * std + mean
        return self.module.decode(frames.to(weight.dtype), return_dict=False)[0][:, :, 0]


def moments(vae: AutoencoderKLQwenImage, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation (1, channels, 1, 1, 1) of the latents that `vae` encodes to, from its config."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


class _ImageConv(QwenImageCausalConv3d):
    """A causal convolution of a single frame (batch, channels, 1, height, width)."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        image = x.squeeze(2).contiguous(memory_format=torch.channels_last)
        weight = self.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
        return F.conv2d(image, weight, self.bias, self.stride[1:], image_padding(self)).unsqueeze(2)


def convolve_images(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Make `vae` treat every input as a single image, in place; exact, with a third of the arithmetic.

    Its causal convolutions pad the past with zeros, so for a single frame (batch, channels, 1, height, width) only the
    last temporal slice of each kernel meets data.
    """
    for module in vae.modules():
        if type(module) is QwenImageCausalConv3d:
            module.__class__ = _ImageConv
    return vae
