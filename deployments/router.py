"""The way of an image through the stages."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

from deployments import console
from deployments.decode import DecodedImage
from deployments.errors import APIError
from deployments.route import Leg, Preview, Route, split
from deployments.settings import DECODE, ServedStage
from stages.encode import PromptTooLong

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


@dataclass(frozen=True)
class Partial:
    """An image as a stage foresaw it; `order` counts an image's partial ones from 0."""

    order: int
    image: DecodedImage


def _ignore(preview: bytes) -> None:
    pass


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
        partials: asyncio.Queue[Partial | None] = asyncio.Queue()
        travel = asyncio.create_task(self._travel(route, partials.put_nowait))
        travel.add_done_callback(lambda _: partials.put_nowait(None))
        outcome = "failed"
        try:
            while partial := await partials.get():
                yield partial
            image = await travel
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
            travel.cancel()
            self._images.inc(tags={"plan": route.preset or "inline", "outcome": outcome})
        for span in image.spans:
            self._seconds.observe(span.end - span.start, tags={"stage": span.stage})
        console.images.info(
            f"image {image.index} of {route.image.request_id}: {route.image.size}, plan {route.preset or 'inline'}, "
            f"seed {image.seed}, {sum(span.nfe for span in image.spans):g} evaluations, "
            f"{image.spans[-1].end - image.spans[0].start:.2f} s"
        )
        yield image

    async def _travel(self, route: Route, show: Callable[[Partial], None]) -> DecodedImage:
        """Take an image along its legs, each call awaited here: so a failure shows where it happened (ray issue 61594).

        Args:
            show: takes the partial images in their order; they are decoded beside the stages that follow.
        """
        packet: Any = None
        orders, turn = itertools.count(), asyncio.Lock()

        async def decode(preview: bytes) -> None:
            async with turn:
                leg = Leg(self._deployments[DECODE], decodes=True)
                image = await self._call(route, leg, preview)
                show(Partial(next(orders), cast(DecodedImage, image)))

        async with asyncio.timeout(route.deadline - time.time()), asyncio.TaskGroup() as decoding:
            for leg in split(route.plan, self._deployments, route.partial_images):
                packet = await self._call(route, leg, packet, lambda preview: decoding.create_task(decode(preview)))
                if isinstance(packet, PromptTooLong):
                    raise packet
        return cast(DecodedImage, packet)

    async def _call(
        self, route: Route, leg: Leg, packet: bytes | None, show: Callable[[bytes], object] = _ignore
    ) -> bytes | DecodedImage | PromptTooLong:
        """What a leg ends with; cancelled, it cancels the replica's work.

        Args:
            show: takes the packets of the leg's previews.
        """
        replica = self._replicas[leg.deployment]
        if not leg.previews:
            response = replica.run.remote(route, leg, packet)
            try:
                return await response
            finally:
                response.cancel()  # of no effect on one that is done
        results = replica.options(stream=True).run_with_previews.remote(route, leg, packet)
        try:
            async for result in results:
                if isinstance(result, Preview):
                    show(result.packet)
            return result
        finally:
            results.cancel()
