"""Normalized Attention Guidance against diffusers' own attention, evaluated twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from reference import predict_velocity

from backends import Backend
from stages.config import ModelConfig
from stages.latents import draw_noise
from stages.loading import load_transformer
from stages.pipeline import Pipeline
from stages.plan import AttentionGuidanceSpec
from stages.text import Negative, NegativeBatch

GRID = (4, 6)
PROMPTS = ["a red circle", "two small green squares left of a large blue triangle"]
NEGATIVES = ["a furry shape", "white"]


def negatives(scale: float, tau: float, alpha: float) -> NegativeBatch:
    """By one row."""
    strengths = torch.tensor([scale, tau, alpha])[:, None, None, None]
    return NegativeBatch(torch.ones(1, 1, dtype=torch.bool), *strengths)


def test_answers_are_led_away_up_to_a_multiple_of_their_norm_and_part_of_the_way() -> None:
    positive, negative = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[0.0, -1.0]]])
    # Away by 2: (3, -1), whose L1 norm is twice the positive one's.
    for tau, alpha, expected in [(2.5, 1.0, (3.0, -1.0)), (1.5, 1.0, (2.25, -0.75)), (1.5, 0.5, (1.625, -0.875))]:
        guided = negatives(2.0, tau, alpha).guide(positive, negative)
        torch.testing.assert_close(guided, torch.tensor([[expected]]))
    assert torch.equal(negatives(0.0, 1.0, 0.0).guide(positive, negative), positive)


@pytest.fixture(scope="module")
def diffusers_own(config: ModelConfig, backend: Backend) -> QwenImageTransformer2DModel:
    return load_transformer(config, backend).module.double()  # so that all rounding is that of what is tested


@pytest.fixture
def twice(diffusers_own: QwenImageTransformer2DModel) -> Iterator[QwenImageTransformer2DModel]:
    """Batches of rows with their prompts, then with their negative ones: answers of both are replaced by the guided."""

    grown: list[torch.Tensor] = []

    def lead_away(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        positive, negative = inputs[0].chunk(2)
        far = 5 * positive - 4 * negative
        growth = far.abs().sum(-1) / positive.abs().sum(-1)
        grown.append(growth > 1.3)
        near = far * (1.3 / growth.clamp(min=1.3))[..., None]
        return (0.25 * positive + 0.75 * near).repeat(2, 1, 1)

    hooks = [block.attn.to_out[0].register_forward_pre_hook(lead_away) for block in diffusers_own.transformer_blocks]
    yield diffusers_own
    assert 0.1 < float(torch.stack(grown).float().mean()) < 0.9  # tau counts for some tokens alone
    for hook in hooks:
        hook.remove()


def test_one_evaluation_equals_two_whose_attentions_meet(
    config: ModelConfig, backend: Backend, pipeline: Pipeline, twice: QwenImageTransformer2DModel
) -> None:
    latents = torch.stack([draw_noise(seed, 16, GRID) for seed in range(2)])
    sigmas = torch.tensor([0.6, 0.3])
    embeds, away = ([pipeline.encoder.encode(text) for text in texts] for texts in (PROMPTS, NEGATIVES))
    assert len({len(text) for text in (*embeds, *away)}) == 3
    once = load_transformer(config, backend).module
    spec = AttentionGuidanceSpec(scale=4.0, tau=1.3, alpha=0.75)
    with torch.inference_mode():
        both = predict_velocity(twice, latents.repeat(2, 1, 1), sigmas.repeat(2), [*embeds, *away], GRID)
        expected, same = both.chunk(2)
        guided = predict_velocity(once, latents, sigmas, embeds, GRID, [Negative(text, spec) for text in away])
        plain = predict_velocity(once, latents, sigmas, embeds, GRID)
    assert torch.equal(expected, same)
    assert float((guided - expected).abs().max()) < 1e-5
    assert float((guided - plain).abs().max()) > 1e-2
