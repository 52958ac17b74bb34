"""Velocities and Euler steps of a transformer under training, which gradients pass through.

Where no gradient is needed and the weights are on disk, the engine samples: see `training.lib.sampling`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import QwenImageTransformer2DModel

from stages.denoise import euler_step
from stages.families.qwen_image.transformer import QwenImageTransformer
from training.lib.text import Text, Texts

# (latents, sigma) -> velocity, both (batch, tokens, channels).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: Text,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Run one forward pass: velocities (batch, tokens, channels) in float32.

    The transformer's own `forward` waits for the device where a text is masked.

    Args:
        transformer: with the LoRA that is to be active.
        latents: (batch, tokens, channels).
        sigma: (batch,), each row's noise level.
        text: prompts of the batch.
        grid: rows and columns of tokens.
    """
    return QwenImageTransformer(transformer).predict(latents, sigma, text, grid)


def conditional(transformer: QwenImageTransformer2DModel, text: Text, grid: tuple[int, int]) -> Velocity:
    """Return the model's velocity for the prompts, by one evaluation."""
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid)


def guided(transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], scale: float) -> Velocity:
    """Return the model's velocity under classifier-free guidance, each row against a negative prompt of its own."""
    both = texts.prompt.beside(texts.negative)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        predicted = evaluate(transformer, latents.repeat(2, 1, 1), sigma.repeat(2), both, grid)
        positive, negative = predicted.chunk(2)
        return QwenImageTransformer.guide(positive, negative, scale)

    return velocity


def predict_clean(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Predict clean latents (batch, tokens, channels) from those at noise levels `sigma` (batch,)."""
    sigma = sigma[:, None, None]
    return euler_step(latents, velocity, sigma, torch.zeros_like(sigma))


def integrate(velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Take latents (batch, tokens, channels) by Euler steps along `sigmas` (steps + 1,), which are on the CPU."""
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        level = torch.full((len(latents),), sigma, device=latents.device)
        latents = euler_step(latents, velocity(latents, level), sigma, after)
    return latents
