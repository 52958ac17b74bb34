"""`python -m cluster local`: one request crosses nodes, environments and versions of libraries."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from bench.serving.servers import Running, Server, started
from stages.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "cluster" / "heterogeneous" / "serve.yaml"
PROMPTS = ["a red star", "a furry ring", "a blue circle left of a red square", "a shape"]
NEGATIVE_PROMPTS = [None, "blue"]


@pytest.fixture(scope="module")
def heterogeneous() -> Iterator[Running]:
    pools = yaml.safe_load((ROOT / "cluster" / "heterogeneous" / "pools.yaml").read_text())
    for name, pool in pools.items():
        python = pool.get("environment", {}).get("py_executable")
        if python and not (ROOT / python).exists():
            pytest.skip(f"pool {name} needs {python}, which `make test-pools` makes")
    command = (sys.executable, "-m", "cluster", "local", "{config}")
    model = ROOT / "cluster" / "heterogeneous" / "model.yaml"
    with started(Server("heterogeneous", command, yaml.safe_load(CONFIG.read_text())), model) as running:
        yield running


def ask(url: str, seed: int) -> dict[str, Any]:
    body = {"prompt": PROMPTS[seed % 4], "negative_prompt": NEGATIVE_PROMPTS[seed % 2], "seed": seed}
    response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
    assert response.status_code == 200, response.text
    image: dict[str, Any] = response.json()["data"][0]
    return image


@pytest.mark.slow
def test_images_cross_four_pools_in_three_environments(heterogeneous: Running, pipeline: Pipeline) -> None:
    ask(heterogeneous.url, 0)
    with ThreadPoolExecutor(8) as clients:  # more than a step's batch has room for
        images = list(clients.map(lambda seed: ask(heterogeneous.url, seed), range(16)))
    for seed, image in enumerate(images):
        truth = pipeline.run(
            "hybrid", PROMPTS[seed % 4], negative_prompt=NEGATIVE_PROMPTS[seed % 2], seeds=[seed], size="128x128"
        )[0].image
        served = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
        assert np.abs(np.asarray(served, int) - np.asarray(truth, int)).max() <= 3, f"seed {seed}"
    assert busy_together(images) == {"base", "bridge", "distilled"}


def busy_together(images: list[dict[str, Any]]) -> set[str]:
    """Stages of which each worked on some image at a time when each of the others did, too."""
    spans = [(each["stage"], each["start"], each["end"]) for image in images for each in image["timings"]]
    together: dict[str, set[str]] = {stage: set() for stage in ("base", "bridge", "distilled")}
    for (one, start, end), (other, after, before) in combinations(spans, 2):
        if one != other and {one, other} <= together.keys() and max(start, after) < min(end, before):
            together[one].add(other)
            together[other].add(one)
    return {stage for stage, others in together.items() if len(others) == 2}
