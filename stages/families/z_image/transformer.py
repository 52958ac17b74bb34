"""Z-Image's transformer block by block, equal to its `forward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import nn

from stages.families.base import Tokens, Transformer
from stages.families.rotary import lay_out
from stages.families.z_image.attention import replace_attention
from stages.internals.diffusers import rotary_tables
from stages.text import Rows, Text

_MULTIPLE = 32  # image and text are each padded to a multiple of this many tokens
_PATCH = "2-1"  # the embedder of 2x2 patches of one frame


@dataclass(frozen=True)
class ZImageContext:
    """Further inputs of Z-Image's blocks.

    Attributes:
        temb: (batch, width), embedding of the noise level.
        rotary: (batch, tokens, 1, half the width of a head), rotations of image and then text, see
            `stages.families.rotary`.
        mask: bool (batch, tokens), False for tokens that do not exist, or None if all do.
        count: number of the latent's tokens, which are the first of the image's.
    """

    temb: torch.Tensor
    rotary: torch.Tensor
    mask: torch.Tensor | None
    count: int

    def __getitem__(self, rows: Rows) -> ZImageContext:
        mask = None if self.mask is None else self.mask[rows]
        return ZImageContext(self.temb[rows], self.rotary[rows], mask, self.count)


class ZImageTransformer(Transformer):
    """Single-stream blocks: image and text are refined separately, then pass the blocks as one sequence.

    The model's time runs from 0 at pure noise to 1, its velocity points towards the clean latent, and a token's
    channels come last. The image's positions follow those of the text, so they differ between the rows of a batch.
    """

    kind = ZImageTransformer2DModel

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        replace_attention(module)
        self._real = False
        self._tables = lru_cache(maxsize=1)(partial(_place, rotary_tables(module)))  # a bound method would be a cycle

    def avoid_complex(self) -> None:
        self._real = True

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.layers

    @property
    def text_width(self) -> int:
        return self.module.config.cap_feat_dim

    @property
    def token_channels(self) -> int:
        return 4 * self.module.config.in_channels

    def enter(self, latents: torch.Tensor, sigmas: torch.Tensor, text: Text, grid: tuple[int, int]) -> Tokens:
        module, dtype, device = self.module, self.dtype, latents.device
        time = (1 - sigmas.float()).to(device, dtype)
        temb = module.t_embedder(time * module.t_scale).to(dtype)
        mask = text.full_mask()
        lengths = _round_up(mask.sum(1))  # of the texts, padding included

        channels_last = latents.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)
        image = _pad(module.all_x_embedder[_PATCH](channels_last.to(dtype)), module.x_pad_token)
        image_rotary = self._rotary(_image_positions(lengths, grid, image.shape[1]))
        for layer in module.noise_refiner:
            image = layer(image, None, image_rotary, temb)

        words = torch.where(mask[..., None], module.cap_embedder(text.embeds), module.cap_pad_token)
        words = _pad(words, module.cap_pad_token)
        position = torch.arange(words.shape[1], device=device).expand(len(words), -1)
        present = position < lengths[:, None]
        words = torch.where(present[..., None], words, 0)
        text_rotary = self._rotary(F.pad(position[..., None] + 1, (0, 2)))
        text_mask = None if text.mask is None else present
        for layer in module.context_refiner:
            words = layer(words, text_mask, text_rotary)

        rotary = torch.cat([image_rotary, text_rotary], dim=1)
        joint = None if text_mask is None else F.pad(text_mask, (image.shape[1], 0), value=True)
        return Tokens(image, words, ZImageContext(temb, rotary, joint, latents.shape[1]))

    def modulate(self, entered: Tokens) -> torch.Tensor:
        first: Any = self.blocks[0]
        scale = first.adaLN_modulation(_context(entered).temb)[:, None].chunk(4, dim=-1)[0]
        return first.attention_norm1(entered.image) * (1 + scale)

    def run_block(self, index: int, tokens: Tokens) -> Tokens:
        context = _context(tokens)
        joint = torch.cat([tokens.image, tokens.text], dim=1)
        joint = self.blocks[index](joint, context.mask, context.rotary, context.temb)
        image, text = joint.split([tokens.image.shape[1], tokens.text.shape[1]], dim=1)
        return replace(tokens, image=image, text=text)

    def leave(self, tokens: Tokens) -> torch.Tensor:
        context = _context(tokens)
        channels_last = self.module.all_final_layer[_PATCH](tokens.image[:, : context.count], c=context.temb)
        return -channels_last.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2).float()

    @staticmethod
    def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Combine two velocities; diffusers' `ZImagePipeline` calls `scale` - 1 its guidance scale."""
        return negative + scale * (positive - negative)

    def _rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the rotations of positions (batch, tokens, 3), see `ZImageContext`."""
        tables = self._tables(positions.device, self._real)
        parts = [table[positions[..., axis]] for axis, table in enumerate(tables)]
        return torch.cat(parts, dim=2)[:, :, None]


def _place(tables: Sequence[torch.Tensor], device: torch.device, real: bool) -> list[torch.Tensor]:
    return [lay_out(table, real).to(device) for table in tables]


def _round_up(counts: torch.Tensor) -> torch.Tensor:
    return (counts + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE


def _pad(tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Pad tokens (batch, tokens, width) with `padding` (1, width) to a multiple of `_MULTIPLE`."""
    missing = -tokens.shape[1] % _MULTIPLE
    return torch.cat([tokens, padding.expand(len(tokens), missing, -1)], dim=1) if missing else tokens


def _image_positions(lengths: torch.Tensor, grid: tuple[int, int], tokens: int) -> torch.Tensor:
    """Return positions (batch, tokens, 3) of an image after texts of these lengths; its padding is at 0."""
    rows, columns = grid
    axes = (torch.arange(rows, device=lengths.device), torch.arange(columns, device=lengths.device))
    within = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).expand(len(lengths), -1, -1)
    after = (lengths + 1)[:, None, None].expand(-1, rows * columns, 1)
    return F.pad(torch.cat([after, within], dim=-1), (0, 0, 0, tokens - rows * columns))


def _context(tokens: Tokens) -> ZImageContext:
    assert isinstance(tokens.context, ZImageContext)
    return tokens.context
