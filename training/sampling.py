"""Sampling inside training: trajectories of a model with or without guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from stages.attention import Avoided
from stages.decode import decode_latents
from stages.denoise import guide
from stages.encode import EMPTY_PROMPT
from stages.model import PIXELS_PER_TOKEN
from stages.noise import draw_noise
from stages.plan import AttentionGuidanceSpec, StageSpec
from stages.sigmas import stage_sigmas
from training.adapters import active
from training.text import Text, Texts, embed_pairs
from training.vae import grid

# (latents, sigma) -> velocity, both (batch, tokens, channels).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: Text,
    grid: tuple[int, int],
    avoided: Avoided | None = None,
) -> torch.Tensor:
    """One forward pass: velocities (batch, tokens, channels) in float32, from latents and noise levels (batch,).

    The transformer's own `forward` waits for the device where a text is masked.
    """
    image = transformer.img_in(latents)
    words = transformer.txt_in(transformer.txt_norm(text.embeds))
    temb = transformer.time_text_embed(sigma, image, None)
    rotary = transformer.pos_embed([[(1, *grid)]], max_txt_seq_len=words.shape[1], device=latents.device)
    for block in transformer.transformer_blocks:
        words, image = block(
            hidden_states=image,
            encoder_hidden_states=words,
            encoder_hidden_states_mask=text.mask,
            temb=temb,
            image_rotary_emb=rotary,
            joint_attention_kwargs={} if avoided is None else {"avoided": avoided},
        )
    return transformer.proj_out(transformer.norm_out(image, temb)).float()


def conditional(transformer: QwenImageTransformer2DModel, text: Text, grid: tuple[int, int]) -> Velocity:
    """The model's velocity for the prompts, by one evaluation."""
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid)


def guided(transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], scale: float) -> Velocity:
    """The model's velocity under classifier-free guidance, each row against a negative prompt of its own."""
    pairs = ((texts.prompt.embeds, texts.negative.embeds), (texts.prompt.mask, texts.negative.mask))
    both = Text(*(torch.cat(pair) for pair in pairs))

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        predicted = evaluate(transformer, latents.repeat(2, 1, 1), sigma.repeat(2), both, grid)
        positive, negative = predicted.chunk(2)
        return guide(positive, negative, scale)

    return velocity


def avoiding(
    transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], guidance: AttentionGuidanceSpec
) -> Velocity:
    """The model's velocity under attention guidance of the rows that avoid something, see `stages.attention`."""
    prompt, negative = texts.prompt, texts.negative
    text = Text(torch.cat([prompt.embeds, negative.embeds], dim=1), torch.cat([prompt.mask, negative.mask], dim=1))
    on, off = ((guidance.scale, guidance.tau, guidance.alpha), (0.0, 1.0, 0.0))
    strengths = (torch.where(texts.avoids, *pair)[:, None, None] for pair in zip(on, off, strict=True))
    avoided = Avoided(negative.mask, *strengths)
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid, avoided)


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
    channels = transformer.config.in_channels // 4
    noises = [draw_noise(seed, channels, 2 * grid_shape[0], 2 * grid_shape[1]) for seed in seeds]
    noise = torch.stack(noises * len(PROMPTS)).to(transformer.device)
    latents = run_stages(pipeline, stages, noise, texts, grid_shape)
    images = decode_latents(pipeline.vae, latents, grid_shape)
    grid(images, len(seeds)).save(path)
