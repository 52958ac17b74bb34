"""One contract for every backend that this machine can run; `pytest -rs` says which it cannot, and why.

With `--backend NAME` that one alone is tested, and fails where it cannot run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from backends import Backend, backend_names, get_backend
from backends.buckets import Buckets
from stages.batching import StepBatcher
from stages.caches import make_cache
from stages.config import ModelConfig
from stages.families import get_family
from stages.pipeline import Pipeline, Prompted
from stages.plan import AttentionGuidanceSpec, FirstBlockSpec
from stages.rows import ModelInput
from stages.static_walk import StaticWalk
from stages.text import Negative

ROOT = Path(__file__).parent.parent
EQUAL = 2e-5  # greatest difference of latents from the processor's, in float32

IMAGES = [
    Prompted("a red star", 1, "blue"),
    Prompted("a small furry green square left of a large blue triangle on a white background", 2),
    Prompted("a shape", 3, "red, a furry shape"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("backend")
        metafunc.parametrize("device", [chosen] if chosen else backend_names(), indirect=True, scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Backend:
    backend = get_backend(request.param)
    if backend.missing:
        (pytest.fail if request.config.getoption("backend") else pytest.skip)(f"{backend.name}: {backend.missing}")
    return backend


@pytest.fixture(scope="module", params=["qwen_image", "z_image"])
def exact(request: pytest.FixtureRequest, config: ModelConfig) -> ModelConfig:
    """A small model of each family in float32."""
    model = config if request.param == config.family else ModelConfig.read(request.getfixturevalue(request.param))
    return model.model_copy(update={"dtype": "float32", "sizes": ("128x128",), "plans_at": {}})


@pytest.fixture(scope="module")
def pipeline(exact: ModelConfig, backend: Backend) -> Pipeline:
    """The model on the processor."""
    return Pipeline(exact, backend)


@pytest.fixture(scope="module")
def here(exact: ModelConfig, device: Backend) -> Pipeline:
    """The model on the device."""
    return Pipeline(exact, device)


@pytest.fixture
def rows(pipeline: Pipeline, here: Pipeline) -> list[ModelInput]:
    """Rows of different noise levels, prompts, adapters, skipped blocks and, if the family can, attention guidance."""
    place = here.denoiser._network.device
    guided = get_family(here.config.family).guides_attention
    packets = pipeline.enter(pipeline.config.plan("hybrid"), IMAGES)
    return [
        ModelInput(
            packet.latent.float().to(place),
            sigma=1.0 - 0.3 * row,
            embeds=packet.prompt_embeds.to(place),
            negative=(
                Negative(packets[2].prompt_embeds.to(place), AttentionGuidanceSpec()) if guided and not row else None
            ),
            adapter=adapter,
            adapter_scale=0.5 + row / 2,
            skip_blocks=frozenset({2} if row == 1 else ()),
        )
        for row, (packet, adapter) in enumerate(zip(packets, (None, "distilled", "bridge"), strict=True))
    ]


def evaluate(pipeline: Pipeline, rows: list[ModelInput]) -> tuple[torch.Tensor, list[float]]:
    """Velocities on the processor, and costs."""
    network = pipeline.denoiser._network
    moved = [
        replace(
            row,
            latent=row.latent.to(network.device),
            embeds=row.embeds.to(network.device),
            negative=row.negative and replace(row.negative, embeds=row.negative.embeds.to(network.device)),
        )
        for row in rows
    ]
    with pipeline.denoiser._backend.inference():
        predictions = network.evaluate(moved, (8, 8))
    return torch.stack([each.velocity.cpu() for each in predictions]), [each.cost for each in predictions]


def test_a_module_is_placed_for_inference(here: Pipeline, device: Backend) -> None:
    parameters = list(here.denoiser._network.transformer.module.parameters())
    assert {parameter.device.type for parameter in parameters} == {torch.device(device.device).type}
    assert not any(parameter.requires_grad for parameter in parameters)


def test_the_device_answers_a_probe(device: Backend) -> None:
    device.probe()


def test_the_device_knows_its_memory(here: Pipeline, device: Backend) -> None:
    memory = device.memory()
    assert memory.in_use > 0
    assert memory.free > 0


def test_a_device_that_computes_wrongly_fails_the_probe(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", torch.zeros)
    with pytest.raises(RuntimeError, match="multiplied wrongly"):
        device.probe()


def test_noise_and_prompts_are_the_processors(here: Pipeline, pipeline: Pipeline) -> None:
    plan = here.config.plan("base")
    for ours, truth in zip(here.enter(plan, IMAGES), pipeline.enter(plan, IMAGES), strict=True):
        assert torch.equal(ours.latent, truth.latent)
        assert ours.prompt_embeds.shape == truth.prompt_embeds.shape
        torch.testing.assert_close(ours.prompt_embeds, truth.prompt_embeds, rtol=0, atol=EQUAL)


def test_an_evaluation_of_rows_that_differ_in_everything(
    here: Pipeline, pipeline: Pipeline, rows: list[ModelInput]
) -> None:
    velocities, costs = evaluate(here, rows)
    truths, true_costs = evaluate(pipeline, rows)
    torch.testing.assert_close(velocities, truths, rtol=0, atol=EQUAL)
    assert costs == true_costs


def test_caches_of_which_some_hit(here: Pipeline, pipeline: Pipeline, rows: list[ModelInput]) -> None:
    """The first row's cache never hits, the second's does at the second step, and the third row has none."""
    plain = [replace(row, negative=None, skip_blocks=frozenset()) for row in rows]

    def walk(pipeline: Pipeline) -> list[tuple[torch.Tensor, list[float]]]:
        caches = [make_cache(FirstBlockSpec(threshold=each), steps=2) for each in (1e-9, 0.99)]
        first = [replace(row, cache=cache) for row, cache in zip(plain, [*caches, None], strict=True)]
        second = [replace(row, sigma=row.sigma - 0.05) for row in first]
        return [evaluate(pipeline, first), evaluate(pipeline, second)]

    blocks = here.denoiser.blocks
    for (velocities, costs), (truths, _), expected in zip(
        walk(here), walk(pipeline), ([1.0] * 3, [1.0, 1 / blocks, 1.0]), strict=True
    ):
        torch.testing.assert_close(velocities, truths, rtol=0, atol=EQUAL)
        assert costs == expected


@pytest.mark.parametrize("plan", ["cached", "distilled", "hybrid"])
def test_the_latents_of_a_plan(here: Pipeline, pipeline: Pipeline, plan: str) -> None:
    def denoised(pipeline: Pipeline) -> torch.Tensor:
        stages = pipeline.config.plan(plan)
        if plan == "cached":  # at few steps, in which a cache hits all the same
            few = stages.stages[0].model_copy(update={"steps": 8, "cache": FirstBlockSpec(threshold=0.3)})
            stages = stages.model_copy(update={"stages": (few,)})
        packets = pipeline.enter(stages, IMAGES)
        for _ in stages.stages:
            packets = pipeline.denoise(packets, stages)
        return torch.stack([packet.latent.cpu().float() for packet in packets])

    torch.testing.assert_close(denoised(here), denoised(pipeline), rtol=0, atol=EQUAL)


def test_an_image_is_decoded(here: Pipeline, pipeline: Pipeline) -> None:
    latents = torch.stack([packet.latent for packet in pipeline.enter(pipeline.config.plan("base"), IMAGES)])
    for ours, truth in zip(here.decoder.decode(latents, (8, 8)), pipeline.decoder.decode(latents, (8, 8)), strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(truth, int)).max() <= 1


def test_a_cancelled_image_leaves_the_device_and_another_goes_on(here: Pipeline, pipeline: Pipeline) -> None:
    plan = here.config.plan("distilled")
    first, second, _ = pipeline.enter(plan, IMAGES)
    batcher = StepBatcher(here.denoiser, max_tokens=1024)
    cancelled, kept = batcher.submit(first, plan), batcher.submit(second, plan)
    assert len(batcher.step()) == 2
    cancelled.cancel()
    while not kept.done():
        assert batcher.step() == [second]
    (truth,) = pipeline.denoise([second], plan)
    torch.testing.assert_close(kept.result().latent.cpu(), truth.latent, rtol=0, atol=EQUAL)


def test_sizes_are_rounded_up_to_buckets() -> None:
    assert [Buckets().fit(size) for size in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert [Buckets(64).fit(size) for size in (0, 1, 64, 65)] == [64, 64, 64, 128]
    assert Buckets().up_to(9) == (1, 2, 4, 8, 16)
    assert Buckets(64).up_to(64) == (64,)


# What follows is about devices that compile for every shape.


@pytest.fixture
def compilations(device: Backend) -> Callable[[], int]:
    """Count the graphs that were compiled so far."""
    if device.shapes is None:
        pytest.skip(f"{device.name}: runs any shape")
    if device.name == "tpu":
        return lambda: torch.tpu._get_cache_stats().num_compilations  # type: ignore[attr-defined]
    return xla_metric(device, "CompileTime")


@pytest.fixture
def reads(device: Backend) -> Callable[[], int]:
    """Count the transfers from the device to the host so far."""
    return xla_metric(device, "TransferFromDeviceTime")


def xla_metric(device: Backend, name: str) -> Callable[[], int]:
    """Count what PyTorch/XLA has timed under `name` so far."""
    if device.name != "xla":
        pytest.skip(f"{device.name}: its library does not count that")
    from torch_xla.debug import metrics

    return lambda: (metrics.metric_data(name) or (0,))[0]


@pytest.fixture(scope="module")
def warm(exact: ModelConfig, device: Backend) -> Pipeline:
    """A pipeline after warm-up over the config's sizes, of which it has one."""
    small = exact.model_copy(update={"max_prompt_tokens": 59})
    pipeline = Pipeline(small, device)
    pipeline.denoiser.warm_up(small.sizes, 8 * 64, print)
    return pipeline


