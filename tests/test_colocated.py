"""All stages in one deployment, on one set of weights: the same images as from three."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from openai import OpenAI
from safetensors.torch import load_file, save_file
from served import deployment_statuses, pixels

from backends import Backend
from bench.serving.servers import Running, servers, started
from stages.config import ModelConfig
from stages.loading import load_transformer
from stages.network import Network
from stages.pipeline import Pipeline

MODEL = Path(__file__).parents[1] / "configs" / "scenes.yaml"


@pytest.fixture(scope="module")
def model(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's config with an adapter besides that is finite but makes velocities overflow."""
    directory = tmp_path_factory.mktemp("model") / "configs"
    directory.mkdir()
    architecture = config.read_transformer()
    outputs, width = 64, architecture["num_attention_heads"] * architecture["attention_head_dim"]
    overflow = {"down": torch.ones(1, width), "up": torch.full((outputs, 1), 3e38)}
    save_file({f"proj_out.lora_{part}.weight": value for part, value in overflow.items()}, directory / "a.safetensors")
    content = yaml.safe_load(MODEL.read_text())
    content["source"] = config.source
    adapters = {name: {"source": adapter.source} for name, adapter in config.adapters.items()}
    content["adapters"] = adapters | {"overflow": {"source": str(directory)}}
    shutil.copytree(MODEL.parent / "plans", directory / "plans")
    path = directory / "model.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def colocated(model: Path) -> Iterator[Running]:
    with started(servers(model)[1], model) as running:
        yield running


@pytest.fixture(scope="module")
def url(colocated: Running) -> str:
    return colocated.url


def test_one_deployment_runs_all_stages(url: str) -> None:
    assert set(deployment_statuses()) == {"Ingress", "Device"}


def test_concurrent_images_of_several_plans_are_those_of_one_process(url: str, pipeline: Pipeline) -> None:
    plans = ["hybrid", "distilled", "base", "hybrid", "cached", "distilled"]

    async def send() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            bodies = [
                {"prompt": "a striped heart", "negative_prompt": "blue", "seed": seed, "plan": plan}
                for seed, plan in enumerate(plans)
            ]
            answers = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))
        return [answer.raise_for_status().json()["data"][0] for answer in answers]

    for seed, (plan, served) in enumerate(zip(plans, asyncio.run(send()), strict=True)):
        (local,) = pipeline.run(plan, "a striped heart", negative_prompt="blue", seeds=(seed,), size="128x128")
        assert np.abs(pixels(served) - np.asarray(local.image).astype(int)).max() <= 2


def test_an_image_that_overflows_fails_alone_and_says_where(colocated: Running, url: str) -> None:
    stage = {"name": "distilled", "sigma_start": 1.0, "sigma_end": 0.0, "steps": 4, "adapter": "overflow"}

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            plans = [{"stages": [stage]}, "distilled"]
            bodies = [{"prompt": "a ring", "seed": 1, "plan": plan} for plan in plans]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))

    failed, done = asyncio.run(send())
    assert failed.status_code == 500
    assert failed.json()["error"] == {
        "message": "the image is not finite after stage distilled",
        "type": "server_error",
        "param": None,
        "code": "not_finite",
    }
    assert done.status_code == 200
    deadline = time.monotonic() + 120
    while not any('outcome="not_finite"' in line for line in colocated.metrics("ray_images")):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_partial_images_come_between_stages_of_one_deployment(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    events = list(client.images.generate(prompt="a ring", stream=True, partial_images=2))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]


def test_all_stages_take_little_more_memory_than_one_model_and_its_loras(
    config: ModelConfig, backend: Backend, network: Network
) -> None:
    def resident(module: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

    alone = load_transformer(config.model_copy(update={"adapters": {}}), backend).module
    loras = [load_file(next(Path(adapter.source).glob("*.safetensors"))) for adapter in config.adapters.values()]
    elements = sum(tensor.numel() for lora in loras for tensor in lora.values())
    assert elements > 0
    assert resident(network.transformer.module) < 1.1 * (resident(alone) + elements * alone.dtype.itemsize)
