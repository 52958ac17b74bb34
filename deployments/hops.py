"""The hops of an image through the deployments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deployments.messages import Hop
from deployments.settings import DECODE, ENCODE, ServedStage
from stages.plan import Plan


def next_hop(
    plan: Plan,
    deployments: Mapping[ServedStage, str],
    *,
    done: int | None = None,
    partial_images: int = 0,
    shown: int = 0,
    checkpoint_steps: int | None = None,
    tells: bool = False,
) -> Hop:
    """Return the next call for an image, which takes it as far as its stages' deployments allow.

    Args:
        plan: the image's plan.
        deployments: name of the deployment that runs each stage that is left of this image.
        done: number of the plan's steps that are done; None before encoding.
        partial_images: number of previews, spaced evenly over the plan's steps; fewer if there are fewer steps before
            the last one.
        shown: step of the last preview that was sent.
        checkpoint_steps: fewest steps between two checkpoints, or None for no checkpoints.
        tells: whether to tell of each step, in a hop that has some.
    """
    left = plan.steps_left(done or 0)
    parts = [(end, stage, steps) for end, (stage, steps) in enumerate(zip(plan.stages, left, strict=True), 1) if steps]
    way: list[ServedStage] = [*([ENCODE] if done is None else []), *(stage.name for _, stage, _ in parts), DECODE]
    here = deployments[way[0]]
    leaves = next((number for number, stage in enumerate(way) if deployments[stage] != here), len(way))
    run = parts[: leaves - (done is None)]
    begin = done or 0
    last = begin + sum(steps for _, _, steps in run)
    return Hop(
        deployment=here,
        end=run[-1][0] if run else len(plan.stages) - len(parts),
        work=sum(steps * stage.step_work for _, stage, steps in run),
        previews=tuple(step for step in _previews(plan, partial_images) if max(begin, shown) < step <= last),
        checkpoints=tuple(_checkpoints(plan, begin, last, checkpoint_steps)) if checkpoint_steps else (),
        decodes=leaves == len(way),
        tells=tells and bool(run),
    )


def _previews(plan: Plan, asked: int) -> list[int]:
    steps = sum(stage.steps for stage in plan.stages)
    count = min(asked, steps - 1)
    return [number * steps // (count + 1) for number in range(1, count + 1)]


def _checkpoints(plan: Plan, begin: int, end: int, apart: int) -> Iterator[int]:
    """Yield steps between `begin` and `end`, at least `apart` from the one before.

    A stage with a cache has one after its last step only, since a packet does not hold the cache's state.
    """
    kept, last = begin, 0
    for stage in plan.stages:
        first, last = last, last + stage.steps
        for step in range(first + 1, last + 1):
            if begin < step < end and step - kept >= apart and (step == last or not stage.cache):
                yield step
                kept = step
