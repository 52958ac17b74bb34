"""Whole plans against diffusers' own `QwenImagePipeline`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    QwenImagePipeline,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from PIL import Image
from plans import PLANS

from backends import Backend
from stages.config import ModelConfig
from stages.errors import PromptTooLong
from stages.image import MAX_SEED
from stages.latents import draw_noise
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.plan import (
    AttentionGuidanceSpec,
    CacheSpec,
    FirstBlockSpec,
    MagCacheSpec,
    Plan,
    SeaCacheSpec,
    StageSpec,
    TaylorSeerSpec,
)
from stages.stage import Denoiser

PROMPT = "a large red circle above a small blue square on a white background"
NEGATIVE = "green"

# Of the largest value of a latent (about 5), in float32, which orders its sums by the shape of the batch.
TOLERANCE = 1e-5

# Sees a negative prompt by attention guidance alone.
AVOIDS = Plan(
    name="avoids",
    stages=(
        StageSpec(
            name="distilled",
            sigma_start=1.0,
            sigma_end=0.0,
            steps=4,
            adapter="distilled",
            attention_guidance=AttentionGuidanceSpec(),
        ),
    ),
)


class DenoiseAll(Protocol):
    def __call__(
        self, plan: Plan, prompt: str, negative_prompt: str | None = None, *, seeds: tuple[int, ...], size: str
    ) -> list[LatentPacket]: ...


@pytest.fixture(scope="module")
def denoise_all(pipeline: Pipeline) -> DenoiseAll:
    """Call it for the packets of some seeds after the last stage of a plan."""

    def run(
        plan: Plan, prompt: str, negative_prompt: str | None = None, *, seeds: tuple[int, ...], size: str
    ) -> list[LatentPacket]:
        packets = [
            pipeline.encoder.begin("test", index, seed, size, prompt, negative_prompt)
            for index, seed in enumerate(seeds)
        ]
        for _ in plan.stages:
            packets = pipeline.denoiser.denoise(packets, plan)
        return packets

    return run


def asked(plan: Plan, seeds: tuple[int, ...], size: str) -> dict[str, object]:
    """Arguments by which diffusers' pipeline runs the plan's only stage."""
    (stage,) = plan.stages
    width, height = map(int, size.split("x"))
    return {
        "prompt": [PROMPT] * len(seeds),
        "negative_prompt": [NEGATIVE] * len(seeds) if stage.guided else None,
        "true_cfg_scale": stage.guidance_scale,
        "width": width,
        "height": height,
        "num_inference_steps": stage.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }


def run_diffusers(reference: QwenImagePipeline, plan: Plan, seeds: tuple[int, ...], size: str) -> torch.Tensor:
    """Latents (batch, tokens, channels) after the plan's only stage."""
    return reference(**asked(plan, seeds, size), output_type="latent").images


def latents_of(packets: list[LatentPacket]) -> torch.Tensor:
    return torch.stack([packet.latent for packet in packets])


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max())


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    return difference(left, right) / max(1.0, float(left.abs().max()))


def pixel_difference(left: Image.Image, right: Image.Image) -> int:
    assert (left.size, left.mode) == (right.size, right.mode)
    return int(np.abs(np.asarray(left, np.int16) - np.asarray(right, np.int16)).max())


def base_plan(steps: int = 6, *, guidance_scale: float = 4.0, cache: CacheSpec | None = None) -> Plan:
    stage = StageSpec(
        name="base", sigma_start=1.0, sigma_end=0.0, steps=steps, guidance_scale=guidance_scale, cache=cache
    )
    return Plan(stages=(stage,))


@pytest.mark.parametrize(
    ("plan", "seeds", "size"),
    [
        (base_plan(), (5,), "192x128"),
        (base_plan(), (5, 6), "128x192"),
        (base_plan(guidance_scale=1.0), (5,), "128x128"),
        (PLANS["base"], (7,), "64x64"),
    ],
    ids=["6 steps, wide", "6 steps, tall, two seeds", "6 steps without guidance", "the preset's 50 steps"],
)
def test_base_plan_equals_diffusers(
    denoise_all: DenoiseAll, diffusers_base: QwenImagePipeline, plan: Plan, seeds: tuple[int, ...], size: str
) -> None:
    packets = denoise_all(plan, PROMPT, NEGATIVE if plan.guided else None, seeds=seeds, size=size)
    assert error(latents_of(packets), run_diffusers(diffusers_base, plan, seeds, size)) < TOLERANCE


