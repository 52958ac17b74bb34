"""Denoising: rows of independent images, one Euler step at a time.

A sampler here is a function on rows, and everything in which requests differ is a field of a row, so that rows
of different noise levels, guidance and prompt lengths share a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from stages.attention import Negative
from stages.caches import StepCache
from stages.network import Network, Query
from stages.plan import AttentionGuidanceSpec


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
        attention_guidance: in place of classifier-free guidance, or None.
        adapter, adapter_scale: a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to do without.
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
        return float(self.sigmas[self.index])

    @property
    def done(self) -> bool:
        return self.index == len(self.sigmas) - 1

    @property
    def guided(self) -> bool:
        """Whether a step takes a second evaluation, with the negative prompt."""
        return self.negative_embeds is not None and self.attention_guidance is None

    def query(self) -> Query:
        """What the next step asks the network."""
        negative = None
        if self.negative_embeds is not None and self.attention_guidance is not None:
            negative = Negative(self.negative_embeds, self.attention_guidance)
        return Query(
            self.latent,
            self.sigma,
            self.prompt_embeds,
            negative,
            self.adapter,
            self.adapter_scale,
            self.skip_blocks,
            self.cache,
        )

    def negative_query(self) -> Query:
        """What a guided row asks besides."""
        assert self.negative_embeds is not None
        return replace(self.query(), embeds=self.negative_embeds, cache=self.negative_cache)


def guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Qwen-Image's classifier-free guidance: the usual combination at the norm of the positive velocity.

    Velocities are (tokens, channels); norms are along the last axis, as in diffusers' `QwenImagePipeline`.
    """
    combined = negative + scale * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def join_negative(prompt: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Text for an adapter that avoids a negative prompt without a second evaluation: (length + length', width).

    The negative prompt's embeddings (length', width) follow the prompt's (length, width) with their sign reversed,
    by which such an adapter (`training.bridge`) tells them apart.
    """
    return torch.cat([prompt, -negative])


@torch.inference_mode()
def step(network: Network, rows: Sequence[Row]) -> None:
    """Advance every row by one Euler step of its own, in place: x' = x + (sigma' - sigma) v.

    Rows must share a grid. Guided rows are evaluated twice in the one forward pass, with the prompt and with the
    negative one.
    """
    queries = [row.query() for row in rows] + [row.negative_query() for row in rows if row.guided]
    answers = network.evaluate(queries, rows[0].grid)
    negatives = iter(answers[len(rows) :])
    for row, answer in zip(rows, answers, strict=False):
        velocity = answer.velocity
        row.nfe += answer.cost
        if row.guided:
            negative = next(negatives)
            velocity = guide(velocity, negative.velocity, row.guidance_scale)
            row.nfe += negative.cost
        sigma, after = row.sigmas[row.index], row.sigmas[row.index + 1]
        row.denoised = row.latent - sigma * velocity
        row.latent = row.latent + (after - sigma) * velocity
        row.index += 1
