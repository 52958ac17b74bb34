"""Z-Image's autoencoder, which is that of FLUX."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from stages.families.base import Autoencoder
from stages.latents import unpack


class ZImageAutoencoder(Autoencoder):
    """An image autoencoder whose latents are scaled and shifted."""

    kind = AutoencoderKL

    def decode(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        config, weight = self.module.config, next(self.module.parameters())
        scaled = unpack(latents.to(weight.device), grid) / config.scaling_factor + config.shift_factor
        return self.module.decode(scaled.to(weight.dtype), return_dict=False)[0]
