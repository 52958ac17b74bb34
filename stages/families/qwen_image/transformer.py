"""Qwen-Image's transformer block by block, equal to its `forward`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from stages.families.base import Tokens, Transformer
from stages.families.qwen_image.attention import replace_attention
from stages.families.qwen_image.rotary import Rotary
from stages.text import NegativeBatch, Rows, Text


@dataclass(frozen=True)
class QwenImageContext:
    """Further inputs of Qwen-Image's blocks.

    Attributes:
        temb: (batch, width), embedding of the noise level.
        rotary: rotary embeddings of image and text, the same for every row.
        mask: bool (batch, length), see `Text`.
        negative: see `Text`.
    """

    temb: torch.Tensor
    rotary: Rotary
    mask: torch.Tensor | None
    negative: NegativeBatch | None

    def __getitem__(self, rows: Rows) -> QwenImageContext:
        mask = None if self.mask is None else self.mask[rows]
        negative = None if self.negative is None else self.negative[rows]
        return QwenImageContext(self.temb[rows], self.rotary, mask, negative)


class QwenImageTransformer(Transformer):
    """Double-stream blocks: image and text tokens, each with its own weights, attend to each other."""

    kind = QwenImageTransformer2DModel

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        config = module.config
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope must add up to attention_head_dim, {config.attention_head_dim}, "
                f"not {list(config.axes_dims_rope)}"
            )
        for flag in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(flag):
                raise ValueError(f"{flag} must be false: such a variant of Qwen-Image is not served")
        replace_attention(module)

    def avoid_complex(self) -> None:
        self.module.pos_embed.real = True

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.transformer_blocks

    @property
    def text_width(self) -> int:
        return self.module.config.joint_attention_dim

    @property
    def token_channels(self) -> int:
        return self.module.config.in_channels

    def enter(self, latents: torch.Tensor, sigmas: torch.Tensor, text: Text, grid: tuple[int, int]) -> Tokens:
        module = self.module
        image = module.img_in(latents.to(self.dtype))
        words = module.txt_in(module.txt_norm(text.embeds))
        temb = module.time_text_embed(sigmas.to(latents.device, self.dtype), image)
        rotary = module.pos_embed([[(1, *grid)]], max_txt_seq_len=words.shape[1], device=latents.device)
        return Tokens(image, words, QwenImageContext(temb, rotary, text.mask, text.negative))

    def modulate(self, entered: Tokens) -> torch.Tensor:
        first: Any = self.blocks[0]
        shift, scale = first.img_mod(_context(entered).temb)[:, None].chunk(6, dim=-1)[:2]
        return first.img_norm1(entered.image) * (1 + scale) + shift

    def run_block(self, index: int, tokens: Tokens) -> Tokens:
        context = _context(tokens)
        text, image = self.blocks[index](
            hidden_states=tokens.image,
            encoder_hidden_states=tokens.text,
            encoder_hidden_states_mask=context.mask,
            temb=context.temb,
            image_rotary_emb=context.rotary,
            joint_attention_kwargs={} if context.negative is None else {"negatives": context.negative},
        )
        return replace(tokens, image=image, text=text)

    def leave(self, tokens: Tokens) -> torch.Tensor:
        return self.module.proj_out(self.module.norm_out(tokens.image, _context(tokens).temb)).float()

    @staticmethod
    def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Combine two velocities, rescaled token by token to the positive one's norm, as `QwenImagePipeline` does."""
        combined = negative + scale * (positive - negative)
        return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def _context(tokens: Tokens) -> QwenImageContext:
    assert isinstance(tokens.context, QwenImageContext)
    return tokens.context
