"""Denoising: rows of independent images, one Euler step at a time.

A sampler here is a function on rows, and everything in which requests differ is a field of a row, so that rows
of different noise levels, guidance and prompt lengths share a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import QwenImageTransformer2DModel

from stages.caches import StepCache
from stages.network import predict_velocity, predict_velocity_cached


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
        cache, negative_cache: what the two evaluations of a step remember of the steps before, if anything.
        index: steps done.
        nfe: network evaluations so far; what a cache skipped is not counted.
        denoised: the clean latent as the last step foresaw it, at first the latent itself.
    """

    latent: torch.Tensor
    sigmas: torch.Tensor
    grid: tuple[int, int]
    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None
    guidance_scale: float = 1.0
    cache: StepCache | None = None
    negative_cache: StepCache | None = None
    index: int = 0
    nfe: float = 0.0
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


@torch.inference_mode()
def step(transformer: QwenImageTransformer2DModel, rows: Sequence[Row]) -> None:
    """Advance every row by one Euler step of its own, in place: x' = x + (sigma' - sigma) v.

    Rows must share a grid. Guided rows are evaluated twice in the one forward pass, with the prompt and with the
    negative one.
    """
    guided = [row for row in rows if row.negative_embeds is not None]
    evaluated = [*rows, *guided]
    latents = torch.stack([row.latent for row in evaluated])
    sigmas = torch.tensor([row.sigma for row in evaluated])
    embeds = [row.prompt_embeds for row in rows]
    embeds += [row.negative_embeds for row in rows if row.negative_embeds is not None]
    caches = [*(row.cache for row in rows), *(row.negative_cache for row in guided)]
    if any(caches):
        velocities, costs = predict_velocity_cached(transformer, latents, sigmas, embeds, rows[0].grid, caches)
    else:
        velocities = predict_velocity(transformer, latents, sigmas, embeds, rows[0].grid)
        costs = [1.0] * len(evaluated)
    for row, cost in zip(evaluated, costs, strict=True):
        row.nfe += cost

    negatives = iter(velocities[len(rows) :])
    for row, velocity in zip(rows, velocities, strict=False):
        if row.negative_embeds is not None:
            velocity = guide(velocity, next(negatives), row.guidance_scale)
        sigma, after = row.sigmas[row.index], row.sigmas[row.index + 1]
        row.denoised = row.latent - sigma * velocity
        row.latent = row.latent + (after - sigma) * velocity
        row.index += 1
