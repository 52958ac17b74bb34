"""A second family of models behind the seam: Z-Image, on a tiny random checkpoint of its own classes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from diffusers import ZImagePipeline
from served import pixels
from tiny_z_image import BASE, PLANS, SCALE, STEPS
from torch.utils._python_dispatch import TorchDispatchMode

from backends import Backend, CPUBackend
from bench.serving.servers import servers, started
from stages.check import check_files
from stages.config import ModelConfig
from stages.families import get_family
from stages.pipeline import Pipeline, Prompted
from stages.plan import FirstBlockSpec, Plan
from stages.sources import BadFile
from stages.yaml_file import ConfigError

PROMPTS = ["a red circle", "two small green squares left of a large blue triangle " * 4, "a star"]


class RealBackend(CPUBackend):
    """The processor as a device that has no complex numbers."""

    complex_numbers = False


class ComplexNumbers(TorchDispatchMode):
    """Counts the operations within that result in complex numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.count += isinstance(result, torch.Tensor) and result.is_complex()
        return result


@pytest.fixture(scope="module")
def model(z_image: Path) -> Path:
    """Its config."""
    return z_image


@pytest.fixture(scope="module")
def ours(model: Path, backend: Backend) -> Pipeline:
    config = ModelConfig.read(model)
    check_files(config)
    return Pipeline(config, backend)


@pytest.fixture(scope="module")
def real(ours: Pipeline) -> Pipeline:
    return Pipeline(ours.config, RealBackend())


@pytest.fixture(scope="module", params=["ours", "real"])
def either(request: pytest.FixtureRequest) -> Pipeline:
    """In complex numbers and in real arithmetic."""
    pipeline: Pipeline = request.getfixturevalue(request.param)
    return pipeline


