"""Noise levels against diffusers' own schedulers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from plans import PLANS

from stages.config import ModelConfig
from stages.loading import load_scheduler
from stages.plan import StageSpec
from stages.sigmas import shift_time, stage_sigmas
from stages.yaml_file import ConfigError

# 64x64, 128x128, 192x128, 256x256, 1024x1024, 1328x1328 and 1664x928 pixels.
TOKENS = [16, 64, 96, 256, 4096, 6889, 6032]


def diffusers_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> torch.Tensor:
    """As `QwenImagePipeline.__call__` sets them."""
    mu = calculate_shift(
        tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


def base_stage(steps: int, sigma_start: float = 1.0, sigma_end: float = 0.0) -> StageSpec:
    return StageSpec(name="base", sigma_start=sigma_start, sigma_end=sigma_end, steps=steps)


def distilled_stage(steps: int, sigma_start: float = 1.0, sigma_end: float = 0.0, shift: float = 3.0) -> StageSpec:
    return StageSpec(
        name="distilled", sigma_start=sigma_start, sigma_end=sigma_end, steps=steps, shift=shift, adapter="distilled"
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", [2, 6, 50])
def test_base_schedule_is_that_of_diffusers(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int
) -> None:
    assert scheduler.config.shift_terminal == 0.02
    sigmas = stage_sigmas(base_stage(steps), scheduler, tokens)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, diffusers_sigmas(scheduler, steps, tokens), atol=1e-6, rtol=0)
    assert float(sigmas[-2]) == pytest.approx(0.02, abs=1e-6)


def load_changed(config: ModelConfig, directory: Path, **changes: object) -> FlowMatchEulerDiscreteScheduler:
    """The small model's scheduler with some keys of its file changed, as the engine loads it."""
    content = json.loads((Path(config.source) / "scheduler" / "scheduler_config.json").read_text())
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(content | changes))
    return load_scheduler(config.model_copy(update={"source": str(directory)}))


@pytest.mark.parametrize("terminal", [None, 0.02, 0.3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_shift": math.log(3), "max_shift": math.log(3)},
        {"base_shift": -0.5, "max_shift": -2.0},
        {"time_shift_type": "linear"},
        {"time_shift_type": "linear", "base_shift": 2.0, "max_shift": 3.0, "max_image_seq_len": 4096},
        {"use_dynamic_shifting": False},
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_dynamic_shifting": False, "shift": 0.5, "time_shift_type": "linear"},
        {"shift": 3.0},
    ],
    ids=str,
)
def test_a_models_own_schedule_is_that_of_diffusers(
    config: ModelConfig, tmp_path: Path, changes: dict[str, object], terminal: float | None
) -> None:
    scheduler = load_changed(config, tmp_path, shift_terminal=terminal, **changes)
    for steps in (2, 4, 50):
        for tokens in TOKENS:
            sigmas = stage_sigmas(base_stage(steps), scheduler, tokens)
            torch.testing.assert_close(sigmas, diffusers_sigmas(scheduler, steps, tokens), atol=1e-6, rtol=0)


