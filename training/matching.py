"""Distribution matching distillation (DMD2, Yin et al. 2024, arXiv 2405.14867) of a LoRA that makes images.

Its samples are pushed along the difference of two scores: the teacher's, which is the base model under guidance, and
that of a critic, a LoRA of its own that is trained all along on those samples. Unlike regression, whose optimum is
the blurred mean of what could follow, this draws every sample towards what the teacher finds likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch.optim.lr_scheduler import LRScheduler

from training.adapters import Lora, active, add_lora
from training.base import draw_sigmas
from training.loop import Schedule, one_cycle
from training.sampling import Velocity, guided

_HIGHEST = 0.88  # there is little to see in more noise, around which a first step's levels would be


@dataclass(frozen=True)
class Samples:
    """Clean latents that a LoRA foresees.

    Attributes:
        clean: (batch, tokens, channels), with its gradient.
        sigma: noise level of the step that foresaw them.
        embeds, negatives: a prompt and a negative prompt each, for the teacher.
        walk: how they were asked for; under the critic's LoRA, how it is.
        grid: rows and columns of tokens.
    """

    clean: torch.Tensor
    sigma: float
    embeds: list[torch.Tensor]
    negatives: list[torch.Tensor]
    walk: Velocity
    grid: tuple[int, int]


@dataclass(frozen=True)
class Matching:
    """Updates a LoRA and its critic, both of which are on `transformer`.

    Attributes:
        critic_updates: of the critic for each of the LoRA.
        guidance_scale: the teacher's.
        sigma_offset, sigma_deviation: of the logit-normal noise levels at which scores are compared, around that of the
            step: what a step decides shows at its own level. Compared at lower ones alone, an early step finds that
            empty images are likely, too.
    """

    accelerator: Accelerator
    transformer: QwenImageTransformer2DModel
    critic: Lora
    critic_updates: int
    guidance_scale: float
    sigma_offset: float
    sigma_deviation: float

    def update(self, lora: Lora, samples: Samples, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One update of the LoRA that made the samples, and those of the critic; their losses."""
        loss = self.loss(samples, generator)
        lora.descend(self.accelerator, loss)
        for _ in range(self.critic_updates):
            critic_loss = self.critic_loss(samples, generator)
            self.critic.descend(self.accelerator, critic_loss)
        return {"matching": loss.detach(), "critic": critic_loss.detach()}

    def loss(self, samples: Samples, generator: torch.Generator) -> torch.Tensor:
        """Whose gradient is DMD's (equation 1), each sample's in units of its distance from the teacher's answer."""
        noisy, sigma, _ = self._diffuse(samples, generator)
        with torch.no_grad(), self.accelerator.autocast():
            with active(self.transformer, None):
                teacher = guided(self.transformer, samples.embeds, samples.negatives, samples.grid, self.guidance_scale)
                real = teacher(noisy, sigma)
            with active(self.transformer, self.critic.name):
                fake = samples.walk(noisy, sigma)
        level = sigma.to(noisy)[:, None, None]
        real_clean, fake_clean = noisy - level * real, noisy - level * fake
        clean = samples.clean.detach()
        scale = (clean - real_clean).abs().mean((1, 2), keepdim=True)
        return 0.5 * F.mse_loss(samples.clean, clean - (fake_clean - real_clean) / scale)

    def critic_loss(self, samples: Samples, generator: torch.Generator) -> torch.Tensor:
        """Flow matching on the samples, under the critic's LoRA."""
        noisy, sigma, noise = self._diffuse(samples, generator)
        with self.accelerator.autocast(), active(self.transformer, self.critic.name):
            velocity = samples.walk(noisy, sigma)
        return F.mse_loss(velocity, noise - samples.clean.detach())

    def _diffuse(self, samples: Samples, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples with noise, its levels (batch,) and the noise."""
        clean, level = samples.clean.detach(), min(samples.sigma, _HIGHEST)
        mean = math.log(level / (1 - level)) + self.sigma_offset
        sigma = draw_sigmas(len(clean), mean, self.sigma_deviation, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return torch.lerp(clean, noise, sigma.to(noise)[:, None, None]), sigma, noise


def prepare(
    accelerator: Accelerator,
    transformer: QwenImageTransformer2DModel,
    name: str,
    config: dict[str, Any],
    schedule: Schedule,
) -> tuple[Lora, LRScheduler, Matching]:
    """LoRA `name` and its critic on a transformer that stays as it is, with what trains them by a trainer's config."""
    transformer.requires_grad_(False)
    parameters = add_lora(transformer, name, config["rank"])
    critic = add_lora(transformer, "critic", config["rank"])
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic, lr=config["critic_learning_rate"], betas=(0.0, 0.99), weight_decay=0.0)
    transformer, optimizer, critic_optimizer, scheduler = accelerator.prepare(
        transformer, optimizer, critic_optimizer, one_cycle(optimizer, schedule)
    )
    matching = Matching(accelerator, transformer, Lora("critic", critic, critic_optimizer), **config["matching"])
    return Lora(name, parameters, optimizer), scheduler, matching
