"""All stages in one deployment, on one set of weights: the same images as from three."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file
from served import deployment_statuses, pixels

from backends import Backend
from bench.servers import servers, started
from stages.model import ModelConfig, load_transformer
from stages.network import Network
from stages.pipeline import Pipeline

MODEL = Path(__file__).parents[1] / "configs" / "scenes.yaml"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started(servers(MODEL)[1], MODEL) as running:
        yield running.url


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


def test_partial_images_come_between_stages_of_one_deployment(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    events = list(client.images.generate(prompt="a ring", stream=True, partial_images=2))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]


def test_all_stages_take_little_more_memory_than_one_model_and_its_loras(
    config: ModelConfig, backend: Backend, network: Network
) -> None:
    def resident(module: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

    alone = load_transformer(config.model_copy(update={"adapters": {}}), backend)
    loras = [load_file(next(Path(adapter.source).glob("*.safetensors"))) for adapter in config.adapters.values()]
    elements = sum(tensor.numel() for lora in loras for tensor in lora.values())
    assert elements > 0
    assert resident(network.transformer) < 1.1 * (resident(alone) + elements * alone.dtype.itemsize)
