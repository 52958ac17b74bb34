"""A scenario for the simulator, from what a server and its machine take for each stage of a plan."""

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
from stages.image import parse_size
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, StageSpec

REPLICA_THREADS = 1  # Ray gives a replica one for every core that it asks for, and no fewer
_BATCH = 8
_MOST_CONTENTION = 4.0


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
    one_client: LoadFigures,
    two_clients: LoadFigures,
    rate: float,
    deadline: float,
    batch_tokens: int,
) -> Scenario:
    """Encoder, stages and decoder as processes of one thread each, on this machine's cores.

    How long a stage takes is what the server says with one client; how that grows with a batch is measured here; and
    how far busy cores slow each other down is what makes the simulated server take as long as the real one with two.

    Args:
        prompted: at least 8.
        one_client, two_clients: of the server, by closed loops.
        rate, deadline: see `Scenario`.
        batch_tokens: most image tokens of a step, as `max_batch_tokens` of the server's settings.
    """
    size = pipeline.config.sizes[0]
    width, height = parse_size(size)
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
        megapixels=width * height / 1e6,
        deadline=deadline,
    )
    return _contend(scenario, two_clients.elsewhere + sum(two_clients.stages.values()))


def _seconds(pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted]) -> dict[str, float]:
    """Median seconds of each stage for a batch of all, after one to warm up."""
    runs: list[dict[str, float]] = []
    for _ in range(6):
        runs.append(defaultdict(float))
        for span in pipeline.run_batch(plan, prompted)[0].spans:
            runs[-1][span.stage] += span.end - span.start
    return {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}


def _stage(alone: float, growth: float, steps: int, most: int) -> Stage:
    """From the seconds of one image over all `steps`, and how many times as long `_BATCH` take."""
    per_image = alone * max((growth - 1) / (_BATCH - 1), 0.01)
    fixed = max(alone - per_image, 0.0)
    return Stage(device="core", steps=steps, fixed=fixed / steps, per_image=per_image / steps, max_batch=most)


def _contend(scenario: Scenario, latency: float) -> Scenario:
    """With the contention, 1 to `_MOST_CONTENTION`, by which two clients wait `latency` seconds on average."""

    def at(contention: float) -> Scenario:
        core = scenario.devices["core"].model_copy(update={"contention": contention})
        return scenario.model_copy(update={"devices": {"core": core}})

    low, high = 1.0, _MOST_CONTENTION
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if circulate(at(middle), 2).mean < latency else (low, middle)
    return at(low)
