"""One evaluation of the transformer, on rows that may each skip part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence

from stages.caches import Evaluation, StepCache


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
) -> torch.Tensor:
    """One forward pass: velocities (batch, tokens, channels) in float32.

    Args:
        latents: (batch, tokens, channels).
        sigmas: (batch,), each row's noise level, which is also its timestep.
        embeds: prompt embeddings (length, width) a row; lengths may differ.
        grid: rows and columns of tokens, the same for all.
    """
    padded, mask = _pad(embeds)
    velocity = transformer(
        hidden_states=latents.to(transformer.dtype),
        timestep=sigmas.to(latents.device, transformer.dtype),
        encoder_hidden_states=padded.to(latents.device, transformer.dtype),
        encoder_hidden_states_mask=None if mask is None else mask.to(latents.device),
        img_shapes=[[(1, *grid)]] * len(latents),
        return_dict=False,
    )[0]
    return velocity.float()


def predict_velocity_cached(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
    caches: Sequence[StepCache | None],
) -> tuple[torch.Tensor, list[float]]:
    """As `predict_velocity`, but each row goes only as far through the blocks as its cache makes it.

    Returns:
        Velocities (batch, tokens, channels) in float32, and each row's share of a network evaluation: 1 where it
        was computed in full, one block's where its cache answered after the first, 0 where it answered before.
    """
    velocities = [None if cache is None else cache.velocity() for cache in caches]
    costs = [0.0] * len(caches)
    asked = [row for row, velocity in enumerate(velocities) if velocity is None]
    if asked:
        entered = _enter(transformer, latents[asked], sigmas[asked], [embeds[row] for row in asked], grid)
        first, *others = transformer.transformer_blocks
        after_first = entered.through([first])
        heads = after_first.image - entered.image
        tails = [None if (cache := caches[row]) is None else cache.tail(heads[i]) for i, row in enumerate(asked)]
        missed = [i for i, tail in enumerate(tails) if tail is None]
        image = after_first.image.clone()
        if missed:
            image[missed] = after_first.rows(missed).through(others).image
        for i, tail in enumerate(tails):
            costs[asked[i]] = 1.0 if tail is None else 1 / len(transformer.transformer_blocks)
            if tail is not None:
                image[i] += tail
        outputs = transformer.proj_out(transformer.norm_out(image, entered.temb)).float()
        for i, row in enumerate(asked):
            velocities[row] = outputs[i]
        for i in missed:
            if (cache := caches[asked[i]]) is not None:
                cache.learn(Evaluation(heads[i], image[i] - after_first.image[i], outputs[i]))
    return torch.stack([velocity for velocity in velocities if velocity is not None]), costs


@dataclass(frozen=True)
class _Tokens:
    """What goes through the blocks.

    Attributes:
        image: (batch, tokens, width).
        text: (batch, length, width).
        mask: (batch, length), or None where all texts have that length.
        temb: (batch, width).
        rotary: of image and text, for every row alike.
    """

    image: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    temb: torch.Tensor
    rotary: Any

    def rows(self, chosen: list[int]) -> _Tokens:
        if len(chosen) == len(self.image):
            return self
        mask = None if self.mask is None else self.mask[chosen]
        return _Tokens(self.image[chosen], self.text[chosen], mask, self.temb[chosen], self.rotary)

    def through(self, blocks: Sequence[torch.nn.Module]) -> _Tokens:
        image, text = self.image, self.text
        for block in blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=self.mask,
                temb=self.temb,
                image_rotary_emb=self.rotary,
            )
        return replace(self, image=image, text=text)


def _enter(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
) -> _Tokens:
    """What `QwenImageTransformer2DModel.forward` does before its first block."""
    padded, mask = _pad(embeds)
    image = transformer.img_in(latents.to(transformer.dtype))
    text = transformer.txt_in(transformer.txt_norm(padded.to(latents.device, transformer.dtype)))
    temb = transformer.time_text_embed(sigmas.to(latents.device, transformer.dtype), image, None)
    rotary = transformer.pos_embed([[(1, *grid)]], max_txt_seq_len=padded.shape[1], device=latents.device)
    return _Tokens(image, text, None if mask is None else mask.to(latents.device), temb, rotary)


def _pad(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings (batch, length, width) and the mask of those that are no padding, None if none is."""
    lengths = torch.tensor([len(embed) for embed in embeds])
    padded = pad_sequence(list(embeds), batch_first=True)
    return padded, None if lengths.min() == lengths.max() else torch.arange(padded.shape[1]) < lengths[:, None]