def test_a_static_shift_of_three_steps_as_diffusers_does(config: ModelConfig, tmp_path: Path) -> None:
    scheduler = load_changed(config, tmp_path, use_dynamic_shifting=False, shift=3, shift_terminal=None)
    assert stage_sigmas(base_stage(4), scheduler, 64).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("num_train_timesteps", 1),
        ("time_shift_type", "quadratic"),
        ("shift", 0),
        ("shift", float("nan")),
        ("max_shift", float("inf")),
        ("shift_terminal", 1.0),
        ("max_image_seq_len", 256),
        ("sigma_min", 0.1),
        ("_class_name", "UniPCMultistepScheduler"),
    ],
)
def test_a_schedule_that_the_engine_has_not_is_refused_by_name(
    config: ModelConfig, tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler/scheduler_config\.json: {key}\b"):
        load_changed(config, tmp_path, **{key: value})


@pytest.mark.parametrize(("base", "most"), [(0.9, 0.5), (0.0, 0.9), (0.01, 0.9)])
def test_a_linear_shift_that_does_not_stay_above_zero_is_refused(
    config: ModelConfig, tmp_path: Path, base: float, most: float
) -> None:
    with pytest.raises(ConfigError, match="base_shift and max_shift"):
        load_changed(config, tmp_path, time_shift_type="linear", base_shift=base, max_shift=most)


def test_base_schedule_depends_on_the_resolution(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    small, large = (stage_sigmas(base_stage(50), scheduler, tokens) for tokens in (64, 6889))
    assert (large - small)[1:-2].min() > 1e-4


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("tokens", [16, 256, 6889])
def test_shift_of_three_is_lightnings_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    lightning_scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    tokens: int,
) -> None:
    sigmas = stage_sigmas(distilled_stage(steps), scheduler, tokens)
    torch.testing.assert_close(sigmas, diffusers_sigmas(lightning_scheduler, steps, tokens), atol=1e-6, rtol=0)


def test_distilled_plan_steps_at_the_levels_that_its_comment_promises(
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    sigmas = stage_sigmas(PLANS["distilled"].stages[0], scheduler, 64)
    assert sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("tokens", [64, 6889])
def test_stages_of_the_hybrid_plan_meet_at_the_hand_over(
    scheduler: FlowMatchEulerDiscreteScheduler, tokens: int
) -> None:
    stages = PLANS["hybrid"].stages
    schedules = [stage_sigmas(stage, scheduler, tokens) for stage in stages]
    assert [len(sigmas) for sigmas in schedules] == [2, 2, 3, 2, 2]
    assert schedules[0][0] == 1
    assert schedules[-1][-1] == 0
    for (before, after), (stage, _) in zip(pairwise(schedules), pairwise(stages), strict=True):
        assert before[-1] == after[0] == np.float32(stage.sigma_end)
    # The stages after the base step where the distilled plan does.
    assert schedules[-2].tolist() == pytest.approx([0.75, 0.5])
    assert schedules[-1].tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_schedule_cut_in_two_at_one_of_its_levels_is_the_same_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler, shift: float, done: int
) -> None:
    whole = stage_sigmas(distilled_stage(8, shift=shift), scheduler, 64)
    level = float(whole[done])
    first = stage_sigmas(distilled_stage(done, sigma_end=level, shift=shift), scheduler, 64)
    second = stage_sigmas(distilled_stage(8 - done, sigma_start=level, shift=shift), scheduler, 64)
    torch.testing.assert_close(torch.cat([first, second[1:]]), whole, atol=1e-6, rtol=0)


def test_part_of_the_base_schedule_has_the_base_models_spacing(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    config = scheduler.config
    mu = calculate_shift(64, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    sigmas = stage_sigmas(base_stage(5, sigma_start=0.95, sigma_end=0.4), scheduler, 64).double()
    times = 1 / (1 + math.exp(mu) * (1 / sigmas - 1))
    torch.testing.assert_close(times.diff(), times.diff().mean().expand(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_time_shift_has_its_inverse_and_values_at_the_ends(factor: float) -> None:
    times = np.linspace(0, 1, 11)
    sigmas = shift_time(factor, times)
    assert sigmas[0] == 0.0
    assert sigmas[-1] == pytest.approx(1.0, abs=1e-15)
    np.testing.assert_allclose(shift_time(1 / factor, sigmas), times, atol=1e-12)
    np.testing.assert_allclose(sigmas[1:], factor / (factor + 1 / times[1:] - 1), atol=1e-12)


# Some end below the terminal sigma of 0.02, and some lie below it altogether.
RANGES = [(1.0, 0.0), (1.0, 0.9), (0.9, 0.75), (0.75, 0.0), (0.5, 0.01), (0.03, 0.0), (0.02, 0.0), (0.01, 0.0)]


@pytest.mark.parametrize("shift", ["dynamic", 0.3, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(("sigma_start", "sigma_end"), RANGES)
def test_every_schedule_falls_strictly_from_start_to_end(
    scheduler: FlowMatchEulerDiscreteScheduler,
    sigma_start: float,
    sigma_end: float,
    steps: int,
    shift: Literal["dynamic"] | float,
) -> None:
    stage = StageSpec(name="base", sigma_start=sigma_start, sigma_end=sigma_end, steps=steps, shift=shift)
    sigmas = stage_sigmas(stage, scheduler, 64)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == np.float32(sigma_start)
    assert sigmas[-1] == np.float32(sigma_end)
    assert (sigmas.diff() < 0).all(), sigmas
