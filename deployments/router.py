"""Routing of images through the deployments of their plans' stages."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

from deployments import console
from deployments.hops import plan_hops
from deployments.http.errors import APIError
from deployments.messages import Call, Hop, ImageReply, PacketReply, RefusalReply, Route, read_reply
from deployments.pools import Pools
from deployments.settings import DECODE
from stages.image import parse_size

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


@dataclass(frozen=True)
class DecodedImage:
    """An image's file, and the reply that came with it."""

    reply: ImageReply
    data: bytes


@dataclass(frozen=True)
class Partial:
    """A partial image, as a step predicted it; `order` counts the partial images of an image from 0."""

    order: int
    image: DecodedImage


def _megapixels(route: Route) -> float:
    width, height = parse_size(route.image.size)
    return width * height / 1e6


def _ignore(preview: bytes) -> None:
    pass


class Router:
    """Sends many images at once through their plans' stages.

    Packets pass through the router as bytes, which it does not read, so a packet outlives the replica that made it.
    """

    def __init__(self, replicas: Mapping[str, DeploymentHandle], pools: Pools) -> None:
        """Route to deployments.

        Args:
            replicas: handle of each deployment, by its name.
            pools: choose the deployments of each image.
        """
        self._replicas = replicas
        self._pools = pools
        self._images = Counter("images", description="Images by plan and outcome.", tag_keys=("plan", "outcome"))
        self._seconds = Histogram(
            "stage_seconds", description="Work on an image by stage.", boundaries=_SECONDS, tag_keys=("stage",)
        )

    async def generate(self, route: Route) -> AsyncGenerator[Partial | DecodedImage]:
        """Yield the requested partial images, then the image.

        Closing or cancelling the generator cancels the hop in progress.

        Raises:
            APIError: see `APIError.from_failure`.
        """
        partials: asyncio.Queue[Partial | None] = asyncio.Queue()
        task = asyncio.create_task(self._run_hops(route, partials.put_nowait))
        task.add_done_callback(lambda _: partials.put_nowait(None))
        outcome = "failed"
        try:
            while partial := await partials.get():
                yield partial
            image = await task
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
            task.cancel()
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

    async def _run_hops(self, route: Route, show: Callable[[Partial], None]) -> DecodedImage:
        """Take an image through its hops.

        Each call is awaited here, so that a failure shows where it happened (ray issue 61594).

        Args:
            route: the image's route.
            show: called with the partial images in order; they are decoded while later stages run.
        """
        orders, in_order = itertools.count(), asyncio.Lock()
        with self._pools.assign(route.plan, _megapixels(route)) as deployments:
            hops = plan_hops(route.plan, deployments, route.partial_images)

            async def decode(preview: bytes) -> None:
                async with in_order:
                    image = await self._decode(route, Hop(deployment=deployments[DECODE], decodes=True), preview)
                    show(Partial(next(orders), image))

            async with asyncio.timeout(route.deadline - time.time()), asyncio.TaskGroup() as decoding:

                def decode_beside(preview: bytes) -> None:
                    decoding.create_task(decode(preview))

                packet = b""
                for hop in hops[:-1]:
                    _, packet = await self._call(route, hop, packet, decode_beside)
                return await self._decode(route, hops[-1], packet, decode_beside)

    async def _decode(
        self, route: Route, hop: Hop, packet: bytes, show: Callable[[bytes], object] = _ignore
    ) -> DecodedImage:
        """Call a deployment for a hop that decodes."""
        reply, data = await self._call(route, hop, packet, show)
        if not isinstance(reply, ImageReply):
            raise RuntimeError(f"{hop.deployment} ended with a {reply.kind} in place of the image")
        return DecodedImage(reply, data)

    async def _call(
        self, route: Route, hop: Hop, packet: bytes, show: Callable[[bytes], object] = _ignore
    ) -> tuple[PacketReply | ImageReply, bytes]:
        """Call a replica; cancelling this cancels the replica's work.

        Args:
            route: the image's route.
            hop: the hop to run.
            packet: the packet after the previous hop.
            show: called with the packets of the hop's previews.

        Raises:
            APIError: the replica refused the image.
        """
        with self._pools.at_work(hop.deployment, _megapixels(route) * (hop.work or 1)):
            reply, data = await self._send(Call(route=route, hop=hop).to_json(), hop, packet, show)
        if isinstance(reply, RefusalReply):
            raise APIError.from_refusal(reply)
        return reply, data

    async def _send(
        self, call: str, hop: Hop, packet: bytes, show: Callable[[bytes], object]
    ) -> tuple[PacketReply | ImageReply | RefusalReply, bytes]:
        replica = self._replicas[hop.deployment]
        if not hop.previews:
            response = replica.run.remote(call, packet)
            try:
                header, data = await response
                return read_reply(header), data
            finally:
                response.cancel()  # no effect if it is done
        results = replica.options(stream=True).run_with_previews.remote(call, packet)
        try:
            async for header, data in results:
                reply = read_reply(header)
                if reply.kind != "preview":
                    return reply, data
                show(data)
            raise RuntimeError(f"{hop.deployment} ended without a reply")
        finally:
            results.cancel()
