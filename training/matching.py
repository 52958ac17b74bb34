"""Distribution matching distillation (DMD2, Yin et al. 2024, arXiv 2405.14867) of a LoRA that makes images.

Its samples are pushed along the difference of two scores: the teacher's, which is the base model under guidance, and
that of a critic, a LoRA of its own that is trained all along on those samples. Unlike regression, whose optimum is
the blurred mean of what could follow, this draws every sample towards what the teacher finds likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel

from training.adapters import active
from training.base import draw_sigmas
from training.loop import advance
from training.sampling import conditional, guided

CRITIC = "critic"


@dataclass(frozen=True)
class Samples:
    """Clean latents that a LoRA foresees.

    Attributes:
        clean: (batch, tokens, channels), with its gradient.
        embeds, negatives: a prompt and a negative prompt each, for the teacher.
        read: the text that made it, as the LoRA read it.
        grid: rows and columns of tokens.
    """

    clean: torch.Tensor
    embeds: list[torch.Tensor]
    negatives: list[torch.Tensor]
    read: list[torch.Tensor]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Matching:
    """Updates a LoRA and its critic, both of which are on `transformer`.

    Attributes:
        critic, critic_optimizer: parameters of the LoRA `CRITIC`, and what moves them.
        critic_updates: of the critic for each of the LoRA.
        guidance_scale: the teacher's.
        sigma_mean, sigma_deviation: of the logit-normal noise levels at which scores are compared.
    """

    accelerator: Accelerator
    transformer: QwenImageTransformer2DModel
    critic: Sequence[torch.nn.Parameter]
    critic_optimizer: torch.optim.Optimizer
    critic_updates: int
    guidance_scale: float
    sigma_mean: float
    sigma_deviation: float

    def update(
        self,
        name: str,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        samples: Samples,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """One update of LoRA `name`, which made the samples, and those of the critic; their losses."""
        loss = self.loss(samples, generator)
        with active(self.transformer, name):
            advance(self.accelerator, loss, parameters, optimizer)
        for _ in range(self.critic_updates):
            critic_loss = self.critic_loss(samples, generator)
            advance(self.accelerator, critic_loss, self.critic, self.critic_optimizer)
        return {"matching": loss.detach(), "critic": critic_loss.detach()}

    def loss(self, samples: Samples, generator: torch.Generator) -> torch.Tensor:
        """Whose gradient is DMD's (equation 1), each sample's in units of its distance from the teacher's answer."""
        noisy, sigma, _ = self._diffuse(samples, generator)
        with torch.no_grad(), self.accelerator.autocast():
            with active(self.transformer, None):
                teacher = guided(self.transformer, samples.embeds, samples.negatives, samples.grid, self.guidance_scale)
                real = teacher(noisy, sigma)
            with active(self.transformer, CRITIC):
                fake = conditional(self.transformer, samples.read, samples.grid)(noisy, sigma)
        level = sigma.to(noisy)[:, None, None]
        real_clean, fake_clean = noisy - level * real, noisy - level * fake
        clean = samples.clean.detach()
        scale = (clean - real_clean).abs().mean((1, 2), keepdim=True)
        return 0.5 * F.mse_loss(samples.clean, clean - (fake_clean - real_clean) / scale)

    def critic_loss(self, samples: Samples, generator: torch.Generator) -> torch.Tensor:
        """Flow matching on the samples, under the critic's LoRA."""
        noisy, sigma, noise = self._diffuse(samples, generator)
        with self.accelerator.autocast(), active(self.transformer, CRITIC):
            velocity = conditional(self.transformer, samples.read, samples.grid)(noisy, sigma)
        return F.mse_loss(velocity, noise - samples.clean.detach())

    def _diffuse(self, samples: Samples, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples with noise, its levels (batch,) and the noise."""
        clean = samples.clean.detach()
        sigma = draw_sigmas(len(clean), self.sigma_mean, self.sigma_deviation, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return torch.lerp(clean, noise, sigma.to(noise)[:, None, None]), sigma, noise
