"""What diffusers' own transformer says, which tests hold the engine's walk through it against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImageTransformer2DModel

from stages.text import Negative, collate


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
    negatives: Sequence[Negative | None] = (),
) -> torch.Tensor:
    """Velocities (batch, tokens, channels) in float32 by the transformer's `forward`.

    Args:
        transformer: diffusers'; with `negatives`, one whose attention is guided.
        latents: (batch, tokens, channels).
        sigmas: (batch,), each row's noise level, which is also its timestep.
        embeds: prompt embeddings (length, width) a row; lengths may differ.
        grid: rows and columns of tokens, the same for all.
        negatives: what each row avoids within the evaluation, if any does.
    """
    dtype = next(transformer.parameters()).dtype
    text = collate(embeds, negatives, latents.device, dtype)
    velocity = transformer(
        hidden_states=latents.to(dtype),
        timestep=sigmas.to(latents.device, dtype),
        encoder_hidden_states=text.embeds,
        encoder_hidden_states_mask=text.mask,
        img_shapes=[[(1, *grid)]] * len(latents),
        attention_kwargs={} if text.negative is None else {"negatives": text.negative},
        return_dict=False,
    )[0]
    return velocity.float()
