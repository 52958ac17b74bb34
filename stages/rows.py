"""The rows of an evaluation: one image each, for one side of guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.caches import StepCache
from stages.text import Negative


@dataclass(frozen=True)
class ModelInput:
    """One row of an evaluation.

    Attributes:
        latent: (tokens, channels).
        sigma: noise level of `latent`.
        embeds: (length, width), without padding.
        negative: negative prompt that guides attention within the evaluation, or None.
        adapter, adapter_scale: name of a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to skip.
        cache: cache that may replace part of the evaluation, or None.
    """

    latent: torch.Tensor
    sigma: float
    embeds: torch.Tensor
    negative: Negative | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    skip_blocks: frozenset[int] = frozenset()
    cache: StepCache | None = None


@dataclass(frozen=True)
class Prediction:
    """The output of an evaluation for one row.

    Attributes:
        velocity: (tokens, channels) in float32.
        cost: share of the blocks that were run for the row.
    """

    velocity: torch.Tensor
    cost: float
