"""Sampling inside training: trajectories of a model with or without guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from stages.attention import Negative
from stages.decode import decode_latents
from stages.denoise import guide, join_negative
from stages.encode import EMPTY_PROMPT
from stages.model import PIXELS_PER_TOKEN
from stages.network import predict_velocity
from stages.noise import draw_noise
from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.adapters import active
from training.prompts import Prompts, Texts
from training.vae import grid

# (latents, sigma) -> velocity, both (batch, tokens, channels).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def conditional(
    transformer: QwenImageTransformer2DModel,
    embeds: list[torch.Tensor],
    grid: tuple[int, int],
    negatives: Sequence[Negative | None] = (),
) -> Velocity:
    """The model's velocity for the prompts, by one evaluation; see `predict_velocity`."""
    return lambda latents, sigma: predict_velocity(transformer, latents, sigma, embeds, grid, negatives)


def guided(
    transformer: QwenImageTransformer2DModel,
    embeds: list[torch.Tensor],
    negatives: list[torch.Tensor],
    grid: tuple[int, int],
    scale: float,
) -> Velocity:
    """The model's velocity under classifier-free guidance, each row against a negative prompt of its own."""
    both = [*embeds, *negatives]

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        predicted = predict_velocity(transformer, latents.repeat(2, 1, 1), sigma.repeat(2), both, grid)
        positive, negative = predicted.chunk(2)
        return guide(positive, negative, scale)

    return velocity


def of_stage(
    transformer: QwenImageTransformer2DModel, stage: StageSpec, texts: Texts, grid: tuple[int, int]
) -> Velocity:
    """What `stage` integrates, once its adapter is active."""
    if stage.guided:
        return guided(transformer, texts.embeds, texts.negatives, grid, stage.guidance_scale)
    if stage.reads_negative:
        joined = [join_negative(*pair) for pair in zip(texts.embeds, texts.negatives, strict=True)]
        return conditional(transformer, joined, grid)
    if (guidance := stage.attention_guidance) is None:
        return conditional(transformer, texts.embeds, grid)
    avoided = [
        Negative(negative, guidance) if avoids else None
        for negative, avoids in zip(texts.negatives, texts.avoids, strict=True)
    ]
    return conditional(transformer, texts.embeds, grid, avoided)


def integrate(velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """Euler's method along `sigmas` (steps + 1,): the latents at each of them, the first included."""
    trail = [latents]
    for sigma, after in itertools.pairwise(sigmas):
        level = sigma.expand(len(latents)).to(latents.device)
        trail.append(trail[-1] + (after - sigma) * velocity(trail[-1], level))
    return trail


def run_stages(
    pipeline: QwenImagePipeline,
    stages: Sequence[StageSpec],
    latents: torch.Tensor,
    texts: Texts,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Latents (batch, tokens, channels) where the last of `stages` leaves them; their adapters must be loaded."""
    transformer = pipeline.transformer
    for stage in stages:
        sigmas = stage_sigmas(stage, pipeline.scheduler, tokens=latents.shape[1])
        velocity = of_stage(transformer, stage, texts, grid)
        with active(transformer, stage.adapter):
            latents = integrate(velocity, latents, sigmas)[-1]
    return latents


PROMPTS = (
    "a red star",
    "a large furry blue heart on a white background",
    "a striped green circle on the left",
    "a shape",
    "a yellow square left of a purple ring",
    "a small orange cross and a pink moon on a black background",
)


@torch.inference_mode()
def sample_grid(
    pipeline: QwenImagePipeline, stages: Sequence[StageSpec], path: Path, size: tuple[int, int] = (128, 128)
) -> None:
    """Write `PROMPTS` down, four seeds across, sampled through `stages`, whose adapters must be loaded."""
    seeds = range(4)
    transformer, prompts = pipeline.transformer, Prompts(pipeline)
    grid_shape = (size[1] // PIXELS_PER_TOKEN, size[0] // PIXELS_PER_TOKEN)
    texts = prompts.texts([prompt for prompt in PROMPTS for _ in seeds], [EMPTY_PROMPT] * len(PROMPTS) * len(seeds))
    channels = transformer.config.in_channels // 4
    noises = [draw_noise(seed, channels, 2 * grid_shape[0], 2 * grid_shape[1]) for seed in seeds]
    noise = torch.stack(noises * len(PROMPTS)).to(transformer.device)
    latents = run_stages(pipeline, stages, noise, texts, grid_shape)
    images = decode_latents(pipeline.vae, latents, grid_shape)
    grid(images, len(seeds)).save(path)
