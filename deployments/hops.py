"""The way of an image through the deployments."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.messages import Hop
from deployments.settings import DECODE, ENCODE, ServedStage
from stages.plan import Plan


def plan_hops(plan: Plan, deployments: Mapping[ServedStage, str], partial_images: int) -> list[Hop]:
    """Split a plan into the fewest calls that its stages' deployments allow.

    Args:
        plan: to split.
        deployments: by the stage that they run for this image.
        partial_images: previews at equal shares of the plan's steps; fewer where there are not as many steps before
            the last one.
    """
    steps = sum(stage.steps for stage in plan.stages)
    count = min(partial_images, steps - 1)
    shown = [number * steps // (count + 1) for number in range(1, count + 1)]
    hops = [Hop(deployment=deployments[ENCODE])]
    done = start = 0  # steps, by now and before the hop
    for stage in plan.stages:
        if hops[-1].deployment != deployments[stage.name]:
            hops.append(Hop(deployment=deployments[stage.name]))
            start = done
        last, here = hops[-1], tuple(step - start for step in shown if done < step <= done + stage.steps)
        hops[-1] = last.model_copy(
            update={"stages": last.stages + 1, "nfe": last.nfe + stage.nfe, "previews": (*last.previews, *here)}
        )
        done += stage.steps
    if hops[-1].deployment != deployments[DECODE]:
        hops.append(Hop(deployment=deployments[DECODE]))
    hops[-1] = hops[-1].model_copy(update={"decodes": True})
    return hops
