"""Distribution matching distillation of a LoRA (DMD2, Yin et al. 2024, arXiv 2405.14867).

The LoRA's samples are moved along the difference of two scores: that of the teacher, which is the base model under
guidance, and that of a critic, another LoRA that is continuously trained on those samples. The optimum of regression is
the blurred mean of all possible samples; distribution matching instead makes each sample likely under the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch.optim.lr_scheduler import LRScheduler

from training.lib.adapters import Lora, active, add_lora
from training.lib.loop import Schedule, one_cycle
from training.lib.noise import draw_sigmas
from training.lib.recording import Recorded
from training.lib.text import Text, Texts
from training.lib.velocity import evaluate, guided, predict_clean

_HIGHEST = 0.88  # highest level around which scores are compared; more noise shows too little of the image


@dataclass(frozen=True)
class Samples:
    """Latents that the LoRA's next step starts from.

    Attributes:
        latents: (batch, tokens, channels).
        sigma: their noise level.
        text: text that LoRA and critic read.
        texts: prompts and negative prompts, for the teacher's guidance.
        grid: rows and columns of tokens.
    """

    latents: torch.Tensor
    sigma: float
    text: Text
    texts: Texts
    grid: tuple[int, int]


@dataclass(frozen=True)
class Matching:
    """Trains a LoRA and its critic.

    Attributes:
        accelerator: the accelerator.
        transformer: transformer that has both LoRAs.
        lora: the LoRA to train.
        critic: its critic.
        critic_updates: updates of the critic for each update of the LoRA.
        guidance_scale: scale of the teacher's classifier-free guidance.
        sigma_offset, sigma_deviation: mean, relative to the logit of the step's own level, and deviation of the
            logit-normal noise levels at which scores are compared. What a step decides shows at about its own level; at
            lower levels alone, an empty image would look likely after an early step.
    """

    accelerator: Accelerator
    transformer: QwenImageTransformer2DModel
    lora: Lora
    critic: Lora
    critic_updates: int
    guidance_scale: float
    sigma_offset: float
    sigma_deviation: float

    def __post_init__(self) -> None:
        self._recorded: dict[tuple[str, tuple[int, int]], Recorded]
        object.__setattr__(self, "_recorded", {})

    def update(self, samples: Samples, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Update the LoRA once, then the critic on the clean latents that the LoRA predicted; return both losses.

        Args:
            samples: latents to start from.
            generator: source of randomness, on the device of the samples.
        """
        text, texts = samples.text, samples.texts
        start = torch.full((len(samples.latents),), samples.sigma, device=samples.latents.device)
        loss, clean = self._run("lora", self._match, samples.grid)(
            samples.latents,
            start,
            *self._diffusion(samples, generator),
            *(text.embeds, text.mask),
            *(texts.prompt.embeds, texts.prompt.mask, texts.negative.embeds, texts.negative.mask),
        )
        self.lora.step()
        return {"matching": loss} | self._update_critic(samples, clean, generator)

    def update_critic(self, samples: Samples, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Update only the critic, as `update` does; return its loss.

        A new critic does not know the samples of a LoRA that was trained before, so its score would mislead the LoRA.
        """
        start = torch.full((len(samples.latents),), samples.sigma, device=samples.latents.device)
        text = samples.text
        (clean,) = self._run("predict", self._predict, samples.grid)(samples.latents, start, text.embeds, text.mask)
        return self._update_critic(samples, clean, generator)

    def _update_critic(
        self, samples: Samples, clean: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        for _ in range(self.critic_updates):
            noise, level = self._diffusion(samples, generator)
            (loss,) = self._run("critic", self._criticise, samples.grid)(
                clean, noise, level, samples.text.embeds, samples.text.mask
            )
            self.critic.step()
        return {"critic": loss}

    def _run(self, name: str, function: Callable[..., Any], grid: tuple[int, int]) -> Recorded:
        if (name, grid) not in self._recorded:
            self._recorded[name, grid] = Recorded(partial(function, grid))
        return self._recorded[name, grid]

    @torch.no_grad()
    def _predict(
        self, grid: tuple[int, int], latents: torch.Tensor, start: torch.Tensor, *text: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """Predict clean latents by the LoRA."""
        with self.accelerator.autocast(), active(self.transformer, self.lora.name):
            velocity = evaluate(self.transformer, latents, start, Text(*text), grid)
        return (predict_clean(latents, velocity, start),)

    def _match(
        self,
        grid: tuple[int, int],
        latents: torch.Tensor,
        start: torch.Tensor,
        noise: torch.Tensor,
        level: torch.Tensor,
        *text: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute DMD's gradients of the LoRA, normalised per sample by the distance to the teacher's prediction.

        Returns:
            The loss, and the clean latents that the LoRA predicted.
        """
        own, prompt, negative = Text(*text[:2]), Text(*text[2:4]), Text(*text[4:])
        with self.accelerator.autocast(), active(self.transformer, self.lora.name):
            velocity = evaluate(self.transformer, latents, start, own, grid)
        predicted = predict_clean(latents, velocity, start)
        clean = predicted.detach()
        noisy = torch.lerp(clean, noise, level[:, None, None])
        with torch.no_grad(), self.accelerator.autocast():
            with active(self.transformer, None):
                real = guided(self.transformer, Texts(prompt, negative), grid, self.guidance_scale)(noisy, level)
            with active(self.transformer, self.critic.name):
                fake = evaluate(self.transformer, noisy, level, own, grid)
        real_clean, fake_clean = (predict_clean(noisy, velocity, level) for velocity in (real, fake))
        scale = (clean - real_clean).abs().mean((1, 2), keepdim=True)
        loss = 0.5 * F.mse_loss(predicted, clean - (fake_clean - real_clean) / scale)
        self.lora.backward(self.accelerator, loss)
        return loss.detach(), clean

    def _criticise(
        self,
        grid: tuple[int, int],
        clean: torch.Tensor,
        noise: torch.Tensor,
        level: torch.Tensor,
        *text: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """Compute the critic's gradients, by flow matching on the LoRA's clean latents."""
        noisy = torch.lerp(clean, noise, level[:, None, None])
        with self.accelerator.autocast(), active(self.transformer, self.critic.name):
            velocity = evaluate(self.transformer, noisy, level, Text(*text), grid)
        loss = F.mse_loss(velocity, noise - clean)
        self.critic.backward(self.accelerator, loss)
        return (loss.detach(),)

    def _diffusion(self, samples: Samples, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw noise of the samples' shape and noise levels (batch,)."""
        level = min(samples.sigma, _HIGHEST)
        mean = math.log(level / (1 - level)) + self.sigma_offset
        levels = draw_sigmas(len(samples.latents), mean, self.sigma_deviation, generator)
        return torch.randn(samples.latents.shape, generator=generator, device=generator.device), levels


def prepare(
    accelerator: Accelerator,
    transformer: QwenImageTransformer2DModel,
    name: str,
    config: dict[str, Any],
    schedule: Schedule,
) -> tuple[Matching, LRScheduler]:
    """Add a LoRA and its critic to a transformer, whose own weights are frozen.

    Args:
        accelerator: prepares the transformer, the optimizers and the scheduler.
        transformer: the transformer.
        name: name of the LoRA's adapter.
        config: `rank`, `critic_learning_rate`, the numbers of `Matching` as `matching`, and perhaps `start_from`, see
            `add_lora`.
        schedule: learning rate of the LoRA, and number of steps.

    Returns:
        What trains both, and the scheduler of the LoRA's learning rate.
    """
    transformer.requires_grad_(False)
    parameters = add_lora(transformer, name, config["rank"], config.get("start_from"))
    critic = add_lora(transformer, "critic", config["rank"])
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    critic_optimizer = torch.optim.AdamW(
        critic, lr=config["critic_learning_rate"], betas=(0.0, 0.99), weight_decay=0.0, fused=True
    )
    transformer, optimizer, critic_optimizer, scheduler = accelerator.prepare(
        transformer, optimizer, critic_optimizer, one_cycle(optimizer, schedule)
    )
    lora = Lora(name, parameters, optimizer)
    return Matching(
        accelerator, transformer, lora, Lora("critic", critic, critic_optimizer), **config["matching"]
    ), scheduler
