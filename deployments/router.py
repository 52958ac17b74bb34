"""The way of an image through the stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.metrics import Counter, Histogram

from deployments import console
from deployments.decode import DecodedImage
from deployments.errors import APIError
from deployments.route import Leg, Route, split
from deployments.settings import DECODE, ServedStage
from stages.encode import PromptTooLong

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


@dataclass(frozen=True)
class Partial:
    """An image as a stage foresaw it; `order` counts an image's partial ones from 0."""

    order: int
    image: DecodedImage


async def _within(deadline: float, response: DeploymentResponse) -> Any:
    """What a call returns, here before the next one starts: so a failure shows where it happened (ray issue 61594)."""
    async with asyncio.timeout(deadline - time.time()):
        return await response


class Router:
    """Sends images through their plans' stages, many at once, each as soon as the one before it is done.

    Packets pass through as bytes, so that what one replica made outlives it; the router looks into none.
    """

    def __init__(self, replicas: Mapping[str, DeploymentHandle], deployments: Mapping[ServedStage, str]) -> None:
        """Args:
        replicas: of each deployment.
        deployments: by the stage that they run.
        """
        self._replicas = replicas
        self._deployments = deployments
        self._images = Counter("images", description="Images by plan and outcome.", tag_keys=("plan", "outcome"))
        self._seconds = Histogram(
            "stage_seconds", description="Work on an image by stage.", boundaries=_SECONDS, tag_keys=("stage",)
        )

    async def generate(self, route: Route) -> AsyncGenerator[Partial | DecodedImage]:
        """The partial images that were asked for, then the image; closing or cancelling it cancels the stage at work.

        Raises:
            APIError: see `APIError.from_failure`.
        """
        outcome, order, preview = "failed", 0, False
        packet: bytes | None = None
        response: DeploymentResponse | None = None
        try:
            for leg in split(route.plan, self._deployments, route.partial_images):
                response = self._replicas[leg.deployment].run.remote(route, leg, packet)
                if preview:
                    yield Partial(order, await self._decode(route, packet))
                    order += 1
                result = await _within(route.deadline, response)
                if isinstance(result, PromptTooLong):
                    raise result
                packet, preview = result, leg.preview
            outcome = "done"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except Exception as error:
            failure = APIError.from_failure(error)
            if failure.status < 500:
                outcome = "refused"
            elif failure.code == "not_finite":
                outcome = "not_finite"
            raise failure from error
        finally:
            if response:
                response.cancel()  # of no effect on one that is done
            self._images.inc(tags={"plan": route.preset or "inline", "outcome": outcome})
        image = cast(DecodedImage, result)
        for span in image.spans:
            self._seconds.observe(span.end - span.start, tags={"stage": span.stage})
        console.images.info(
            f"image {image.index} of {route.image.request_id}: {route.image.size}, plan {route.plan.name!r}, "
            f"seed {image.seed}, {sum(span.nfe for span in image.spans):g} evaluations, "
            f"{image.spans[-1].end - image.spans[0].start:.2f} s"
        )
        yield image

    async def _decode(self, route: Route, packet: bytes | None) -> DecodedImage:
        """Beside the next leg."""
        leg = Leg(self._deployments[DECODE], decodes=True)
        response = self._replicas[leg.deployment].run.remote(route, leg, packet)
        return cast(DecodedImage, await _within(route.deadline, response))
