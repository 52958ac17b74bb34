"""Attention of Z-Image's blocks; diffusers' own processor multiplies complex numbers, which not every device has."""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention

from stages.families.rotary import rotate
from stages.internals.diffusers import attention_backend, dispatch_attention_fn


class RotatedAttention:
    """Self-attention of tokens at their positions.

    A processor of diffusers' `Attention`; equal to `ZSingleStreamAttnProcessor`.
    """

    def __init__(self, backend: str | None = None) -> None:
        """Attend by diffusers' attention backend of this name, by default its choice."""
        self._attention_backend = backend  # the name that diffusers' `set_attention_backend` sets

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None,
        attention_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
    ) -> torch.Tensor:
        """Return tokens (batch, tokens, width) after attention.

        Args:
            attn: the layers.
            hidden_states: (batch, tokens, width).
            encoder_hidden_states: of no meaning here.
            attention_mask: bool (batch, tokens), False for tokens that do not exist, or None if all do.
            freqs_cis: rotations (batch, tokens, 1, half the width of a head), see `rotate`.
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        mask = None if attention_mask is None else attention_mask[:, None, None]
        query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        output = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend).flatten(2)
        for layer in attn.to_out:
            output = layer(output)
        return output


def replace_attention(transformer: ZImageTransformer2DModel) -> None:
    """Let every block attend by `RotatedAttention`."""
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        block.attention.set_processor(RotatedAttention(attention_backend(block.attention)))
