"""Sampling inside training: trajectories of a model with or without guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from stages.decode import to_images
from stages.denoise import euler_step
from stages.families.qwen_image import EMPTY_PROMPT, PIXELS_PER_TOKEN
from stages.families.qwen_image.autoencoder import QwenImageAutoencoder
from stages.families.qwen_image.transformer import QwenImageTransformer
from stages.latents import draw_noise
from stages.plan import AttentionGuidanceSpec, StageSpec
from stages.sigmas import stage_sigmas
from stages.text import NegativeBatch
from stages.text import Text as BatchText
from training.lib.adapters import active
from training.lib.images import grid
from training.lib.text import Text, Texts, embed_pairs

# (latents, sigma) -> velocity, both (batch, tokens, channels).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: BatchText,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Run one forward pass: velocities (batch, tokens, channels) in float32, from latents and noise levels (batch,).

    The transformer's own `forward` waits for the device where a text is masked.
    """
    return QwenImageTransformer(transformer).predict(latents, sigma, text, grid)


def conditional(transformer: QwenImageTransformer2DModel, text: Text, grid: tuple[int, int]) -> Velocity:
    """The model's velocity for the prompts, by one evaluation."""
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid)


def guided(transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], scale: float) -> Velocity:
    """The model's velocity under classifier-free guidance, each row against a negative prompt of its own."""
    both = texts.prompt.beside(texts.negative)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        predicted = evaluate(transformer, latents.repeat(2, 1, 1), sigma.repeat(2), both, grid)
        positive, negative = predicted.chunk(2)
        return QwenImageTransformer.guide(positive, negative, scale)

    return velocity


def avoiding(
    transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], guidance: AttentionGuidanceSpec
) -> Velocity:
    """The model's velocity under attention guidance of the rows that avoid something, see `stages.text`."""
    on, off = ((guidance.scale, guidance.tau, guidance.alpha), (0.0, 1.0, 0.0))
    strengths = (torch.where(texts.avoids, *pair)[:, None, None] for pair in zip(on, off, strict=True))
    both = texts.prompt.before(texts.negative)
    text = BatchText(both.embeds, both.mask, NegativeBatch(texts.negative.mask, *strengths))
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid)


def of_stage(
    transformer: QwenImageTransformer2DModel, stage: StageSpec, texts: Texts, grid: tuple[int, int]
) -> Velocity:
    """What `stage` integrates, once its adapter is active."""
    if stage.guided:
        return guided(transformer, texts, grid, stage.guidance_scale)
    if stage.reads_negative:
        return conditional(transformer, texts.joined(), grid)
    if stage.attention_guidance is not None:
        return avoiding(transformer, texts, grid, stage.attention_guidance)
    return conditional(transformer, texts.prompt, grid)


def integrate(velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """Euler's method along `sigmas` (steps + 1,), on the CPU: the latents at each of them, the first included."""
    trail = [latents]
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        level = torch.full((len(latents),), sigma, device=latents.device)
        trail.append(euler_step(trail[-1], velocity(trail[-1], level), sigma, after))
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
    pipeline: QwenImagePipeline,
    stages: Sequence[StageSpec],
    path: Path,
    text_length: int,
    size: tuple[int, int] = (128, 128),
) -> None:
    """Write `PROMPTS` down, four seeds across, sampled through `stages`, whose adapters must be loaded."""
    seeds = range(4)
    transformer = pipeline.transformer
    grid_shape = (size[1] // PIXELS_PER_TOKEN, size[0] // PIXELS_PER_TOKEN)
    prompts = [prompt for prompt in PROMPTS for _ in seeds]
    texts = embed_pairs(pipeline, prompts, [EMPTY_PROMPT] * len(prompts), text_length)
    noises = [draw_noise(seed, transformer.config.in_channels // 4, grid_shape) for seed in seeds]
    noise = torch.stack(noises * len(PROMPTS)).to(transformer.device)
    latents = run_stages(pipeline, stages, noise, texts, grid_shape)
    images = to_images(QwenImageAutoencoder(pipeline.vae).decode(latents, grid_shape))
    grid(images, len(seeds)).save(path)
