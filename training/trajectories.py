"""Walk the guided base model from many noises and keep what it passes at the distilled plan's noise levels.

`python -m training.trajectories training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`

Student and bridge both learn from these: the one to make the same way in few steps, the other to bring the few
large steps of a hybrid plan's base stage back onto it.
"""

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
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from stages.model import PIXELS_PER_TOKEN
from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.loop import load_pipeline, make_accelerator, parse_arguments, read_config
from training.prompts import Prompts, Texts
from training.sampling import guided, integrate


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

    def texts(self, prompts: Prompts, rows: Sequence[int]) -> Texts:
        """Of some of the trajectories, embedded."""
        return prompts.texts([self.prompts[row] for row in rows], [self.negative_prompts[row] for row in rows])

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
    prompts: Prompts,
    config: dict[str, Any],
    channels: int,
    sigmas: torch.Tensor,
    walk: Walk,
) -> Trajectories:
    """Walk from many noises of `channels` channels, for prompts of which some avoid something.

    Args:
        config: width, height, count, batch_size, seed and negative_share.
        sigmas: (levels,) of what `walk` returns.
    """
    grid = grid_of(config)
    rng, generator = Random(config["seed"]), torch.Generator().manual_seed(config["seed"])
    texts: list[str] = []
    negative_texts: list[str] = []
    latents: list[torch.Tensor] = []
    while len(texts) < config["count"]:
        batch = prompts.draw(rng, config["batch_size"])
        avoided = [prompts.draw_negative(rng, prompt, config["negative_share"]) for prompt in batch]
        noise = torch.randn(len(batch), grid[0] * grid[1], channels, generator=generator)
        with accelerator.autocast():
            trail = walk(noise.to(accelerator.device), prompts.texts(batch, avoided))
        latents.append(torch.stack(list(trail), dim=1).bfloat16().cpu())
        texts += batch
        negative_texts += avoided
        print(f"{len(texts)} of {config['count']}", flush=True)
    return Trajectories(sigmas, torch.cat(latents), texts, negative_texts, grid)


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


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments(__doc__, "pipeline", "run")
    config = read_config(arguments.config, "trajectories")
    accelerator = make_accelerator()
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    prompts = Prompts.read(pipeline, config)
    grid = grid_of(config)
    tokens = grid[0] * grid[1]
    plan = StageSpec(name="distilled", sigma_start=1.0, sigma_end=0.0, **config["levels"])
    levels = stage_sigmas(plan, pipeline.scheduler, tokens)
    sigmas, marks = teacher_sigmas(pipeline.scheduler, levels.tolist(), config["steps"], tokens)

    def walk(noise: torch.Tensor, texts: Texts) -> list[torch.Tensor]:
        teacher = guided(pipeline.transformer, texts.embeds, texts.negatives, grid, config["guidance_scale"])
        trail = integrate(teacher, noise, sigmas)
        return [trail[mark] for mark in marks]

    channels = pipeline.transformer.config.in_channels
    draw_trajectories(accelerator, prompts, config, channels, levels, walk).save(arguments.run)


if __name__ == "__main__":
    main()