def draw_images(rng: Random) -> list[Prompted]:
    """One to eight images, of prompts of 1 to 59 words, most of them with a negative prompt."""
    words = ["red", "furry", "star", "left", "of", "white"]
    return [
        Prompted(
            " ".join(rng.choices(words, k=rng.randint(1, 50))),
            rng.randrange(2**32),
            rng.choice([None, "blue", "a furry shape, red, striped"]),
        )
        for _ in range(rng.randint(1, 8))
    ]


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(warm: Pipeline, compilations: Callable[[], int]) -> None:
    rng, channels = Random(0), warm.denoiser._network.transformer.token_channels
    for text in ("a star", "a star " * 20):  # encoder and decoder have a shape a size
        warm.decoder.decode(torch.zeros(1, 64, channels), (8, 8))
        warm.encoder.encode(text)
    before = compilations()
    for number in range(30):
        plan = warm.config.plan(("base", "cached", "distilled", "hybrid")[number % 4])
        if number % 4 < 2:
            short = plan.stages[0].model_copy(update={"steps": 6})
            plan = plan.model_copy(update={"stages": (short,)})
        images = draw_images(rng)
        batcher = StepBatcher(warm.denoiser, max_tokens=8 * 64)
        futures = [batcher.submit(packet, plan, stages=len(plan.stages)) for packet in warm.enter(plan, images)]
        while not all(future.done() for future in futures):
            batcher.step()
        warm.decoder.decode(torch.stack([future.result().latent for future in futures]), (8, 8))
        assert compilations() == before, f"batch {number}: {len(images)} images of {plan.name}"


def test_the_host_does_not_read_the_device_within_a_step(
    here: Pipeline, rows: list[ModelInput], reads: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its result, at the end."""
    plain = StaticWalk._read
    counts: list[int] = []

    def read(self: StaticWalk, *arguments: object) -> torch.Tensor:
        counts.append(reads())
        return plain(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StaticWalk, "_read", read)
    before = reads()
    evaluate(here, rows)
    assert counts == [before]
    assert reads() > before


@pytest.mark.long
@pytest.mark.slow
def test_a_second_start_finds_what_the_first_compiled(
    device: Backend, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    plugins = [name for name in request.config.getoption("plugins") if "." in name]  # a device's stand-in, if any

    def start() -> tuple[int, int]:
        command = [sys.executable, "tests/start.py", device.name, str(tmp_path), *plugins]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stderr
        missed, found = json.loads(ended.stdout.splitlines()[-1])
        return missed, found

    missed, found = start()
    assert missed > 0
    assert start() == (0, missed + found)
