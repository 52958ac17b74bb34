"""A negative prompt within one evaluation: Normalized Attention Guidance.

Chen et al. 2025 (arXiv 2505.21179). In every block image tokens attend to the prompt and, apart from that, to the
negative prompt; they go on with the one answer extrapolated away from the other. Where classifier-free guidance
evaluates the whole network twice, only the attention is, and the text has the negative prompt's tokens more. It holds
for steps so large, and for distilled models, that guidance of velocities fails.
"""

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
from torch.nn.utils.rnn import pad_sequence

from stages.plan import AttentionGuidanceSpec


@dataclass(frozen=True)
class Negative:
    """What a row steers away from: embeddings (length, width) without padding, and how."""

    embeds: torch.Tensor
    guidance: AttentionGuidanceSpec


@dataclass(frozen=True)
class Avoided:
    """The negative prompts of a batch, whose tokens follow the prompts' own in the text.

    Attributes:
        mask: (batch, length), of their tokens, those that are no padding; none for a row without such a prompt.
        scale, tau, alpha: (batch, 1, 1).
    """

    mask: torch.Tensor
    scale: torch.Tensor
    tau: torch.Tensor
    alpha: torch.Tensor

    def rows(self, chosen: list[int]) -> Avoided:
        return Avoided(self.mask[chosen], self.scale[chosen], self.tau[chosen], self.alpha[chosen])

    def guide(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Attention's answers (batch, tokens, width) to the prompt, led away from those to the negative prompt.

        As far as `scale` says, but with `tau` times the L1 norm at most, and by `alpha` of the way.
        """
        # Under autocast what attends has another dtype than the latents, whose these are.
        scale, tau, alpha = (value.to(positive.dtype) for value in (self.scale, self.tau, self.alpha))
        extrapolated = positive + scale * (positive - negative)
        before, after = (
            answer.norm(p=1, dim=-1, keepdim=True, dtype=torch.float32) for answer in (positive, extrapolated)
        )
        shrink = (tau * before / after).clamp(max=1.0).to(positive.dtype)
        return torch.lerp(positive, shrink * extrapolated, alpha)


def collate_text(
    embeds: Sequence[torch.Tensor],
    negatives: Sequence[Negative | None],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, Avoided | None]:
    """The text of a batch (batch, length, width); the mask of what is no padding, None if nothing is; what to avoid.

    Args:
        embeds: prompt embeddings (length, width) a row; lengths may differ.
        negatives: of each row, or none at all.
    """
    text, mask = _pad(embeds)
    if not any(negatives):
        return text.to(device, dtype), None if mask.all() else mask.to(device), None
    nothing = embeds[0][:0]
    negative_text, negative_mask = _pad([nothing if row is None else row.embeds for row in negatives])
    strengths = [
        (0.0, 1.0, 0.0) if row is None else (row.guidance.scale, row.guidance.tau, row.guidance.alpha)
        for row in negatives
    ]
    scale, tau, alpha = torch.tensor(strengths).to(device, dtype)[:, None, None].unbind(-1)
    joint_mask = torch.cat([mask, negative_mask], dim=1).to(device)
    avoided = Avoided(negative_mask.to(device), scale, tau, alpha)
    return torch.cat([text, negative_text], dim=1).to(device, dtype), joint_mask, avoided


def _pad(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (batch, length, width), and the mask of those that are no padding, on the CPU."""
    lengths = torch.tensor([len(embed) for embed in embeds])
    padded = pad_sequence(list(embeds), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@dataclass(frozen=True)
class _Stream:
    """Queries, keys and values of image or text, each (batch, tokens, heads, width of a head)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @staticmethod
    def project(tokens: torch.Tensor, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], heads: int) -> _Stream:
        """By the layers to queries, keys and values, and the norms of queries and keys."""
        *projections, norm_query, norm_key = layers
        query, key, value = (project(tokens).unflatten(-1, (heads, -1)) for project in projections)
        return _Stream(norm_query(query), norm_key(key), value)

    def part(self, start: int, end: int) -> _Stream:
        """Those tokens alone."""
        return _Stream(self.query[:, start:end], self.key[:, start:end], self.value[:, start:end])

    def at(self, frequencies: torch.Tensor) -> _Stream:
        """The tokens turned to their positions (tokens, half the width of a head)."""
        query, key = (apply_rotary_emb_qwen(of, frequencies, use_real=False) for of in (self.query, self.key))
        return _Stream(query, key, self.value)


class GuidedAttention(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' attention of Qwen-Image, which in a batch that avoids something is guided."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        avoided: Avoided | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (batch, tokens, width) and text (batch, length, width), negative prompts last, after attention.

        Each of the two prompts sees itself and the image, at the positions that it would have alone.
        """
        if avoided is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        assert encoder_hidden_states_mask is not None  # `collate_text` makes both
        assert image_rotary_emb is not None
        image_frequencies, text_frequencies = image_rotary_emb
        total, avoided_length = encoder_hidden_states.shape[1], avoided.mask.shape[1]
        length = total - avoided_length
        of_image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        image = _Stream.project(hidden_states, of_image, attn.heads).at(image_frequencies)
        text = _Stream.project(encoder_hidden_states, of_text, attn.heads)
        prompt = text.part(0, length).at(text_frequencies[:length])
        negative = text.part(length, total).at(text_frequencies[:avoided_length])

        prompt_answer, towards = self._attend(prompt, image, encoder_hidden_states_mask[:, :length])
        negative_answer, away = self._attend(negative, image, avoided.mask)
        answer = avoided.guide(towards, away)
        for layer in attn.to_out:
            answer = layer(answer)
        return answer, attn.to_add_out(torch.cat([prompt_answer, negative_answer], dim=1))

    def _attend(self, text: _Stream, image: _Stream, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint attention's answers to text and image; `mask` (batch, length) is the text's."""
        query, key, value = (
            torch.cat(pair, dim=1)
            for pair in ((text.query, image.query), (text.key, image.key), (text.value, image.value))
        )
        seen = F.pad(mask, (0, image.key.shape[1]), value=True)[:, None, None]
        answers = dispatch_attention_fn(
            query, key, value, attn_mask=seen, backend=self._attention_backend, parallel_config=self._parallel_config
        ).flatten(2)
        return answers[:, : mask.shape[1]], answers[:, mask.shape[1] :]


def guide_attention(transformer: QwenImageTransformer2DModel) -> None:
    """Let every block's attention guide batches that avoid something; others are computed as before."""
    for block in transformer.transformer_blocks:
        processor = GuidedAttention()
        processor._attention_backend = block.attn.processor._attention_backend  # set_attention_backend's
        block.attn.set_processor(processor)