@pytest.fixture(scope="module")
def theirs(model: Path) -> ZImagePipeline:
    source = ModelConfig.read(model).source
    reference = ZImagePipeline.from_pretrained(source, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(f"{source}/distilled", adapter_name="distilled")
    return reference


def expected(theirs: ZImagePipeline, plan: str, prompt: str, negative: str, seed: int, size: str) -> torch.Tensor:
    """The latent (channels, height, width) that a user of diffusers gets."""
    (theirs.enable_lora if plan == "distilled" else theirs.disable_lora)()
    width, height = map(int, size.split("x"))
    image = theirs(
        prompt, negative_prompt=negative, width=width, height=height, num_inference_steps=STEPS,
        guidance_scale=0.0 if plan == "distilled" else SCALE - 1, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return image.images[0]


@pytest.mark.parametrize("size", ["64x64", "64x96"])
@pytest.mark.parametrize("plan", ["base", "distilled"])
def test_prompts_of_mixed_lengths_in_one_batch_are_diffusers_one_by_one(
    either: Pipeline, theirs: ZImagePipeline, plan: str, size: str
) -> None:
    images = [Prompted(prompt, seed, "white" * (seed % 2)) for seed, prompt in enumerate(PROMPTS)]
    packets = either.enter(either.config.plan(plan), images, size)
    assert len({-(-len(packet.prompt_embeds) // 32) for packet in packets}) > 1  # they are padded to multiples of 32
    packets = either.denoise(packets, either.config.plan(plan))
    reached = {}
    for image, packet in zip(images, packets, strict=True):
        truth = expected(theirs, plan, image.prompt, image.negative_prompt or "", image.seed, size)
        rows, columns = packet.grid
        latent = packet.latent.view(rows, columns, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(truth.shape)
        assert float((latent - truth).abs().max()) < 1e-5 * float(truth.abs().max())
        reached[image.seed] = latent
    assert float((reached[0] - reached[2]).abs().max()) > 1e-2


def test_pixels_are_diffusers(ours: Pipeline, theirs: ZImagePipeline) -> None:
    (result,) = ours.run("base", PROMPTS[0], negative_prompt="blue", seeds=(5,))
    theirs.disable_lora()
    (truth,) = theirs(
        PROMPTS[0], negative_prompt="blue", width=64, height=64, num_inference_steps=STEPS, guidance_scale=SCALE - 1,
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    assert np.abs(np.asarray(result.image).astype(int) - np.asarray(truth).astype(int)).max() <= 1


def test_caches_and_skipped_blocks_are_exact_where_nothing_is_saved(ours: Pipeline) -> None:
    """A cache that never hits, and rows that each go their own way, walk through the same blocks."""
    plain = ours.config.plan("base")
    (stage,) = plain.stages
    never = stage.model_copy(update={"cache": FirstBlockSpec(threshold=1e-9)})
    images = [Prompted(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    whole = ours.denoise(ours.enter(plain, images), plain)
    cached_plan = Plan(stages=(never,))
    walked = ours.denoise(ours.enter(cached_plan, images), cached_plan)
    for one, other in zip(whole, walked, strict=True):
        torch.testing.assert_close(one.latent, other.latent, atol=1e-5, rtol=1e-5)
        assert other.spans[-1].nfe == 2 * STEPS
    skipping = Plan(stages=(stage.model_copy(update={"skip_blocks": frozenset({1})}),))
    (skipped,) = ours.denoise(ours.enter(skipping, images[:1]), skipping)
    assert skipped.spans[-1].nfe == pytest.approx(2 * STEPS * 2 / 3)
    assert float((skipped.latent - whole[0].latent).abs().max()) > 1e-3


def test_hybrid_plan_runs_and_counts(ours: Pipeline) -> None:
    (result,) = ours.run("hybrid", PROMPTS[0], seeds=(1,))
    assert result.nfe == 4
    assert result.image.size == (64, 64)


def test_a_device_without_complex_numbers_meets_none(ours: Pipeline, real: Pipeline) -> None:
    counts = []
    for each in (ours, real):
        plan = each.config.plan("distilled")
        with ComplexNumbers() as seen:
            each.denoise(each.enter(plan, [Prompted("a star", 0)]), plan)
        counts.append(seen.count)
    assert counts[0] > 0
    assert counts[1] == 0


def test_attention_guidance_is_refused_by_name(ours: Pipeline) -> None:
    plan = Plan.model_validate({"stages": [{**BASE, "attention_guidance": {"scale": 4.0}}]})
    with pytest.raises(ValueError, match=r"stages\.0\.attention_guidance is not known to the model's family"):
        ours.run(plan, PROMPTS[0], negative_prompt="white")


def test_packet_of_another_model_is_refused(ours: Pipeline, pipeline: Pipeline) -> None:
    packet = pipeline.encoder.begin("test", 0, 7, "64x64", PROMPTS[0], None)
    with pytest.raises(ValueError, match="packet of model 'scenes' cannot enter 'tiny-z'"):
        ours.denoiser.denoise([packet], ours.config.plan("distilled"))


def test_a_checkpoint_of_another_family_is_refused(model: Path, config: ModelConfig) -> None:
    wrong = ModelConfig.read(model).model_copy(update={"family": "qwen_image"})
    with pytest.raises(BadFile, match=r"model_index.json is of a ZImagePipeline, and family qwen_image is QwenImage"):
        check_files(wrong)
    content = yaml.safe_load(model.read_text()) | {"family": "sd15"}
    (other := model.with_name("other.yaml")).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"other.yaml: family: must be one of qwen_image, z_image, not 'sd15'"):
        ModelConfig.read(other)


def test_longest_prompt_is_the_familys(model: Path) -> None:
    assert get_family("qwen_image").longest_prompt == 1019
    content = yaml.safe_load(model.read_text()) | {"max_prompt_tokens": 600}
    (other := model.with_name("long.yaml")).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="max_prompt_tokens: must be at most 512, not 600"):
        ModelConfig.read(other)


@pytest.mark.ray
@pytest.mark.slow
def test_the_server_draws_what_one_process_draws(ours: Pipeline, model: Path) -> None:
    server = servers(model)[1]
    config = copy.deepcopy(server.config)
    assert config
    config["applications"][0]["args"]["default_plan"] = "hybrid"
    with started(replace(server, config=config), model) as running:
        for plan in PLANS:
            body = {"prompt": PROMPTS[1], "negative_prompt": "white", "plan": plan, "seed": 3, "size": "64x96"}
            answer = httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=120)
            (local,) = ours.run(plan, PROMPTS[1], negative_prompt="white", seeds=(3,), size="64x96")
            served = pixels(answer.raise_for_status().json()["data"][0])
            assert np.abs(served - np.asarray(local.image).astype(int)).max() <= 1
        guided = {"stages": [{**BASE, "attention_guidance": {}}]}
        body = {"prompt": "a ring", "plan": guided, "negative_prompt": "blue"}
        answer = httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=120)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "plan.stages.0.attention_guidance")


def test_a_limit_that_the_tokenizers_template_leaves_no_room_for_is_refused(model: Path) -> None:
    config = ModelConfig.read(model).model_copy(update={"max_prompt_tokens": 512})
    with pytest.raises(ConfigError, match="max_prompt_tokens must be at most 508 for this model's tokenizer, not 512"):
        check_files(config)
