"""The way of an image through the deployments, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

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
        partial_images: after how many of the plan's stages, in all their parts, to send what the image will look like.
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
        preview: whether the image that the last of them foresees will be sent.
        decodes: whether the call ends with the image.
    """

    deployment: str
    stages: int = 0
    preview: bool = False
    decodes: bool = False


def split(plan: Plan, deployments: Mapping[ServedStage, str], partial_images: int) -> list[Leg]:
    """As few legs as the stages' deployments, and partial images after the first of the plan's stages, allow."""
    legs = [Leg(deployments[ENCODE])]
    shown = 0
    for stage, following in zip_longest(plan.stages, plan.stages[1:]):
        deployment = deployments[stage.name]
        if legs[-1].preview or legs[-1].deployment != deployment:
            legs.append(Leg(deployment))
        preview = shown < partial_images and following is not None and following.name != stage.name
        shown += preview
        legs[-1] = replace(legs[-1], stages=legs[-1].stages + 1, preview=preview)
    if legs[-1].deployment != deployments[DECODE]:
        legs.append(Leg(deployments[DECODE]))
    legs[-1] = replace(legs[-1], decodes=True)
    return legs
