"""Qwen-Image: double-stream blocks, a vision-language model as text encoder, and a video autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.families.base import Family

if TYPE_CHECKING:
    from stages.families.qwen_image.autoencoder import QwenImageAutoencoder
    from stages.families.qwen_image.text import QwenImageTextEncoder
    from stages.families.qwen_image.transformer import QwenImageTransformer

# Eight pixels to a latent, two latents to a token: fixed by the architecture.
PIXELS_PER_TOKEN = 16

# What users of diffusers pass when they want no particular negative prompt.
EMPTY_PROMPT = " "


class QwenImage(Family):
    """Qwen-Image (https://arxiv.org/abs/2508.02324), as diffusers' `QwenImagePipeline` runs it."""

    name = "qwen_image"
    pipeline = "QwenImagePipeline"
    pixels_per_token = PIXELS_PER_TOKEN
    longest_prompt = 1019  # diffusers keeps these and the template's last five
    template_tokens = 5
    empty_prompt = EMPTY_PROMPT
    guides_attention = True

    def count_blocks(self, transformer: Mapping[str, Any]) -> int:
        return transformer["num_layers"]

    def latent_channels(self, transformer: Mapping[str, Any]) -> int:
        return transformer["in_channels"] // 4

    @property
    def text_encoder(self) -> type[QwenImageTextEncoder]:
        from stages.families.qwen_image.text import QwenImageTextEncoder

        return QwenImageTextEncoder

    @property
    def transformer(self) -> type[QwenImageTransformer]:
        from stages.families.qwen_image.transformer import QwenImageTransformer

        return QwenImageTransformer

    @property
    def autoencoder(self) -> type[QwenImageAutoencoder]:
        from stages.families.qwen_image.autoencoder import QwenImageAutoencoder

        return QwenImageAutoencoder


FAMILY = QwenImage()