def test_images_equal_those_of_diffusers(pipeline: Pipeline, diffusers_base: QwenImagePipeline) -> None:
    plan, seeds, size = base_plan(), (5, 6), "192x128"
    results = pipeline.run(plan, PROMPT, negative_prompt=NEGATIVE, seeds=seeds, size=size)
    images = diffusers_base(**asked(plan, seeds, size)).images
    assert [result.seed for result in results] == [5, 6]
    for result, image in zip(results, images, strict=True):
        assert result.image.size == (192, 128)
        assert pixel_difference(result.image, image) <= 1
        assert result.nfe == 12
        assert [span.stage for span in result.spans] == ["encode", "base", "decode"]
    assert pixel_difference(results[0].image, images[1]) > 10


@pytest.mark.parametrize("size", ["64x64", "128x192"])
def test_distilled_plan_equals_diffusers_with_lightnings_scheduler(
    denoise_all: DenoiseAll, diffusers_distilled: QwenImagePipeline, diffusers_base: QwenImagePipeline, size: str
) -> None:
    plan = PLANS["distilled"]
    latents = latents_of(denoise_all(plan, PROMPT, seeds=(5, 6), size=size))
    assert error(latents, run_diffusers(diffusers_distilled, plan, (5, 6), size)) < TOLERANCE
    assert difference(latents, run_diffusers(diffusers_base, plan, (5, 6), size)) > 1e-2


def test_adapter_scale_is_that_of_diffusers(denoise_all: DenoiseAll, diffusers_distilled: QwenImagePipeline) -> None:
    full = PLANS["distilled"]
    half = Plan(stages=(full.stages[0].model_copy(update={"adapter_scale": 0.5}),))
    latents = latents_of(denoise_all(half, PROMPT, seeds=(5,), size="64x64"))
    try:
        diffusers_distilled.set_adapters("distilled", 0.5)
        assert error(latents, run_diffusers(diffusers_distilled, half, (5,), "64x64")) < TOLERANCE
    finally:
        diffusers_distilled.set_adapters("distilled", 1.0)
    # The strength of one stage does not stay for the next.
    latents = latents_of(denoise_all(full, PROMPT, seeds=(5,), size="64x64"))
    assert error(latents, run_diffusers(diffusers_distilled, full, (5,), "64x64")) < TOLERANCE


def test_adapters_of_one_plan_leave_no_trace_in_the_next(denoise_all: DenoiseAll) -> None:
    before = latents_of(denoise_all(base_plan(), PROMPT, NEGATIVE, seeds=(5,), size="64x64"))
    hybrid = latents_of(denoise_all(PLANS["hybrid"], PROMPT, NEGATIVE, seeds=(5,), size="64x64"))
    after = latents_of(denoise_all(base_plan(), PROMPT, NEGATIVE, seeds=(5,), size="64x64"))
    assert torch.equal(before, after)
    assert difference(before, hybrid) > 1e-2


def test_a_stage_in_parts_is_the_whole_stage(denoise_all: DenoiseAll) -> None:
    whole = StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=6, guidance_scale=4.0, shift=2.0)
    level = 0.8  # after two of the steps: 2 t / (1 + t) at t = 2 / 3
    first = whole.model_copy(update={"sigma_end": level, "steps": 2})
    second = whole.model_copy(update={"sigma_start": level, "steps": 4})
    together, apart, unguided = (
        denoise_all(Plan(stages=stages), PROMPT, NEGATIVE, seeds=(5, 6), size="64x64")
        for stages in ((whole,), (first, second), (first.model_copy(update={"guidance_scale": 1.0}), second))
    )
    assert error(latents_of(apart), latents_of(together)) < TOLERANCE
    assert difference(latents_of(unguided), latents_of(together)) > 1e-2
    assert [sum(span.nfe for span in made[0].spans) for made in (together, apart, unguided)] == [12, 12, 10]


