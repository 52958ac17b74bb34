"""Distribution matching on the small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import QwenImagePipeline

from training.adapters import Lora, active, add_lora
from training.loop import load_pipeline
from training.matching import Matching, Samples
from training.prompts import Prompts
from training.sampling import conditional, guided

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "scenes"
GRID = (4, 4)


@pytest.fixture(scope="module")
def teacher() -> QwenImagePipeline:
    pipeline = load_pipeline(CHECKPOINT, torch.device("cpu"))
    pipeline.transformer.requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def critic(teacher: QwenImagePipeline) -> Lora:
    """A LoRA that changes nothing yet."""
    parameters = add_lora(teacher.transformer, "critic", rank=4)
    return Lora("critic", parameters, torch.optim.AdamW(parameters, lr=1e-2))


@pytest.fixture
def samples(teacher: QwenImagePipeline) -> Samples:
    prompts = Prompts(teacher)
    embeds, negatives = prompts.embed(["a red star", "a moon"]), prompts.embed(["a furry shape", " "])
    clean = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return Samples(clean, 0.5, embeds, negatives, conditional(teacher.transformer, embeds, GRID), GRID)


def matching(teacher: QwenImagePipeline, critic: Lora, guidance_scale: float) -> Matching:
    return Matching(Accelerator(cpu=True), teacher.transformer, critic, 1, guidance_scale, 0.0, 1.0)


def test_nothing_is_pushed_where_the_critic_agrees_with_the_teacher(
    teacher: QwenImagePipeline, critic: Lora, samples: Samples
) -> None:
    loss = matching(teacher, critic, guidance_scale=1.0).loss(samples, torch.Generator().manual_seed(1))
    assert float(loss) < 1e-9


def test_gradient_leads_from_the_critics_clean_latent_to_the_guided_teachers(
    teacher: QwenImagePipeline, critic: Lora, samples: Samples
) -> None:
    matching(teacher, critic, guidance_scale=4.0).loss(samples, torch.Generator().manual_seed(1)).backward()
    assert samples.clean.grad is not None
    generator, clean = torch.Generator().manual_seed(1), samples.clean.detach()
    sigma = torch.sigmoid(torch.randn(2, generator=generator))
    level = sigma[:, None, None]
    noisy = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator)
    embeds, negatives = samples.embeds, samples.negatives
    with torch.no_grad(), active(teacher.transformer, None):
        real = noisy - level * guided(teacher.transformer, embeds, negatives, GRID, 4.0)(noisy, sigma)
        fake = noisy - level * conditional(teacher.transformer, embeds, GRID)(noisy, sigma)
    expected = (fake - real) / (clean - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(samples.clean.grad * clean.numel(), expected, rtol=1e-3, atol=1e-4)


def test_critic_learns_the_samples_and_the_base_model_stays(
    teacher: QwenImagePipeline, critic: Lora, samples: Samples
) -> None:
    match = matching(teacher, critic, guidance_scale=1.0)

    def loss() -> float:
        with torch.no_grad():
            return float(match.critic_loss(samples, torch.Generator().manual_seed(2)))

    parameter = torch.nn.Parameter(torch.zeros(()))
    before, weights = loss(), teacher.transformer.proj_out.weight.clone()
    for seed in range(5):
        moved = replace(samples, clean=samples.clean.detach() + parameter)
        lora = Lora("critic", [parameter], torch.optim.SGD([parameter], lr=1e-3))
        match.update(lora, moved, torch.Generator().manual_seed(seed))
    assert loss() < before
    assert torch.equal(weights, teacher.transformer.proj_out.weight)
