"""Measure the magnitude ratios that MagCache needs, and print them as the `cache` of a plan's stage.

The ratio of a step is the norm of the blocks' residual at that step over its norm at the step before, averaged over
image tokens, prompts and both branches of guidance. diffusers' `MagCacheConfig(calibrate=True)` measures the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence

import torch

from bench.model.calibration import Calibration, add_calibration_arguments
from stages.caches import Evaluation, StepCache
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan


class _Recorder(StepCache):
    """A cache that never hits, and records the norm of each token's residual (tokens,) at every step."""

    def __init__(self) -> None:
        self.magnitudes: list[torch.Tensor] = []

    def learn(self, evaluation: Evaluation) -> None:
        self.magnitudes.append(evaluation.blocks.float().norm(dim=-1))

    def ratios(self) -> list[float]:
        changes = itertools.pairwise(self.magnitudes)
        return [1.0, *(float((after / (before + 1e-8)).mean()) for before, after in changes)]


def measure(pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted]) -> list[float]:
    """Return a ratio for each step of the first stage of `plan`, measured on the images `prompted`."""
    tasks = [pipeline.denoiser.begin(packet, plan) for packet in pipeline.enter(plan, prompted)]
    recorders: list[_Recorder] = []
    for task in tasks:
        task.state.cache = _Recorder()
        recorders.append(task.state.cache)
        if plan.stages[0].guided:
            task.state.negative_cache = _Recorder()
            recorders.append(task.state.negative_cache)
    for _ in range(plan.stages[0].steps):
        pipeline.denoiser.step(tasks)
    return [statistics.fmean(step) for step in zip(*(recorder.ratios() for recorder in recorders), strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    add_calibration_arguments(parser, prompts=16)
    parser.add_argument("--plan", default="base", help="name of one of the config's plans; its first stage is measured")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the ratios of a plan's first stage."""
    on = Calibration.load(arguments)
    ratios = measure(on.pipeline, on.plan, on.prompted)
    print(f"cache: {{kind: magcache, threshold: 0.1, ratios: [{', '.join(f'{ratio:.4f}' for ratio in ratios)}]}}")
