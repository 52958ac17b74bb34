"""Denoising: rows of independent images, one Euler step at a time.

A sampler here is a function on rows, and everything in which requests differ is a field of a row, so that rows
of different noise levels, guidance and prompt lengths share a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Row:
    """One image on its way through a stage.

    Attributes:
        latent: (rows * columns, channels) in float32.
        sigmas: (steps + 1,), falling.
        grid: (rows, columns) of tokens.
        prompt_embeds: (length, width), without padding.
        negative_embeds: (length, width), or None without guidance.
        guidance_scale: of classifier-free guidance.
        index: steps done.
        denoised: the clean latent as the last step foresaw it, at first the latent itself.
    """

    latent: torch.Tensor
    sigmas: torch.Tensor
    grid: tuple[int, int]
    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None
    guidance_scale: float = 1.0
    index: int = 0
    denoised: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.denoised = self.latent

    @property
    def sigma(self) -> float:
        return float(self.sigmas[self.index])

    @property
    def done(self) -> bool:
        return self.index == len(self.sigmas) - 1


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Qwen-Image's classifier-free guidance: the usual combination at the norm of the positive velocity.

    Velocities are (tokens, channels); norms are along the last axis, as in diffusers' `QwenImagePipeline`.
    """
    combined = negative + scale * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


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
    lengths = torch.tensor([len(embed) for embed in embeds])
    mask = None
    if lengths.min() != lengths.max():
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(latents.device)
    velocity = transformer(
        hidden_states=latents.to(transformer.dtype),
        timestep=sigmas.to(latents.device, transformer.dtype),
        encoder_hidden_states=pad_sequence(list(embeds), batch_first=True).to(latents.device, transformer.dtype),
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, *grid)]] * len(latents),
        return_dict=False,
    )[0]
    return velocity.float()


@torch.inference_mode()
def step(transformer: QwenImageTransformer2DModel, rows: Sequence[Row], *, cached: bool = False) -> None:
    """Advance every row by one Euler step of its own, in place: x' = x + (sigma' - sigma) v.

    Rows must share a grid. Guided rows are evaluated twice, with the prompt and with the negative one: in one
    forward pass, or, for a transformer with a cache (`cached`), in one pass for each of its contexts.
    """

    def evaluate(evaluated: Sequence[Row], embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        latents = torch.stack([row.latent for row in evaluated])
        sigmas = torch.tensor([row.sigma for row in evaluated])
        return predict_velocity(transformer, latents, sigmas, embeds, rows[0].grid)

    negative_embeds = {i: row.negative_embeds for i, row in enumerate(rows) if row.negative_embeds is not None}
    guided = [rows[i] for i in negative_embeds]
    embeds = [row.prompt_embeds for row in rows]
    if cached:
        with transformer.cache_context("cond"):
            velocities = list(evaluate(rows, embeds))
        if guided:
            with transformer.cache_context("uncond"):
                velocities += evaluate(guided, list(negative_embeds.values()))
    else:
        velocities = list(evaluate([*rows, *guided], [*embeds, *negative_embeds.values()]))

    for i, negative in zip(negative_embeds, velocities[len(rows) :], strict=True):
        velocities[i] = guide(velocities[i], negative, rows[i].guidance_scale)
    for row, velocity in zip(rows, velocities, strict=False):
        sigma, after = row.sigmas[row.index], row.sigmas[row.index + 1]
        row.denoised = row.latent - sigma * velocity
        row.latent = row.latent + (after - sigma) * velocity
        row.index += 1
