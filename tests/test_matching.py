"""Distribution matching on the small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import QwenImagePipeline

from training.lib.adapters import Lora, active, add_lora
from training.lib.loop import load_pipeline
from training.lib.matching import Matching, Samples
from training.lib.text import embed_pairs
from training.lib.velocity import conditional, guided

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "scenes"
GRID = (4, 4)
LEVEL = 0.5


@pytest.fixture(scope="module")
def teacher() -> QwenImagePipeline:
    pipeline = load_pipeline(CHECKPOINT, torch.device("cpu"))
    pipeline.transformer.requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def loras(teacher: QwenImagePipeline) -> tuple[Lora, Lora]:
    """A student and a critic that change nothing yet, and do not move."""
    made = []
    for name in ("student", "critic"):
        parameters = add_lora(teacher.transformer, name, rank=4)
        made.append(Lora(name, parameters, torch.optim.SGD(parameters, lr=0.0)))
    return made[0], made[1]


@pytest.fixture
def samples(teacher: QwenImagePipeline) -> Samples:
    texts = embed_pairs(teacher, ["a red star", "a moon"], ["a furry shape", " "], length=16)
    latents = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    return Samples(latents, LEVEL, texts.prompt, texts, GRID)


def matching(teacher: QwenImagePipeline, loras: tuple[Lora, Lora], guidance_scale: float) -> Matching:
    return Matching(Accelerator(cpu=True), teacher.transformer, *loras, 1, guidance_scale, 0.0, 1.0)


def test_nothing_is_pushed_where_the_critic_agrees_with_the_teacher(
    teacher: QwenImagePipeline, loras: tuple[Lora, Lora], samples: Samples
) -> None:
    losses = matching(teacher, loras, guidance_scale=1.0).update(samples, torch.Generator().manual_seed(1))
    assert float(losses["matching"]) < 1e-9


def test_gradient_leads_from_the_critics_clean_latent_to_the_guided_teachers(
    teacher: QwenImagePipeline, loras: tuple[Lora, Lora], samples: Samples
) -> None:
    """The student's gradient is that of what it foresees, pushed by the difference of the two scores."""
    match = matching(teacher, loras, guidance_scale=4.0)
    match.update(samples, torch.Generator().manual_seed(1))
    student = [parameter for key, parameter in teacher.transformer.named_parameters() if ".student." in key]
    seen = [parameter.grad.clone() for parameter in student if parameter.grad is not None]

    noise, level = match._diffusion(samples, torch.Generator().manual_seed(1))
    weights = level[:, None, None]
    with active(teacher.transformer, "student"):
        own = conditional(teacher.transformer, samples.text, GRID)(samples.latents, torch.full((2,), LEVEL))
        foreseen = samples.latents - LEVEL * own
    clean = foreseen.detach()
    noisy = (1 - weights) * clean + weights * noise
    with torch.no_grad(), active(teacher.transformer, None):
        real = noisy - weights * guided(teacher.transformer, samples.texts, GRID, 4.0)(noisy, level)
        fake = noisy - weights * conditional(teacher.transformer, samples.text, GRID)(noisy, level)
    push = (fake - real) / (clean - real).abs().mean((1, 2), keepdim=True) / clean.numel()
    for parameter in student:
        parameter.requires_grad_(True)  # which peft has taken away since
    expected = torch.autograd.grad(foreseen, student, push, materialize_grads=True)
    norm = torch.stack([gradient.norm() for gradient in expected]).norm()
    for gradient, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, wanted / norm.clamp(min=1.0), rtol=1e-2, atol=1e-6)


def test_critic_learns_the_samples_and_the_base_model_stays(
    teacher: QwenImagePipeline, loras: tuple[Lora, Lora], samples: Samples
) -> None:
    critic = [parameter for key, parameter in teacher.transformer.named_parameters() if ".critic." in key]
    before, weights = [parameter.clone() for parameter in critic], teacher.transformer.proj_out.weight.clone()
    learning = Lora("critic", critic, torch.optim.AdamW(critic, lr=1e-3))
    match = matching(teacher, (loras[0], learning), guidance_scale=1.0)
    losses = [float(match.update(samples, torch.Generator().manual_seed(seed % 3))["critic"]) for seed in range(9)]
    assert sum(losses[6:]) < sum(losses[:3])
    assert torch.equal(weights, teacher.transformer.proj_out.weight)
    with torch.no_grad():  # another test's critic agrees with the teacher
        for parameter, value in zip(critic, before, strict=True):
            parameter.copy_(value)


def test_a_critic_gets_to_know_a_saved_lora_that_stays_as_it_is(samples: Samples) -> None:
    pipeline = load_pipeline(CHECKPOINT, torch.device("cpu"))
    pipeline.transformer.requires_grad_(False)
    saved = CHECKPOINT / "loras" / "distilled"
    student = add_lora(pipeline.transformer, "student", rank=32, start_from=str(saved))
    critic = add_lora(pipeline.transformer, "critic", rank=4)
    assert any(float(parameter.abs().max()) > 0 for parameter in student)
    before = [[parameter.clone() for parameter in of] for of in (student, critic)]
    loras = [Lora(name, of, torch.optim.SGD(of, lr=0.1)) for name, of in (("student", student), ("critic", critic))]
    losses = matching(pipeline, (loras[0], loras[1]), guidance_scale=2.0).update_critic(
        samples, torch.Generator().manual_seed(0)
    )
    assert set(losses) == {"critic"}
    assert all(torch.equal(now, then) for now, then in zip(student, before[0], strict=True))
    assert any(not torch.equal(now, then) for now, then in zip(critic, before[1], strict=True))
