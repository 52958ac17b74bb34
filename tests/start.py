"""A replica's start in a process of its own: `python tests/start.py BACKEND DIRECTORY [MODULE ...]`.

Starts a replica that keeps compilations in the directory, makes one image, and prints how many compilations it missed
there and how many it found, as JSON. The modules are imported first.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path

import torch

from backends import get_backend
from deployments.messages import Call, Hop, ImageRequest, Route, Start
from deployments.replica import StageReplica
from deployments.settings import Placement
from stages.config import ModelConfig

ROOT = Path(__file__).parent.parent
STALL_S = 600.0  # busy processors take long


def count(backend: str) -> tuple[int, int]:
    """Return how many compilations were missed on disk so far, and how many were found, as its library counts them."""
    if backend == "xla":
        from torch_xla.debug import metrics

        # Loaded, if perhaps in vain: the library's plugin for processors cannot run what was stored.
        loaded = metrics.metric_data("PersistentCacheLoad")
        return metrics.counter_value("PersistentCacheMiss") or 0, loaded[0] if loaded else 0
    if backend == "tpu":
        stats = torch.tpu._get_cache_stats()  # type: ignore[attr-defined]
        return stats.num_compilations, len(stats.per_entry_stats) - stats.num_compilations
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]


async def make_image(replica: StageReplica, model: ModelConfig) -> None:
    """Encode and denoise an image."""
    plan = model.plan("distilled")
    image = ImageRequest(
        request_id="r", image_index=0, seed=0, size=model.sizes[0], prompt="a star", negative_prompt=None
    )
    route = Route(image=image, plan=plan, preset=None, format="png", quality=90, partial_images=0, deadline=2.0**40)
    await replica.run(Call(route=route, hop=Hop(deployment="Here", end=len(plan.stages))).to_json(), b"")


def main() -> None:
    """Run the program."""
    torch.set_num_threads(1)
    backend, directory, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    model = ModelConfig.read(ROOT / "configs" / "scenes.yaml")
    small = {"dtype": "float32", "sizes": model.sizes[:1], "plans_at": {}, "max_prompt_tokens": 20}
    model = model.model_copy(update=small)
    placement = Placement(
        stages=("encode", "base", "bridge", "distilled"),
        backend=backend,
        compile=get_backend(backend).shapes is None,  # the others compile whatever runs
        max_batch_tokens=128,
        compilation_cache=Path(directory),
    )
    asyncio.run(
        make_image(StageReplica(Start(model=model, placement=placement, stall_timeout_s=STALL_S).to_json()), model)
    )
    print(json.dumps(count(backend)))


if __name__ == "__main__":
    main()
