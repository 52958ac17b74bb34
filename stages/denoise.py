"""Denoising: independent images, one Euler step at a time.

Everything in which requests differ is a field of an image's state, so images of different noise levels, guidance and
prompt lengths share a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from stages.caches import StepCache
from stages.network import Network
from stages.plan import AttentionGuidanceSpec
from stages.rows import ModelInput
from stages.text import Negative

Sigma = TypeVar("Sigma", float, torch.Tensor)


@dataclass
class ImageState:
    """One image partway through a stage.

    Attributes:
        latent: (rows * columns, channels) in float32.
        sigmas: (steps + 1,), decreasing.
        grid: (rows, columns) of tokens.
        prompt_embeds: (length, width), without padding.
        negative_embeds: (length, width), or None without guidance.
        guidance_scale: scale of classifier-free guidance.
        attention_guidance: guidance in place of classifier-free guidance, or None.
        adapter, adapter_scale: name of a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to skip.
        cache, negative_cache: step caches of a step's two evaluations, or None.
        index: number of steps done.
        nfe: network evaluations so far; blocks that a cache skipped are not counted.
        denoised: the clean latent that the last step predicted; before the first step, the latent itself.
    """

    latent: torch.Tensor
    sigmas: torch.Tensor
    grid: tuple[int, int]
    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor | None = None
    guidance_scale: float = 1.0
    attention_guidance: AttentionGuidanceSpec | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    skip_blocks: frozenset[int] = frozenset()
    cache: StepCache | None = None
    negative_cache: StepCache | None = None
    index: int = 0
    nfe: float = 0.0
    denoised: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.denoised = self.latent

    @property
    def sigma(self) -> float:
        """Noise level of `latent`."""
        return float(self.sigmas[self.index])

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index == len(self.sigmas) - 1

    @property
    def guided(self) -> bool:
        """Whether a step takes a second evaluation, with the negative prompt."""
        return self.negative_embeds is not None and self.attention_guidance is None

    def model_input(self) -> ModelInput:
        """Return the input of the next step's evaluation."""
        negative = None
        if self.negative_embeds is not None and self.attention_guidance is not None:
            negative = Negative(self.negative_embeds, self.attention_guidance)
        return ModelInput(
            self.latent,
            self.sigma,
            self.prompt_embeds,
            negative,
            self.adapter,
            self.adapter_scale,
            self.skip_blocks,
            self.cache,
        )

    def negative_input(self) -> ModelInput:
        """Return the input of a guided step's second evaluation."""
        assert self.negative_embeds is not None
        return replace(self.model_input(), embeds=self.negative_embeds, cache=self.negative_cache)


def join_negative(prompt: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Join both prompts for an adapter that reads the negative one in the same evaluation: (length + length', width).

    The negative prompt's embeddings (length', width) follow the prompt's (length, width) with their sign reversed,
    which is how such an adapter (`training.bridge`) tells them apart.
    """
    return torch.cat([prompt, -negative])


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: Sigma, after: Sigma) -> torch.Tensor:
    """Take one Euler step, x' = x + (sigma' - sigma) v; a step to `after` 0 predicts the clean latent."""
    return latents + (after - sigma) * velocity


def step(network: Network, states: Sequence[ImageState]) -> None:
    """Advance every image by one Euler step of its own, in place.

    The images must share a grid. Guided images are evaluated twice in the same forward pass: with the prompt, and with
    the negative prompt.
    """
    inputs = [state.model_input() for state in states] + [state.negative_input() for state in states if state.guided]
    predictions = network.evaluate(inputs, states[0].grid)
    negatives = iter(predictions[len(states) :])
    for state, prediction in zip(states, predictions, strict=False):
        velocity = prediction.velocity
        state.nfe += prediction.cost
        if state.guided:
            negative = next(negatives)
            velocity = network.transformer.guide(velocity, negative.velocity, state.guidance_scale)
            state.nfe += negative.cost
        sigma, after = state.sigmas[state.index], state.sigmas[state.index + 1]
        state.denoised = euler_step(state.latent, velocity, sigma, torch.zeros_like(sigma))
        state.latent = euler_step(state.latent, velocity, sigma, after)
        state.index += 1
