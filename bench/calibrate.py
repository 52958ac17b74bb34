"""A scenario for the simulator, from what this machine takes for each stage of a plan."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

from cluster.simulate import Device, Scenario, Stage
from stages.model import parse_size, token_grid
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan

REPLICA_THREADS = 1  # Ray gives a replica one for every core that it asks for, and no fewer
_BATCH = 8


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calibrate(
    pipeline: Pipeline,
    plan: Plan,
    prompted: Sequence[Prompted],
    *,
    rate: float,
    deadline: float,
    batch_tokens: int,
    overhead: float,
) -> Scenario:
    """Encoder, stages and decoder as processes of one thread each, on this machine's cores.

    Args:
        prompted: at least 8.
        rate, deadline: see `Scenario`.
        batch_tokens: most image tokens of a step, as `max_batch_tokens` of the server's settings.
        overhead: seconds of work an image that no stage accounts for: HTTP, routing, copies.
    """
    with threads(REPLICA_THREADS):
        alone, together = _seconds(pipeline, plan, prompted, 1), _seconds(pipeline, plan, prompted, _BATCH)
    size = pipeline.config.sizes[0]
    width, height = parse_size(size)
    stages = {
        "http": Stage(device="core", per_image=overhead),
        "encode": Stage(device="core", per_image=alone["encode"]),
    }
    for stage in plan.stages:
        images = max(1, batch_tokens // (prod(token_grid(size)) * stage.evaluations))
        stages[stage.name] = _stage(alone[stage.name], together[stage.name], stage.steps, images)
    stages["decode"] = _stage(alone["decode"], together["decode"], 1, _BATCH)
    return Scenario(
        devices={"core": Device(count=os.cpu_count())},
        stages=stages,
        rate=rate,
        megapixels=width * height / 1e6,
        deadline=deadline,
    )


def _seconds(pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted], batch: int) -> dict[str, float]:
    """Median seconds of each stage for a batch, after one to warm up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(6):
        for span in pipeline.run_batch(plan, prompted[:batch])[0].spans:
            seconds[span.stage].append(span.end - span.start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _stage(alone: float, together: float, steps: int, most: int) -> Stage:
    """From the seconds of one image and of `_BATCH`, both over all `steps`."""
    per_image = max((together - alone) / (_BATCH - 1), alone / 100)
    fixed = max(alone - per_image, 0.0)
    return Stage(device="core", steps=steps, fixed=fixed / steps, per_image=per_image / steps, max_batch=most)
