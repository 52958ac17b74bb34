"""The hops of an image through the deployments."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.messages import Hop
from deployments.settings import DECODE, ENCODE, ServedStage
from stages.plan import Plan


def plan_hops(plan: Plan, deployments: Mapping[ServedStage, str], partial_images: int) -> list[Hop]:
    """Split a plan into the fewest hops that its stages' deployments allow.

    Args:
        plan: the plan to split.
        deployments: name of the deployment that runs each stage of this image.
        partial_images: number of previews, spaced evenly over the plan's steps; fewer if there are fewer steps before
            the last one.
    """
    steps = sum(stage.steps for stage in plan.stages)
    count = min(partial_images, steps - 1)
    preview_steps = [number * steps // (count + 1) for number in range(1, count + 1)]
    hops = [Hop(deployment=deployments[ENCODE])]
    done = start = 0  # steps before this stage, and before this hop
    for stage in plan.stages:
        if hops[-1].deployment != deployments[stage.name]:
            hops.append(Hop(deployment=deployments[stage.name]))
            start = done
        hop, previews = hops[-1], [step - start for step in preview_steps if done < step <= done + stage.steps]
        hops[-1] = hop.model_copy(
            update={"stages": hop.stages + 1, "work": hop.work + stage.work, "previews": (*hop.previews, *previews)}
        )
        done += stage.steps
    if hops[-1].deployment != deployments[DECODE]:
        hops.append(Hop(deployment=deployments[DECODE]))
    hops[-1] = hops[-1].model_copy(update={"decodes": True})
    return hops
