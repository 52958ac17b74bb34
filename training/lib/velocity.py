"""Differentiable velocities and Euler steps of a transformer under training.

Samples that need no gradients, of weights that are saved, are the engine's: see `training.lib.sampling`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import QwenImageTransformer2DModel

from stages.denoise import euler_step
from stages.families.qwen_image.transformer import QwenImageTransformer
from training.lib.text import Text, Texts

# Maps latents (batch, tokens, channels) and their noise levels (batch,) to velocities (batch, tokens, channels).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: Text,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Run one forward pass: velocities (batch, tokens, channels) in float32.

    The transformer's own `forward` synchronises with the device if the text has a mask.

    Args:
        transformer: the transformer, with the active LoRA if any.
        latents: (batch, tokens, channels).
        sigma: (batch,), each row's noise level.
        text: prompts of the batch.
        grid: rows and columns of tokens.
    """
    return QwenImageTransformer(transformer).predict(latents, sigma, text, grid)


def conditional(transformer: QwenImageTransformer2DModel, text: Text, grid: tuple[int, int]) -> Velocity:
    """Return a function for the model's velocity by one evaluation."""
    return lambda latents, sigma: evaluate(transformer, latents, sigma, text, grid)


def guided(transformer: QwenImageTransformer2DModel, texts: Texts, grid: tuple[int, int], scale: float) -> Velocity:
    """Return a function for the model's velocity under classifier-free guidance."""
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
    """Take Euler steps along a schedule.

    Args:
        velocity: velocity of the model.
        latents: (batch, tokens, channels), at the first noise level.
        sigmas: (steps + 1,), on the CPU.

    Returns:
        Latents at the last noise level.
    """
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        level = torch.full((len(latents),), sigma, device=latents.device)
        latents = euler_step(latents, velocity(latents, level), sigma, after)
    return latents
