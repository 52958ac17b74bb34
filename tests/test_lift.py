"""Stages at half an image's width and height, and what carries their latents to the full grid."""

from __future__ import annotations

import pytest
import torch
from plans import PLANS

from stages.batching import StepBatcher
from stages.latents import draw_noise, pack, unpack
from stages.lift import lift
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, PlanError, StageSpec

GRID = (8, 6)


def base(start: float, end: float, scale: float) -> StageSpec:
    return StageSpec(name="base", sigma_start=start, sigma_end=end, steps=2, guidance_scale=3.0, scale=scale)


HALF = Plan(name="half", stages=(base(1.0, 0.75, 0.5), base(0.75, 0.0, 1.0)))


def test_noise_stays_white_and_goes_on_as_the_small_latents_noise() -> None:
    noise = draw_noise(1, 16, GRID)
    lifted = unpack(lift(noise, torch.zeros_like(noise), 1.0, GRID, seed=5)[None], (16, 12))[0]
    assert float(lifted.std()) == pytest.approx(1.0, abs=0.03)
    neighbours = torch.corrcoef(torch.stack([lifted[..., :-1].flatten(), lifted[..., 1:].flatten()]))
    assert abs(float(neighbours[0, 1])) < 0.03
    means = torch.nn.functional.avg_pool2d(lifted, 2)
    torch.testing.assert_close(means, unpack(noise[None], GRID)[0] / 2, rtol=0, atol=1e-5)


def test_what_is_foreseen_is_enlarged_in_place() -> None:
    flat = torch.zeros(1, 16, 16, 12)
    flat[:, :, :8] = 1.0  # the upper half
    clean = pack(flat)[0]
    sigma = 0.25
    noisy = (1 - sigma) * clean + sigma * draw_noise(1, 16, GRID)
    lifted = unpack(lift(noisy, clean, sigma, GRID, seed=5)[None], (16, 12))[0]
    assert float(lifted[:, :14].mean()) == pytest.approx(1 - sigma, abs=0.02)
    assert float(lifted[:, 18:].mean()) == pytest.approx(0.0, abs=0.02)


def test_a_seed_decides_the_noise_that_is_added() -> None:
    noise = draw_noise(1, 16, GRID)
    first, again, other = (lift(noise, 0 * noise, 0.5, GRID, seed) for seed in (1, 1, 2**64 - 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_the_size_costs_a_quarter() -> None:
    assert HALF.nfe == 8
    assert HALF.work == 5.0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((base(1.0, 0.0, 0.5),), "stages.0.scale must be 1 at the end, not 0.5"),
        ((base(1.0, 0.5, 1.0), base(0.5, 0.2, 0.5), base(0.2, 0.0, 1.0)), "must not be below 1.0, which is base's"),
    ],
)
def test_a_plan_does_not_go_back_to_half_the_size(stages: tuple[StageSpec, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(stages=stages)


def test_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be 1 or 0.5, not 0.25"):
        base(1.0, 0.0, 0.25)


def test_odd_rows_of_tokens_are_refused() -> None:
    HALF.check_grid((4, 6))
    with pytest.raises(PlanError, match=r"stages.0.scale must be 1 for 5x4 tokens, not 0.5"):
        HALF.check_grid((5, 4))


def test_a_pipeline_draws_what_the_batcher_does_among_images_of_other_plans(pipeline: Pipeline) -> None:
    """Images at half the size share steps with others of that grid, and leave with the full one."""
    images = [Prompted("a red star", 1), Prompted("a blue ring", 2)]
    packets = pipeline.enter(HALF, images, "128x128")
    assert {packet.grid for packet in packets} == {(4, 4)}
    small = pipeline.enter(PLANS["distilled"], images[:1], "64x64")
    batcher = StepBatcher(pipeline.denoiser, max_tokens=4096)
    futures = [batcher.submit(packet, HALF, stages=2) for packet in packets]
    other = batcher.submit(small[0], PLANS["distilled"])
    assert len(batcher.step()) == 3
    while not all(future.done() for future in (*futures, other)):
        batcher.step()
    done = [future.result() for future in futures]
    assert {packet.grid for packet in done} == {(8, 8)}
    assert other.result().grid == (4, 4)
    expected = packets
    for _ in HALF.stages:
        expected = pipeline.denoise(expected, HALF)
    for packet, truth in zip(done, expected, strict=True):
        torch.testing.assert_close(packet.latent, truth.latent, rtol=0, atol=1e-3)
    assert pipeline.run_batch(HALF, images, "128x128")[0].image.size == (128, 128)
