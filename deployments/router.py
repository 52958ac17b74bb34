"""The way of an image through the stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import ray
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


async def _settle(response: DeploymentResponse, deadline: float) -> ray.ObjectRef:
    """Wait until a stage is done and return the reference to what it made.

    To wait here, not in the stage that comes next, shows a failure where it happened (ray issue 61594), and
    brings a copy to this node, where it outlives the replica that made it.
    """
    async with asyncio.timeout(deadline - time.time()):
        reference = await response._to_object_ref()
        await reference
    return reference


class Router:
    """Sends images through their plans' stages, many at once, each as soon as the one before it is done.

    Packets go from stage to stage by reference; the router looks into none.
    """

    def __init__(self, encoder: DeploymentHandle, stages: dict[str, DeploymentHandle], decoder: DeploymentHandle):
        self._encoder = encoder
        self._stages = stages
        self._decoder = decoder
        self._images = Counter("images", description="Images by plan and outcome.", tag_keys=("plan", "outcome"))
        self._seconds = Histogram(
            "stage_seconds", description="Work on an image by stage.", boundaries=_SECONDS, tag_keys=("stage",)
        )

    async def generate(self, route: Route) -> AsyncIterator[Partial | DecodedImage]:
        """The partial images that were asked for, then the image.

        Raises:
            TimeoutError: the deadline passed.
            BackPressureError: a stage's queue is full.
            PromptTooLong: found by the text encoder.
        """
        outcome = "failed"
        response = self._encoder.encode.remote(route.image)
        try:
            for position, stage in enumerate(route.plan.stages):
                packet = await _settle(response, route.deadline)
                preview = position < min(route.partial_images, len(route.plan.stages) - 1)
                response = self._stages[stage.name].denoise.remote(packet, route.plan, preview, route.deadline)
                if 0 < position <= route.partial_images:
                    yield Partial(position - 1, await self._decode(packet, route, preview=True))
            packet = await _settle(response, route.deadline)
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

    async def _decode(self, packet: ray.ObjectRef, route: Route, preview: bool) -> DecodedImage:
        async with asyncio.timeout(route.deadline - time.time()):
            return await self._decoder.decode.remote(packet, route.format, route.quality, preview)
