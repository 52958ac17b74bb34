"""Internals of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

if TYPE_CHECKING:  # older releases, which Gaudi's libraries pin, have none
    from diffusers import ZImageTransformer2DModel

# Internals as well are what blocks take and return, and the parts around them: the families' `transformer` modules call
# these one by one.
__all__ = [
    "QwenImageCausalConv3d",
    "attention_backend",
    "dispatch_attention_fn",
    "image_padding",
    "rotary_axes",
    "rotary_tables",
]


def attention_backend(attention: Attention) -> str | None:
    """Return the name of the kernel that `set_attention_backend` chose, or None."""
    return attention.processor._attention_backend


def image_padding(convolution: QwenImageCausalConv3d) -> tuple[int, int]:
    """Return the padding of a causal convolution in height and width."""
    width, _, height, *_ = convolution._padding
    return height, width


def rotary_axes(transformer: QwenImageTransformer2DModel) -> tuple[float, list[int]]:
    """Return the base of a transformer's rotary frequencies, and the channels of a head for frame, row and column."""
    return transformer.pos_embed.theta, transformer.pos_embed.axes_dim


def rotary_tables(transformer: ZImageTransformer2DModel) -> list[torch.Tensor]:
    """Return a transformer's rotations for each axis of positions: complex (positions, half the axis' channels)."""
    embedder = transformer.rope_embedder
    return embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, theta=embedder.theta)
