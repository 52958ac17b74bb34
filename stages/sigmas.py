"""Noise levels of a stage: diffusers' schedules on any part of the trajectory.

Steps are even in time t; the exponential shift maps time to sigma (Esser et al. 2024, arXiv 2403.03206,
section 5.3.2, as in `FlowMatchEulerDiscreteScheduler`): sigma = e^mu / (e^mu + 1 / t - 1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from stages.plan import StageSpec


def shift_time(mu: float, t: np.ndarray) -> np.ndarray:
    """Time (0..1) to sigma; with -mu, sigma to time."""
    # As a quotient of products, which unlike 1 / t has a value at t = 0.
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


def stage_sigmas(stage: StageSpec, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> torch.Tensor:
    """Sigmas (steps + 1,) in float32 from `stage.sigma_start` down to `stage.sigma_end`.

    Over the whole range these are the sigmas of diffusers' `QwenImagePipeline` at `tokens` image tokens. A
    `dynamic` stage that ends clean also ends like the base model: its last step starts at the terminal sigma,
    unless the whole stage lies below that.
    """
    config = scheduler.config
    terminal = None
    if stage.shift == "dynamic":
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        terminal = config.shift_terminal if stage.sigma_end == 0.0 else None
    else:
        mu = math.log(stage.shift)
    first, last = shift_time(-mu, np.array([stage.sigma_start, stage.sigma_end]))
    sigmas = shift_time(mu, np.linspace(first, last, stage.steps + 1))
    sigmas[0], sigmas[-1] = stage.sigma_start, stage.sigma_end
    if terminal and stage.steps > 1 and stage.sigma_start > terminal:
        stretch = (stage.sigma_start - terminal) / (stage.sigma_start - sigmas[-2])
        sigmas[:-1] = stage.sigma_start - stretch * (stage.sigma_start - sigmas[:-1])
    return torch.from_numpy(sigmas).float()
