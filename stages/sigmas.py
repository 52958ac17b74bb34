"""Noise levels of a stage: diffusers' schedules, restricted to any section of the trajectory.

Steps are evenly spaced in time t, which a shift by a factor f maps to sigma (Esser et al. 2024, arXiv 2403.03206,
section 5.3.2): sigma = f / (f + 1 / t - 1). All shifts of `FlowMatchEulerDiscreteScheduler` have this form. f is its
`shift`; with `use_dynamic_shifting`, f is e^mu or, if `time_shift_type` is linear, mu, which depends on the resolution.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.plan import StageSpec

_Mu = Annotated[float, Field(ge=-10.0, le=10.0)]


class SchedulerConfig(BaseModel):
    """Supported contents of a model's `scheduler_config.json`; diffusers' other schedules are refused by name.

    The fields are those of `FlowMatchEulerDiscreteScheduler`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    class_name: Annotated[Literal["FlowMatchEulerDiscreteScheduler"], Field(alias="_class_name")]
    diffusers_version: Annotated[str | None, Field(alias="_diffusers_version")] = None
    num_train_timesteps: Literal[1000] = 1000
    shift: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: _Mu = 0.5
    max_shift: _Mu = 1.15
    base_image_seq_len: Annotated[int, Field(ge=1)] = 256
    max_image_seq_len: Annotated[int, Field(ge=1)] = 4096
    invert_sigmas: Literal[False] = False
    shift_terminal: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: Literal[False] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError("max_image_seq_len must be above base_image_seq_len")
        # Only a rising mu is above zero at every resolution, since the line continues below `base_image_seq_len`.
        if self.use_dynamic_shifting and self.time_shift_type == "linear":
            slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
            if slope < 0 or self.base_shift - slope * self.base_image_seq_len <= 0:
                raise ValueError("base_shift and max_shift must be above 0 at every resolution with a linear shift")
        return self


def shift_time(factor: float, t: np.ndarray) -> np.ndarray:
    """Map time (0 to 1) to sigma; with 1 / factor, map sigma to time."""
    # A quotient of products, which unlike 1 / t is defined at t = 0.
    return factor * t / (factor * t + 1 - t)


def shift_factor(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """Return the shift of a model's own schedule for an image of `tokens` tokens, as diffusers' pipelines set it."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return config.shift
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = tokens * slope + (config.base_shift - slope * config.base_image_seq_len)  # rounded as diffusers does
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def stage_sigmas(stage: StageSpec, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> torch.Tensor:
    """Return sigmas (steps + 1,) in float32 from `stage.sigma_start` down to `stage.sigma_end`.

    A stage over the whole range has the sigmas of diffusers' pipelines at `tokens` image tokens. A `dynamic` stage that
    ends at 0 also ends as the base model does: its last step starts at the terminal sigma, unless the whole stage lies
    below that.
    """
    dynamic = stage.shift == "dynamic"
    terminal = scheduler.config.shift_terminal if dynamic and stage.sigma_end == 0.0 else None
    factor = shift_factor(scheduler, tokens) if stage.shift == "dynamic" else stage.shift
    first, last = shift_time(1 / factor, np.array([stage.sigma_start, stage.sigma_end]))
    sigmas = shift_time(factor, np.linspace(first, last, stage.steps + 1))
    sigmas[0], sigmas[-1] = stage.sigma_start, stage.sigma_end
    if terminal and stage.steps > 1 and stage.sigma_start > terminal:
        stretch = (stage.sigma_start - terminal) / (stage.sigma_start - sigmas[-2])
        sigmas[:-1] = stage.sigma_start - stretch * (stage.sigma_start - sigmas[:-1])
    return torch.from_numpy(sigmas).float()
