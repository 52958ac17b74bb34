"""The guided base model as a teacher: how it walks, and what of its way is kept for others to learn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from stages.families.qwen_image import PIXELS_PER_TOKEN
from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.lib.prompts import Prompts
from training.lib.recording import Recorded
from training.lib.sampling import Velocity, guided
from training.lib.text import Text, Texts, embed_pairs


@dataclass(frozen=True)
class Trajectories:
    """Where the teacher was.

    Attributes:
        sigmas: (levels,), falling from 1 to 0.
        latents: (count, levels, tokens, channels) in bfloat16.
        prompts, negative_prompts: `count` of each.
        grid: rows and columns of tokens.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    prompts: list[str]
    negative_prompts: list[str]
    grid: tuple[int, int]

    def level(self, sigma: float) -> int:
        """Index of a noise level; raises ValueError if the trajectories do not pass it."""
        nearest = int((self.sigmas - sigma).abs().argmin())
        if abs(float(self.sigmas[nearest]) - sigma) > 1e-3:
            raise ValueError(f"no level at sigma {sigma:g}; there are {[round(s, 3) for s in self.sigmas.tolist()]}")
        return nearest

    def texts(self, pipeline: QwenImagePipeline, length: int) -> Texts:
        """Embed the prompts of all."""
        return embed_pairs(pipeline, self.prompts, self.negative_prompts, length)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"sigmas": self.sigmas, "latents": self.latents}, directory / "trajectories.safetensors")
        texts = {"grid": self.grid, "prompts": self.prompts, "negative_prompts": self.negative_prompts}
        (directory / "prompts.json").write_text(json.dumps(texts))

    @classmethod
    def load(cls, directory: Path) -> Self:
        texts = json.loads((directory / "prompts.json").read_text())
        tensors = load_file(directory / "trajectories.safetensors")
        return cls(
            tensors["sigmas"], tensors["latents"], texts["prompts"], texts["negative_prompts"], tuple(texts["grid"])
        )


# (noise, texts) -> latents, (batch, tokens, channels) at each level.
Walk = Callable[[torch.Tensor, Texts], Sequence[torch.Tensor]]


@torch.no_grad()
def draw_trajectories(
    accelerator: Accelerator,
    pipeline: QwenImagePipeline,
    prompts: Prompts,
    config: dict[str, Any],
    sigmas: torch.Tensor,
    walk: Walk,
) -> Trajectories:
    """Walk from many noises, for prompts of which some avoid something.

    Args:
        config: width, height, count, batch_size, seed, text_length and negative_share.
        sigmas: (levels,) of what `walk` returns.
    """
    grid, channels = grid_of(config), pipeline.transformer.config.in_channels
    rng = Random(config["seed"])
    generator = torch.Generator(accelerator.device).manual_seed(config["seed"])
    texts: list[str] = []
    negative_texts: list[str] = []
    latents: list[torch.Tensor] = []
    while len(texts) < config["count"]:
        batch = prompts.draw(rng, config["batch_size"])
        avoided = [prompts.draw_negative(rng, prompt, config["negative_share"]) for prompt in batch]
        shape = (len(batch), grid[0] * grid[1], channels)
        noise = torch.randn(shape, generator=generator, device=accelerator.device)
        with accelerator.autocast():
            trail = walk(noise, embed_pairs(pipeline, batch, avoided, config["text_length"]))
        latents.append(torch.stack(list(trail), dim=1).bfloat16().cpu())
        texts += batch
        negative_texts += avoided
        print(f"{len(texts)} of {config['count']}", flush=True)
    return Trajectories(sigmas, torch.cat(latents), texts, negative_texts, grid)


class Teacher:
    """The guided base model, recorded: called for each step with texts of its own."""

    def __init__(self, transformer: QwenImageTransformer2DModel, grid: tuple[int, int], guidance_scale: float) -> None:
        def velocity(
            latents: torch.Tensor, sigma: torch.Tensor, avoids: torch.Tensor, *text: torch.Tensor
        ) -> tuple[torch.Tensor]:
            texts = Texts(Text(*text[:2]), Text(*text[2:]), avoids)
            return (guided(transformer, texts, grid, guidance_scale)(latents, sigma),)

        self._velocity = Recorded(velocity)

    def velocity(self, texts: Texts) -> Velocity:
        parts = (texts.avoids, texts.prompt.embeds, texts.prompt.mask, texts.negative.embeds, texts.negative.mask)
        return lambda latents, sigma: self._velocity(latents, sigma, *parts)[0]


def grid_of(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of tokens of a config's width and height."""
    return config["height"] // PIXELS_PER_TOKEN, config["width"] // PIXELS_PER_TOKEN


def teacher_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, levels: list[float], steps: int, tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """A schedule of about `steps` in all that passes every level, and the index of each level in it."""
    parts, marks = [torch.tensor([levels[0]])], [0]
    for start, end in itertools.pairwise(levels):
        share = max(1, round(steps * (start - end) / (levels[0] - levels[-1])))
        stage = StageSpec(name="base", sigma_start=start, sigma_end=end, steps=share)
        parts.append(stage_sigmas(stage, scheduler, tokens)[1:])
        marks.append(marks[-1] + share)
    return torch.cat(parts), marks