MAGNITUDES = (1.0, 1.1, 0.97, 1.03, 0.9)


def unpack(packed: torch.Tensor) -> list[torch.Tensor]:
    """The (channels, 1, height, width) that SeaCache's hook asks for, of one 64x64 image in tokens."""
    return list(QwenImagePipeline._unpack_latents(packed, 64, 64, 8))


@contextmanager
def steps_announced(pipeline: QwenImagePipeline) -> Iterator[None]:
    """SeaCache's hook asks for the step and its sigma, which diffusers' Qwen-Image pipeline does not tell it."""
    transformer, counts = pipeline.transformer, Counter[str]()
    announce = transformer.cache_context

    def cache_context(name: str) -> AbstractContextManager[None]:
        sigmas = pipeline.scheduler.sigmas
        step, counts[name] = counts[name], counts[name] + 1
        return announce(name, step_index=step, sigma=sigmas[step], num_inference_steps=len(sigmas) - 1)

    transformer.cache_context = cache_context
    yield
    del transformer.cache_context


CACHES: dict[str, tuple[CacheSpec, object]] = {
    "first_block": (FirstBlockSpec(threshold=0.3), FirstBlockCacheConfig(threshold=0.3)),
    "taylorseer": (
        TaylorSeerSpec(interval=4, warmup=2, order=2),
        TaylorSeerCacheConfig(
            cache_interval=4,
            disable_cache_before_step=2,
            max_order=2,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        ),
    ),
    "magcache": (
        MagCacheSpec(threshold=0.3, ratios=MAGNITUDES, most_skipped=2),
        MagCacheConfig(threshold=0.3, max_skip_steps=2, num_inference_steps=24, mag_ratios=list(MAGNITUDES)),
    ),
    "seacache": (
        SeaCacheSpec(threshold=0.1),
        SeaCacheConfig(threshold=0.1, raw_vision_callback=lambda module, args, kwargs: unpack(kwargs["hidden_states"])),
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_cached_plan_decides_and_computes_as_diffusers(
    denoise_all: DenoiseAll, diffusers_base: QwenImagePipeline, blocks_run: list[int], kind: str
) -> None:
    spec, hook = CACHES[kind]
    steps, size, blocks = 24, "64x64", len(diffusers_base.transformer.transformer_blocks)
    plan = base_plan(steps=steps, cache=spec)
    (packet,) = denoise_all(plan, PROMPT, NEGATIVE, seeds=(5,), size=size)
    ours = sum(blocks_run)
    assert ours < 1.8 * steps * blocks, "the cache hardly ever hits, so that this compares nothing"
    assert packet.spans[-1].nfe == pytest.approx(ours / blocks)

    blocks_run.clear()
    diffusers_base.transformer.enable_cache(hook)
    try:
        with steps_announced(diffusers_base):
            latents = run_diffusers(diffusers_base, plan, (5,), size)
    finally:
        diffusers_base.transformer.disable_cache()
    assert sum(blocks_run) == ours
    assert error(packet.latent[None], latents) < TOLERANCE

    (uncached,) = denoise_all(base_plan(steps=steps), PROMPT, NEGATIVE, seeds=(5,), size=size)
    assert difference(packet.latent, uncached.latent) > 1e-4


@pytest.mark.parametrize("kind", CACHES)
def test_rows_of_a_batch_have_caches_of_their_own(denoise_all: DenoiseAll, blocks_run: list[int], kind: str) -> None:
    """Seeds hit at different steps, and each is computed, and counted, as if it were alone."""
    plan, seeds = base_plan(steps=24, cache=CACHES[kind][0]), (5, 5, 6, 7)
    together = denoise_all(plan, PROMPT, NEGATIVE, seeds=seeds, size="64x64")
    computed = sum(blocks_run)
    blocks_run.clear()
    for seed, packet in zip(seeds, together, strict=True):
        (alone,) = denoise_all(plan, PROMPT, NEGATIVE, seeds=(seed,), size="64x64")
        assert packet.spans[-1].nfe == alone.spans[-1].nfe
        assert error(packet.latent[None], alone.latent[None]) < TOLERANCE
    assert sum(blocks_run) == computed
    if kind == "first_block":
        assert len({packet.spans[-1].nfe for packet in together}) > 1


@pytest.mark.parametrize("plan", [base_plan(), PLANS["distilled"], PLANS["hybrid"]], ids=lambda plan: plan.name)
def test_a_seed_gives_the_same_latent_alone_and_among_others(denoise_all: DenoiseAll, plan: Plan) -> None:
    negative = NEGATIVE if plan.guided else None
    batch = latents_of(denoise_all(plan, PROMPT, negative, seeds=(0, 1, 12345, MAX_SEED), size="64x64"))
    for index, seed in enumerate((0, 1, 12345, MAX_SEED)):
        alone = latents_of(denoise_all(plan, PROMPT, negative, seeds=(seed,), size="64x64"))
        assert error(batch[index : index + 1], alone) < TOLERANCE
        for other in range(index):
            assert difference(batch[index], batch[other]) > 0.1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_what_diffusers_draws(
    diffusers_base: QwenImagePipeline, dtype: torch.dtype, width: int, height: int
) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, MAX_SEED)]
    drawn = diffusers_base.prepare_latents(2, 16, height, width, dtype, torch.device("cpu"), generators)
    ours = torch.stack([draw_noise(seed, 16, (height // 16, width // 16)) for seed in (0, MAX_SEED)])
    assert drawn.dtype == dtype
    assert torch.equal(ours.to(dtype), drawn)
    assert difference(ours[0], ours[1]) > 1


def test_an_image_starts_as_the_noise_of_its_seed_at_its_size(pipeline: Pipeline) -> None:
    packet = pipeline.encoder.begin("test", 0, 9, "192x128", PROMPT, None)
    assert packet.grid == (8, 12)
    assert packet.sigma == 1.0
    assert packet.negative_embeds is None
    assert torch.equal(packet.latent, draw_noise(9, 16, (8, 12)))


@pytest.mark.parametrize("prompt", [PROMPT, NEGATIVE, " ", ""])
def test_embeddings_are_those_of_diffusers(pipeline: Pipeline, diffusers_base: QwenImagePipeline, prompt: str) -> None:
    with torch.inference_mode():
        embeds, mask = diffusers_base.encode_prompt(prompt)
    assert mask is None
    assert difference(pipeline.encoder.encode(prompt), embeds[0]) < 1e-6


@pytest.mark.parametrize(
    ("plan", "asked", "encoded"),
    [
        ("base", "a red shape", "a red shape"),
        ("base", None, " "),
        ("base", "", " "),
        ("base", " \n", " "),
        ("distilled", "a red shape", None),
        (AVOIDS, "a red shape", "a red shape"),
        (AVOIDS, None, None),
        (AVOIDS, " ", None),
    ],
    ids=str,
)
def test_which_negative_prompt_is_encoded(plan: str | Plan, asked: str | None, encoded: str | None) -> None:
    plan = PLANS[plan] if isinstance(plan, str) else plan
    assert plan.negative_prompt(asked, " ") == encoded


def test_a_distilled_stage_with_attention_guidance_hears_negative_prompts(denoise_all: DenoiseAll) -> None:
    distilled = PLANS["distilled"]
    plain, deaf = (latents_of(denoise_all(distilled, PROMPT, text, seeds=(5,), size="64x64")) for text in (None, "red"))
    assert torch.equal(plain, deaf)
    silent, avoiding = (
        latents_of(denoise_all(AVOIDS, PROMPT, text, seeds=(5,), size="64x64")) for text in (None, "red")
    )
    assert error(avoiding, silent) > 1e-2
    stage = distilled.stages[0].model_copy(update={"shift": AVOIDS.stages[0].shift})
    (alone,) = denoise_all(Plan(stages=(stage,)), PROMPT, None, seeds=(5,), size="64x64")
    assert torch.equal(silent, alone.latent[None])


def test_a_prompt_of_too_many_tokens_is_refused_by_the_name_of_its_parameter(pipeline: Pipeline) -> None:
    with pytest.raises(PromptTooLong, match=r"^prompt has \d+ tokens, at most 64 are allowed$"):
        pipeline.run("distilled", "red " * 65)
    with pytest.raises(PromptTooLong, match=r"^negative_prompt has \d+ tokens") as caught:
        pipeline.run("base", PROMPT, negative_prompt="red " * 65)
    assert caught.value.parameter == "negative_prompt"


def test_packets_that_cross_as_bytes_lead_to_the_same_latent(pipeline: Pipeline, denoise_all: DenoiseAll) -> None:
    plan = PLANS["hybrid"]
    packet = pipeline.encoder.begin("test", 0, 5, "64x64", PROMPT, PROMPT)
    for _ in plan.stages:
        (packet,) = pipeline.denoiser.denoise([LatentPacket.from_bytes(packet.to_bytes())], plan)
    (expected,) = denoise_all(plan, PROMPT, PROMPT, seeds=(5,), size="64x64")
    assert torch.equal(LatentPacket.from_bytes(packet.to_bytes()).latent, expected.latent)


def test_without_a_trained_bridge_the_hybrid_plan_runs_on_the_distilled_adapter(
    pipeline: Pipeline, config: ModelConfig, backend: Backend, denoise_all: DenoiseAll
) -> None:
    untrained = {name: adapter for name, adapter in config.adapters.items() if name != "bridge"}
    config = config.model_copy(update={"adapters": untrained})
    plan = PLANS["hybrid"].with_adapters(config.adapters)
    denoiser = Denoiser.load(config, backend)
    packets = [pipeline.encoder.begin("test", 0, 5, "64x64", PROMPT, NEGATIVE)]
    for _ in plan.stages:
        packets = denoiser.denoise(packets, plan)
    expected = denoise_all(plan, PROMPT, NEGATIVE, seeds=(5,), size="64x64")
    assert error(latents_of(packets), latents_of(expected)) < TOLERANCE
    bridged = denoise_all(PLANS["hybrid"], PROMPT, NEGATIVE, seeds=(5,), size="64x64")
    assert difference(latents_of(packets), latents_of(bridged)) > 1e-3


def test_run_uses_the_named_preset_the_first_size_and_an_empty_negative_prompt(pipeline: Pipeline) -> None:
    (result,) = pipeline.run("hybrid", PROMPT)
    (explicit,) = pipeline.run(PLANS["hybrid"], PROMPT, negative_prompt=" ", seeds=(0,), size="128x128")
    (other,) = pipeline.run(PLANS["hybrid"], PROMPT, negative_prompt=NEGATIVE, seeds=(0,), size="128x128")
    assert (result.image.size, result.nfe) == ((128, 128), 7)
    assert pixel_difference(result.image, explicit.image) == 0
    assert pixel_difference(result.image, other.image) > 0


def test_run_refuses_what_the_model_lacks(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="plan must be one of base, cached, distilled, hybrid, not 'fastest'"):
        pipeline.run("fastest", PROMPT)
    with pytest.raises(ValueError, match=r"size must be one of .*, not '128x64'"):
        pipeline.run("distilled", PROMPT, size="128x64")
    for seed in (-1, MAX_SEED + 1, 1.5):
        with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}"):
            pipeline.run("distilled", PROMPT, seeds=[seed])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there must be an image"):
        pipeline.run("distilled", PROMPT, seeds=[])
    plan = Plan(stages=(PLANS["distilled"].stages[0].model_copy(update={"adapter": "turbo"}),))
    with pytest.raises(ValueError, match=r"stages\.0\.adapter must be one of \['bridge', 'distilled', 'finish'\]"):
        pipeline.run(plan, PROMPT)
