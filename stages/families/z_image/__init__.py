"""Z-Image: single-stream blocks over image and text, a language model as text encoder, and an image autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.families.base import Family

if TYPE_CHECKING:
    from stages.families.z_image.autoencoder import ZImageAutoencoder
    from stages.families.z_image.text import ZImageTextEncoder
    from stages.families.z_image.transformer import ZImageTransformer


class ZImage(Family):
    """Z-Image (https://arxiv.org/abs/2511.22699), as diffusers' `ZImagePipeline` runs it."""

    name = "z_image"
    pipeline = "ZImagePipeline"
    pixels_per_token = 16
    longest_prompt = 512
    template_tokens = 16
    empty_prompt = ""

    def count_blocks(self, transformer: Mapping[str, Any]) -> int:
        return transformer["n_layers"]

    def latent_channels(self, transformer: Mapping[str, Any]) -> int:
        return transformer["in_channels"]

    @property
    def text_encoder(self) -> type[ZImageTextEncoder]:
        from stages.families.z_image.text import ZImageTextEncoder

        return ZImageTextEncoder

    @property
    def transformer(self) -> type[ZImageTransformer]:
        from stages.families.z_image.transformer import ZImageTransformer

        return ZImageTransformer

    @property
    def autoencoder(self) -> type[ZImageAutoencoder]:
        from stages.families.z_image.autoencoder import ZImageAutoencoder

        return ZImageAutoencoder


FAMILY = ZImage()
