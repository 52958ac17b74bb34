"""The way of an image through the deployments, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.encode import ImageRequest
from deployments.settings import DECODE, ENCODE, ServedStage
from stages.decode import ImageFormat
from stages.plan import Plan


@dataclass(frozen=True)
class Route:
    """What is to be done for one image.

    Attributes:
        preset: name of the model's plan that `plan` is or comes from; None for a request's own.
        quality: 1 to 100, of formats that lose something.
        partial_images: how often to send what the image will look like, see `split`.
        deadline: seconds since the epoch, after which to give up.
    """

    image: ImageRequest
    plan: Plan
    preset: str | None
    format: ImageFormat
    quality: int
    partial_images: int
    deadline: float


@dataclass(frozen=True)
class Leg:
    """Consecutive stages that one call runs; the first leg begins with encoding.

    Attributes:
        deployment: that runs them.
        stages: how many of the plan's, each part counted.
        previews: after which of its steps, counted from 1, to send the image that the step foresees.
        decodes: whether the call ends with the image.
    """

    deployment: str
    stages: int = 0
    previews: tuple[int, ...] = ()
    decodes: bool = False


@dataclass(frozen=True)
class Preview:
    """A packet that a leg sends before it is done, to be decoded."""

    packet: bytes


def split(plan: Plan, deployments: Mapping[ServedStage, str], partial_images: int) -> list[Leg]:
    """Split a plan into as few legs as its stages' deployments allow.

    Args:
        partial_images: previews at equal shares of the plan's steps; fewer where there are not as many steps before
            the last one.
    """
    steps = sum(stage.steps for stage in plan.stages)
    count = min(partial_images, steps - 1)
    shown = [number * steps // (count + 1) for number in range(1, count + 1)]
    legs = [Leg(deployments[ENCODE])]
    done = start = 0  # steps, by now and before the leg
    for stage in plan.stages:
        if legs[-1].deployment != deployments[stage.name]:
            legs.append(Leg(deployments[stage.name]))
            start = done
        here = tuple(step - start for step in shown if done < step <= done + stage.steps)
        legs[-1] = replace(legs[-1], stages=legs[-1].stages + 1, previews=(*legs[-1].previews, *here))
        done += stage.steps
    if legs[-1].deployment != deployments[DECODE]:
        legs.append(Leg(deployments[DECODE]))
    legs[-1] = replace(legs[-1], decodes=True)
    return legs
