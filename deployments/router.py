"""Sends images through the deployments of their plans' stages."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

from deployments import console
from deployments.hops import plan_hops
from deployments.http.errors import APIError
from deployments.messages import Call, Hop, ImageReply, PacketReply, RefusalReply, Route, Wire, read_reply
from deployments.pools import Pools
from deployments.settings import DECODE
from stages.image import parse_size

logger = logging.getLogger("ray.serve")

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


@dataclass(frozen=True)
class DecodedImage:
    """An image's file, and how it came about."""

    reply: ImageReply
    data: bytes


@dataclass(frozen=True)
class Partial:
    """An image as a stage predicted it; `order` counts an image's partial ones from 0."""

    order: int
    image: DecodedImage


def _megapixels(route: Route) -> float:
    width, height = parse_size(route.image.size)
    return width * height / 1e6


def _ignore(preview: bytes) -> None:
    pass


class Router:
    """Sends images through their plans' stages, many at once, each as soon as the one before it is done.

    Packets pass through as bytes, so that what one replica made outlives it; the router looks into none.
    """

    def __init__(self, replicas: Mapping[str, DeploymentHandle], pools: Pools) -> None:
        """Route to deployments.

        Args:
            replicas: of each deployment.
            pools: which of them does what.
        """
        self._replicas = replicas
        self._pools = pools
        self._images = Counter("images", description="Images by plan and outcome.", tag_keys=("plan", "outcome"))
        self._seconds = Histogram(
            "stage_seconds", description="Work on an image by stage.", boundaries=_SECONDS, tag_keys=("stage",)
        )

    async def generate(self, route: Route) -> AsyncGenerator[Partial | DecodedImage]:
        """Yield the partial images that were asked for, then the image.

        Closing or cancelling it cancels the stage at work.

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
        self._record(route, image.reply)
        yield image

    def _record(self, route: Route, image: ImageReply) -> None:
        for span in image.spans:
            self._seconds.observe(span.end - span.start, tags={"stage": span.stage})
        console.images.info(
            f"image {image.index} of {route.image.request_id}: {route.image.size}, plan {route.preset or 'inline'}, "
            f"seed {image.seed}, {sum(span.nfe for span in image.spans):g} evaluations, "
            f"{image.spans[-1].end - image.spans[0].start:.2f} s"
        )

    async def _travel(self, route: Route, show: Callable[[Partial], None]) -> DecodedImage:
        """Take an image along its hops, each call awaited here: so a failure shows where it happened (ray issue 61594).

        Args:
            route: of the image.
            show: takes the partial images in their order; they are decoded beside the stages that follow.
        """
        deployments = self._pools.assign(route.plan, _megapixels(route))
        hops = plan_hops(route.plan, deployments, route.partial_images)
        orders, turn = itertools.count(), asyncio.Lock()

        async def decode(preview: bytes) -> None:
            async with turn:
                image = await self._decode(route, Hop(deployment=deployments[DECODE], decodes=True), preview)
                show(Partial(next(orders), image))

        async with asyncio.timeout(route.deadline - time.time()), asyncio.TaskGroup() as decoding:
            packet = b""
            for hop in hops[:-1]:
                _, packet = await self._call(route, hop, packet, lambda preview: decoding.create_task(decode(preview)))
            return await self._decode(route, hops[-1], packet, lambda preview: decoding.create_task(decode(preview)))

    async def _decode(
        self, route: Route, hop: Hop, packet: bytes, show: Callable[[bytes], object] = _ignore
    ) -> DecodedImage:
        """Call for a hop that ends with the image."""
        reply, data = await self._call(route, hop, packet, show)
        if not isinstance(reply, ImageReply):
            raise RuntimeError(f"{hop.deployment} ended with a {reply.kind} in place of the image")
        return DecodedImage(reply, data)

    async def _call(
        self, route: Route, hop: Hop, packet: bytes, show: Callable[[bytes], object] = _ignore
    ) -> tuple[PacketReply | ImageReply, bytes]:
        """Call a replica; cancelled, it cancels the replica's work.

        Args:
            route, hop: what to do.
            packet: as the hop before left it.
            show: takes the packets of the hop's previews.

        Raises:
            APIError: there will be no image.
        """
        with self._pools.at_work(hop.deployment, _megapixels(route) * (hop.nfe or 1)):
            header, data = await self._ask(Call(route=route, hop=hop).to_json(), hop, packet, show)
        reply = read_reply(header)
        if isinstance(reply, RefusalReply):
            raise APIError.from_refusal(reply)
        return reply, data

    async def _ask(self, call: str, hop: Hop, packet: bytes, show: Callable[[bytes], object]) -> Wire:
        replica = self._replicas[hop.deployment]
        if not hop.previews:
            response = replica.run.remote(call, packet)
            try:
                return await response
            finally:
                response.cancel()  # of no effect on one that is done
        results = replica.options(stream=True).run_with_previews.remote(call, packet)
        try:
            async for header, data in results:
                reply = read_reply(header)
                if reply.kind != "preview":
                    return header, data
                show(data)
            raise RuntimeError(f"{hop.deployment} ended without a reply")
        finally:
            results.cancel()
