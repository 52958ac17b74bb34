"""Attention of Qwen-Image's blocks, guided away from negative prompts where a batch has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)

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

    def at(self, frequencies: torch.Tensor) -> _Stream:
        """Apply rotary embeddings: `frequencies` of the tokens' positions (tokens, half the width of a head)."""
        query, key = (apply_rotary_emb_qwen(of, frequencies, use_real=False) for of in (self.query, self.key))
        return _Stream(query, key, self.value)


class GuidedAttention(QwenDoubleStreamAttnProcessor2_0):
    """Qwen-Image's attention from diffusers, guided in a batch that has negative prompts."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        negatives: NegativeBatch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (batch, tokens, width) and text (batch, length, width), negative prompts last, after attention.

        Each of the two prompts attends to itself and the image, at the positions that it would have alone.
        """
        if negatives is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        assert encoder_hidden_states_mask is not None  # `stages.text.collate` makes both
        assert image_rotary_emb is not None
        image_frequencies, text_frequencies = image_rotary_emb
        total, negative_length = encoder_hidden_states.shape[1], negatives.mask.shape[1]
        length = total - negative_length
        of_image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        image = _Stream.project(hidden_states, of_image, attn.heads).at(image_frequencies)
        text = _Stream.project(encoder_hidden_states, of_text, attn.heads)
        prompt = text.between(0, length).at(text_frequencies[:length])
        negative = text.between(length, total).at(text_frequencies[:negative_length])

        prompt_output, positive_image = self._attend(prompt, image, encoder_hidden_states_mask[:, :length])
        negative_output, negative_image = self._attend(negative, image, negatives.mask)
        output = negatives.guide(positive_image, negative_image)
        for layer in attn.to_out:
            output = layer(output)
        return output, attn.to_add_out(torch.cat([prompt_output, negative_output], dim=1))

    def _attend(self, text: _Stream, image: _Stream, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return joint attention's outputs for text and image; `mask` (batch, length) is the text's."""
        query, key, value = (
            torch.cat(pair, dim=1)
            for pair in ((text.query, image.query), (text.key, image.key), (text.value, image.value))
        )
        joint_mask = F.pad(mask, (0, image.key.shape[1]), value=True)[:, None, None]
        outputs = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=joint_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        return outputs[:, : mask.shape[1]], outputs[:, mask.shape[1] :]


def guide_attention(transformer: QwenImageTransformer2DModel) -> None:
    """Let every block's attention guide batches with negative prompts; other batches are computed as before.

    Blocks that do so already keep their processors: training wraps its transformer anew for each evaluation.
    """
    for block in transformer.transformer_blocks:
        if isinstance(block.attn.processor, GuidedAttention):
            continue
        processor = GuidedAttention()
        processor._attention_backend = block.attn.processor._attention_backend  # as set_attention_backend chose it
        block.attn.set_processor(processor)
