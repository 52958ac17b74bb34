"""Trajectories of the guided base model, which the LoRAs learn from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file

from stages.families.qwen_image import EMPTY_PROMPT, PIXELS_PER_TOKEN
from stages.packet import LatentPacket
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, StageName, StageSpec
from training.lib.prompts import Prompts
from training.lib.text import Texts, embed_pairs


@dataclass(frozen=True)
class Trajectories:
    """Latents of many images at some noise levels of their sampling.

    Attributes:
        sigmas: (levels,), noise levels falling from 1 to 0.
        latents: (images, levels, tokens, channels) in bfloat16.
        prompts, negative_prompts: one of each for every image; a negative prompt may be the empty one.
        grid: rows and columns of tokens.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    prompts: list[str]
    negative_prompts: list[str]
    grid: tuple[int, int]

    @property
    def size(self) -> str:
        """Size of the images, `WIDTHxHEIGHT` in pixels."""
        rows, columns = self.grid
        return f"{columns * PIXELS_PER_TOKEN}x{rows * PIXELS_PER_TOKEN}"

    def level(self, sigma: float) -> int:
        """Return the index of a noise level; raises ValueError if the trajectories do not pass it."""
        nearest = int((self.sigmas - sigma).abs().argmin())
        if abs(float(self.sigmas[nearest]) - sigma) > 1e-3:
            raise ValueError(f"no level at sigma {sigma:g}; there are {[round(s, 3) for s in self.sigmas.tolist()]}")
        return nearest

    def texts(self, pipeline: QwenImagePipeline, length: int) -> Texts:
        """Embed all prompts in `length` tokens each; raises ValueError if one is longer."""
        return embed_pairs(pipeline, self.prompts, self.negative_prompts, length)

    def save(self, directory: Path) -> None:
        """Write the files that `load` reads; the directory is made if there is none."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"sigmas": self.sigmas, "latents": self.latents}, directory / "trajectories.safetensors")
        texts = {"grid": self.grid, "prompts": self.prompts, "negative_prompts": self.negative_prompts}
        (directory / "prompts.json").write_text(json.dumps(texts))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the files that `save` wrote."""
        texts = json.loads((directory / "prompts.json").read_text())
        tensors = load_file(directory / "trajectories.safetensors")
        return cls(
            tensors["sigmas"], tensors["latents"], texts["prompts"], texts["negative_prompts"], tuple(texts["grid"])
        )


def teacher_stages(
    levels: Sequence[float], steps: int, guidance_scale: float, name: StageName = "base"
) -> tuple[StageSpec, ...]:
    """Make stages of the guided base model, each from one noise level to the next.

    Args:
        levels: decreasing noise levels.
        steps: approximate number of Euler steps of all stages together; each has at least one.
        guidance_scale: scale of classifier-free guidance.
        name: name of the stages.
    """
    whole = levels[0] - levels[-1]
    return tuple(
        StageSpec(
            name=name,
            sigma_start=start,
            sigma_end=end,
            steps=max(1, round(steps * (start - end) / whole)),
            guidance_scale=guidance_scale,
        )
        for start, end in itertools.pairwise(levels)
    )


def size_of(config: dict[str, Any]) -> str:
    """Return a config's `width` and `height` as `WIDTHxHEIGHT`."""
    return f"{config['width']}x{config['height']}"


def draw_trajectories(
    pipeline: Pipeline, plan: Plan, prompts: Prompts, config: dict[str, Any], first: int = 0
) -> Trajectories:
    """Sample images by a plan, and keep their latents before stage number `first` and after each from there on.

    Args:
        pipeline: the model, with a single size.
        plan: the plan, whose stages from `first` on work at scale 1.
        prompts: source of prompts and negative prompts.
        config: `count`, number of images; `batch_size`; `seed` of prompts and noise; and `negative_share`, share of the
            images that have a negative prompt.
        first: position of the first latent that is kept.
    """
    rng = Random(config["seed"])
    images: list[Prompted] = []
    latents: list[torch.Tensor] = []
    while len(images) < config["count"]:
        batch = [
            Prompted(prompt, rng.getrandbits(32), prompts.draw_negative(rng, prompt, config["negative_share"]))
            for prompt in prompts.draw(rng, config["batch_size"])
        ]
        passed = [pipeline.enter(plan, batch)]
        for _ in plan.stages:
            passed.append(pipeline.denoise(passed[-1], plan))
        latents.append(torch.stack([_stack(packets) for packets in passed[first:]], dim=1))
        images += batch
        print(f"{len(images)} of {config['count']}", flush=True)
    sigmas = torch.tensor([1.0, *(stage.sigma_end for stage in plan.stages)][first:])
    texts = [image.prompt for image in images]
    negative_texts = [image.negative_prompt or EMPTY_PROMPT for image in images]
    grid = pipeline.config.grid(pipeline.config.sizes[0])
    return Trajectories(sigmas, torch.cat(latents), texts, negative_texts, grid)


def hand_over(pipeline: Pipeline, plan: Plan, stages: int, taught: Trajectories, batch: int = 64) -> torch.Tensor:
    """Run the first stages of another plan from the noise of trajectories.

    Args:
        pipeline: the model, which has the trajectories' size.
        plan: the plan.
        stages: number of its stages to run.
        taught: trajectories from pure noise.
        batch: largest number of images in a batch.

    Returns:
        Latents (images, tokens, channels) in bfloat16 on the CPU, after the last of those stages.
    """
    parts = []
    for start in range(0, len(taught.prompts), batch):
        rows = slice(start, start + batch)
        images = [
            Prompted(prompt, negative_prompt=negative)
            for prompt, negative in zip(taught.prompts[rows], taught.negative_prompts[rows], strict=True)
        ]
        entered = pipeline.enter(plan, images, taught.size)
        packets = [
            replace(packet, latent=noise.to(packet.latent.dtype))
            for packet, noise in zip(entered, taught.latents[rows, 0], strict=True)
        ]
        for _ in range(stages):
            packets = pipeline.denoise(packets, plan)
        parts.append(_stack(packets))
    return torch.cat(parts)


def _stack(packets: Sequence[LatentPacket]) -> torch.Tensor:
    """Stack packets' latents: (packets, tokens, channels) in bfloat16 on the CPU."""
    return torch.stack([packet.latent for packet in packets]).bfloat16().cpu()
