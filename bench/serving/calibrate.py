"""Calibration of the simulator (`cluster.simulate`) against a running server and this machine."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

from bench.serving.load import LoadFigures
from cluster.costs import Device
from cluster.simulate import Scenario, Stage, circulate
from stages.image import megapixels
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, StageSpec

REPLICA_THREADS = 1  # Ray gives a replica a thread for each core that it reserves, and at least one
_BATCH = 8
_MOST_CONTENTION = 4.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads within the `with` block."""
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
    one_client: LoadFigures,
    two_clients: LoadFigures,
    rate: float,
    deadline: float,
    batch_tokens: int,
) -> Scenario:
    """Return a scenario of the server: HTTP, encoder, stages and decoder, each a thread on one of this machine's cores.

    The duration of a stage is what the server reports under one client. How it grows with the batch size is measured
    here, without the server. The contention between busy cores is fitted, so that the simulated latency under two
    clients equals the measured one.

    Args:
        pipeline: the model, with adapters as the server holds them.
        plan: the plan that the server ran.
        prompted: at least 8 images.
        one_client: the server's figures under a closed loop with one client.
        two_clients: the same with two.
        rate: requests per second, see `Scenario`.
        deadline: seconds, see `Scenario`.
        batch_tokens: most image tokens in a step, the server's `max_batch_tokens`.
    """
    size = pipeline.config.sizes[0]
    with threads(REPLICA_THREADS):
        one, eight = (_seconds(pipeline, plan, prompted[:count]) for count in (1, _BATCH))
    parts: dict[str, list[StageSpec]] = defaultdict(list)
    for stage in plan.stages:
        parts[stage.name].append(stage)
    steps = {name: sum(part.steps for part in stage) for name, stage in parts.items()}
    rows = {name: max(part.evaluations for part in stage) for name, stage in parts.items()}
    tokens = prod(pipeline.config.grid(size))
    most = {name: batch_tokens // (tokens * evaluations) for name, evaluations in rows.items()}
    stages = {"http": Stage(device="core", per_image=one_client.elsewhere)}
    for name in ("encode", *steps, "decode"):
        stages[name] = _stage(
            one_client.stages[name], eight[name] / one[name], steps.get(name, 1), max(1, most.get(name, _BATCH))
        )
    scenario = Scenario(
        devices={"core": Device(count=os.cpu_count())},
        stages=stages,
        rate=rate,
        megapixels=megapixels(size),
        deadline=deadline,
    )
    return _contend(scenario, two_clients.elsewhere + sum(two_clients.stages.values()))


def _seconds(pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted]) -> dict[str, float]:
    """Return the median seconds that each stage takes for one batch of all images, after a warm-up run."""
    runs: list[dict[str, float]] = []
    for _ in range(6):
        runs.append(defaultdict(float))
        for span in pipeline.run_batch(plan, prompted)[0].spans:
            runs[-1][span.stage] += span.end - span.start
    return {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}


def _stage(alone: float, growth: float, steps: int, most: int) -> Stage:
    """Split a stage's duration into a fixed part and a part per image.

    Args:
        alone: seconds of one image, over all steps.
        growth: duration of `_BATCH` images over that of one.
        steps: number of steps.
        most: largest batch.
    """
    # At most in proportion, however noisy the measurement: one image takes `alone`.
    per_image = alone * min(max((growth - 1) / (_BATCH - 1), 0.01), 1.0)
    fixed = alone - per_image
    return Stage(device="core", steps=steps, fixed=fixed / steps, per_image=per_image / steps, max_batch=most)


def _contend(scenario: Scenario, latency: float) -> Scenario:
    """Fit the contention, 1 to `_MOST_CONTENTION`, such that two clients see a mean latency of `latency` seconds."""

    def at(contention: float) -> Scenario:
        core = scenario.devices["core"].model_copy(update={"contention": contention})
        return scenario.model_copy(update={"devices": {"core": core}})

    low, high = 1.0, _MOST_CONTENTION
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if circulate(at(middle), 2).mean < latency else (low, middle)
    return at(low)
