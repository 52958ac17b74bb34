"""The way of an image through the stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.metrics import Counter, Histogram

from deployments.decode import DecodedImage
from deployments.encode import ImageRequest
from stages.decode import ImageFormat
from stages.plan import Plan

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


@dataclass(frozen=True)
class Route:
    """What the router is to do with one image.

    Attributes:
        quality: 1 to 100, of formats that lose something.
        partial_images: after how many stages to send what the image will look like.
        deadline: seconds since the epoch, after which to give up.
    """

    image: ImageRequest
    plan: Plan
    format: ImageFormat
    quality: int
    partial_images: int
    deadline: float


@dataclass(frozen=True)
class Partial:
    """An image as a stage foresaw it; `order` counts an image's partial ones from 0."""

    order: int
    image: DecodedImage


@dataclass(frozen=True)
class Leg:
    """Consecutive stages of a plan that one call runs; `preview` if the image that the last foresees will be sent."""

    transformer: str
    stages: int
    preview: bool


def split(plan: Plan, transformers: Mapping[str, str], partial_images: int) -> list[Leg]:
    """As few legs as the stages' transformers, by stage, and partial images after the first stages allow."""
    legs: list[Leg] = []
    for position, stage in enumerate(plan.stages):
        transformer = transformers[stage.name]
        preview = position < min(partial_images, len(plan.stages) - 1)
        if legs and legs[-1].transformer == transformer and not legs[-1].preview:
            legs[-1] = Leg(transformer, legs[-1].stages + 1, preview)
        else:
            legs.append(Leg(transformer, 1, preview))
    return legs


async def _within(deadline: float, response: DeploymentResponse) -> Any:
    """What a call returns, here before the next one starts: so a failure shows where it happened (ray issue 61594)."""
    async with asyncio.timeout(deadline - time.time()):
        return await response


class Router:
    """Sends images through their plans' stages, many at once, each as soon as the one before it is done.

    Packets pass through as bytes, so that what one replica made outlives it; the router looks into none.
    """

    def __init__(
        self,
        encoder: DeploymentHandle,
        transformers: dict[str, DeploymentHandle],
        stages: dict[str, str],
        decoder: DeploymentHandle,
    ) -> None:
        """Args:
        stages: which of `transformers` runs a stage.
        """
        self._encoder = encoder
        self._transformers = transformers
        self._stages = stages
        self._decoder = decoder
        self._images = Counter("images", description="Images by plan and outcome.", tag_keys=("plan", "outcome"))
        self._seconds = Histogram(
            "stage_seconds", description="Work on an image by stage.", boundaries=_SECONDS, tag_keys=("stage",)
        )

    async def generate(self, route: Route) -> AsyncGenerator[Partial | DecodedImage]:
        """The partial images that were asked for, then the image; closing or cancelling it cancels the stage at work.

        Raises:
            TimeoutError: the deadline passed.
            BackPressureError: a stage's queue is full.
            PromptTooLong: found by the text encoder.
        """
        outcome, legs = "failed", split(route.plan, self._stages, route.partial_images)
        response = self._encoder.encode.remote(route.image)
        try:
            packet = await _within(route.deadline, response)
            for order, leg in enumerate(legs):
                denoise = self._transformers[leg.transformer].denoise
                response = denoise.remote(packet, route.plan, leg.stages, leg.preview, route.deadline)
                if order and legs[order - 1].preview:
                    yield Partial(order - 1, await self._decode(packet, route, preview=True))
                packet = await _within(route.deadline, response)
            image = await self._decode(packet, route, preview=False)
            outcome = "done"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            response.cancel()  # of no effect on one that is done
            self._images.inc(tags={"plan": route.plan.name, "outcome": outcome})
        for span in image.spans:
            self._seconds.observe(span.end - span.start, tags={"stage": span.stage})
        yield image

    async def _decode(self, packet: bytes, route: Route, preview: bool) -> DecodedImage:
        response = self._decoder.decode.remote(packet, route.format, route.quality, preview)
        return cast(DecodedImage, await _within(route.deadline, response))
