"""The Qwen-Image autoencoder on single images."""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d


def _convolve_image(self: QwenImageCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    image = x.squeeze(2).contiguous(memory_format=torch.channels_last)
    weight = self.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    padding = (self._padding[2], self._padding[0])
    return F.conv2d(image, weight, self.bias, self.stride[1:], padding).unsqueeze(2)


def convolve_images(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Let `vae` treat every input as one image, in place; exact, and a third of the arithmetic.

    Its causal convolutions pad the past with zeros, so that for a single frame (B, C, 1, H, W) only the last
    temporal slice of each kernel meets data.
    """
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_convolve_image, module)
    return vae
