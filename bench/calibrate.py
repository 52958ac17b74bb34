"""A scenario for the simulator, from what a server and its machine take for each stage of a plan."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from multiprocessing.synchronize import Semaphore

import torch

from backends import get_backend
from cluster.simulate import Device, Scenario, Stage
from stages.model import ModelConfig, parse_size, token_grid
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan

REPLICA_THREADS = 1  # Ray gives a replica one for every core that it asks for, and no fewer
_BATCH = 8
_START_TIMEOUT = 120.0  # seconds


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
    alone: Mapping[str, float],
    *,
    rate: float,
    deadline: float,
    batch_tokens: int,
    overhead: float,
) -> Scenario:
    """Encoder, stages and decoder as processes of one thread each, on this machine's cores.

    Args:
        prompted: at least 8.
        alone: seconds of each stage for an image that has the server to itself. How they grow with a batch, and how
            far a busy core slows its neighbours, is measured here.
        rate, deadline: see `Scenario`.
        batch_tokens: most image tokens of a step, as `max_batch_tokens` of the server's settings.
        overhead: seconds of work an image that no stage accounts for: HTTP, routing, copies.
    """
    size = pipeline.config.sizes[0]
    width, height = parse_size(size)
    with threads(REPLICA_THREADS):
        one, eight = (_seconds(pipeline, plan, prompted[:count]) for count in (1, _BATCH))
        growth = {name: eight[name] / one[name] for name in one}
        with _busy_neighbours(pipeline.config, plan, prompted[:_BATCH]):
            beside_others = _seconds(pipeline, plan, prompted[:_BATCH])
    steps: dict[str, int] = {stage.name: stage.steps for stage in plan.stages}
    most: dict[str, int] = {
        stage.name: batch_tokens // (prod(token_grid(size)) * stage.evaluations) for stage in plan.stages
    }
    stages = {"http": Stage(device="core", per_image=overhead)}
    for name in ("encode", *steps, "decode"):
        stages[name] = _stage(alone[name], growth[name], steps.get(name, 1), max(1, most.get(name, _BATCH)))
    slowdown = sum(beside_others.values()) / sum(eight.values())
    return Scenario(
        devices={"core": Device(count=os.cpu_count(), contention=max(1.0, slowdown))},
        stages=stages,
        rate=rate,
        megapixels=width * height / 1e6,
        deadline=deadline,
    )


def _seconds(pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted]) -> dict[str, float]:
    """Median seconds of each stage for a batch of all, after one to warm up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(6):
        for span in pipeline.run_batch(plan, prompted)[0].spans:
            seconds[span.stage].append(span.end - span.start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@contextmanager
def _busy_neighbours(config: ModelConfig, plan: Plan, prompted: Sequence[Prompted]) -> Iterator[None]:
    """Keep every core but one at work on the same images, each by a process of its own.

    Raises:
        RuntimeError: one did not start.
    """
    context = multiprocessing.get_context("spawn")
    ready = context.Semaphore(0)
    neighbours = [
        context.Process(target=_repeat, args=(config, plan, prompted, ready), daemon=True)
        for _ in range((os.cpu_count() or 1) - 1)
    ]
    for neighbour in neighbours:
        neighbour.start()
    try:
        for _ in neighbours:
            if not ready.acquire(timeout=_START_TIMEOUT):
                raise RuntimeError(f"a process that keeps a core busy did not start within {_START_TIMEOUT:g} s")
        yield
    finally:
        for neighbour in neighbours:
            neighbour.terminate()
            neighbour.join()


def _repeat(config: ModelConfig, plan: Plan, prompted: Sequence[Prompted], ready: Semaphore) -> None:
    """Draw until terminated."""
    torch.set_num_threads(REPLICA_THREADS)
    pipeline = Pipeline(config, get_backend("cpu"))
    while True:
        pipeline.run_batch(plan, prompted)
        ready.release()


def _stage(alone: float, growth: float, steps: int, most: int) -> Stage:
    """From the seconds of one image over all `steps`, and how many times as long `_BATCH` take."""
    per_image = alone * max((growth - 1) / (_BATCH - 1), 0.01)
    fixed = max(alone - per_image, 0.0)
    return Stage(device="core", steps=steps, fixed=fixed / steps, per_image=per_image / steps, max_batch=most)
