"""Attention of Qwen-Image's blocks, guided away from negative prompts where a batch has some.

diffusers' own processor multiplies complex numbers, which not every device has, and doesn't guide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention

from stages.families.qwen_image.rotary import Rotary, RotaryEmbedding
from stages.families.rotary import rotate
from stages.internals.diffusers import attention_backend, dispatch_attention_fn, rotary_axes
from stages.text import NegativeBatch


@dataclass(frozen=True)
class _Stream:
    """Queries, keys and values of image or text, each (batch, tokens, heads, width of a head)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @staticmethod
    def project(tokens: torch.Tensor, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], heads: int) -> _Stream:
        """Project tokens by `layers`: those to queries, keys and values, then the norms of queries and keys."""
        *projections, norm_query, norm_key = layers
        query, key, value = (project(tokens).unflatten(-1, (heads, -1)) for project in projections)
        return _Stream(norm_query(query), norm_key(key), value)

    def between(self, start: int, end: int) -> _Stream:
        """Return the tokens from `start` to `end`."""
        return _Stream(self.query[:, start:end], self.key[:, start:end], self.value[:, start:end])

    def at(self, rotations: torch.Tensor) -> _Stream:
        """Rotate queries and keys to their positions, see `Rotary`."""
        return _Stream(rotate(self.query, rotations), rotate(self.key, rotations), self.value)

    def before(self, other: _Stream) -> _Stream:
        """Join these tokens and then the other stream's."""
        pairs = ((self.query, other.query), (self.key, other.key), (self.value, other.value))
        return _Stream(*(torch.cat(pair, dim=1) for pair in pairs))


class GuidedAttention:
    """Joint attention of text and image, guided in a batch that has negative prompts.

    A processor of diffusers' `Attention`; equal to `QwenDoubleStreamAttnProcessor2_0` where nothing is guided.
    """

    def __init__(self, backend: str | None = None) -> None:
        """Attend by diffusers' attention backend of this name, by default its choice."""
        self._attention_backend = backend  # the name that diffusers' `set_attention_backend` sets

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        image_rotary_emb: Rotary,
        attention_mask: None = None,
        negatives: NegativeBatch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (batch, tokens, width) and text (batch, length, width), negative prompts last, after attention.

        Each of the two prompts attends to itself and the image, at the positions that it would have alone.
        """
        of_image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        image = _Stream.project(hidden_states, of_image, attn.heads).at(image_rotary_emb.image)
        text = _Stream.project(encoder_hidden_states, of_text, attn.heads)
        positions = image_rotary_emb.text
        if negatives is None:
            text_output, output = self._attend(text.at(positions), image, encoder_hidden_states_mask)
        else:
            assert encoder_hidden_states_mask is not None  # `stages.text.collate` makes both
            total = encoder_hidden_states.shape[1]
            length = total - negatives.mask.shape[1]
            prompt = text.between(0, length).at(positions[:length])
            negative = text.between(length, total).at(positions[: total - length])
            prompt_output, positive_image = self._attend(prompt, image, encoder_hidden_states_mask[:, :length])
            negative_output, negative_image = self._attend(negative, image, negatives.mask)
            text_output = torch.cat([prompt_output, negative_output], dim=1)
            output = negatives.guide(positive_image, negative_image)
        for layer in attn.to_out:
            output = layer(output)
        return output, attn.to_add_out(text_output)

    def _attend(self, text: _Stream, image: _Stream, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return joint attention's outputs for text and image; `mask` (batch, length) is the text's."""
        length, joint = text.key.shape[1], text.before(image)
        joint_mask = None if mask is None else F.pad(mask, (0, image.key.shape[1]), value=True)[:, None, None]
        outputs = dispatch_attention_fn(
            joint.query, joint.key, joint.value, attn_mask=joint_mask, backend=self._attention_backend
        ).flatten(2)
        # Contiguous, because a linear layer of anything else adds its bias in a pass of its own.
        return outputs[:, :length].contiguous(), outputs[:, length:].contiguous()


def replace_attention(transformer: QwenImageTransformer2DModel) -> None:
    """Let every block attend by `GuidedAttention`, at positions of `RotaryEmbedding`.

    A transformer that does so already stays as it is: training wraps its own anew for each evaluation.
    """
    if isinstance(transformer.pos_embed, RotaryEmbedding):
        return
    transformer.pos_embed = RotaryEmbedding(*rotary_axes(transformer))
    for block in transformer.transformer_blocks:
        block.attn.set_processor(GuidedAttention(attention_backend(block.attn)))
