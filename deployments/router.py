"""Routing of images through the deployments of their plans' stages."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from opentelemetry.trace import Span as TraceSpan
from ray.serve.handle import DeploymentHandle

from deployments import console, metrics, ray_internals, tracing
from deployments.attempts import Lost, attempt
from deployments.balancer import Balancer
from deployments.hops import next_hop
from deployments.http.errors import REPLICA_LOST, RETRY, APIError
from deployments.messages import Call, Hop, ImageReply, PacketReply, RefusalReply, Route, StepReply
from stages.spans import Span

logger = logging.getLogger("ray.serve")

_PAUSE_S = 1.0  # before a deployment that takes no work is asked again
_PROBE_TIMEOUT_S = 5.0


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


@dataclass(frozen=True)
class _Attempt:
    """An attempt at a hop: what it was to do, when it began, and its span."""

    stages: frozenset[str]
    start: float
    span: TraceSpan


@dataclass
class _Held:
    """What the router holds of an image.

    Attributes:
        packet: its last packet; empty before it is encoded.
        done: steps of the plan that the packet has behind it; None before it is encoded.
        shown: step of the last preview.
        suspect: whether a replica died or stalled with the image, which has come no further since.
        tell: called with the number of steps that are done.
        attempts: the attempts at its hops so far.
    """

    packet: bytes = b""
    done: int | None = None
    shown: int = 0
    suspect: bool = False
    tell: Callable[[int], object] | None = None
    attempts: list[_Attempt] = field(default_factory=list)

    def keep(self, done: int, packet: bytes) -> None:
        """Go on from here from now on."""
        self.packet, self.done, self.suspect = packet, done, False
        if self.tell:
            self.tell(done)


def _ignore(preview: bytes) -> None:
    pass


class Router:
    """Sends many images at once through their plans' stages.

    Packets pass through the router as bytes, which it does not read. It keeps the last one of each image, so that an
    image outlives the replicas that it is in.
    """

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], balancer: Balancer, checkpoint_steps: int | None = None
    ) -> None:
        """Route to deployments.

        Args:
            replicas: handle of each deployment, by its name.
            balancer: chooses the deployments of each image.
            checkpoint_steps: steps after which a hop hands its packet back, or None for never.
        """
        self._replicas = replicas
        self._balancer = balancer
        self._checkpoint_steps = checkpoint_steps
        self._suspects: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._probes: dict[str, asyncio.Task[None]] = {}

    async def generate(
        self, route: Route, tell: Callable[[int], object] | None = None
    ) -> AsyncGenerator[Partial | DecodedImage]:
        """Yield the requested partial images, then the image.

        Closing or cancelling the generator cancels the hop in progress.

        Args:
            route: the image's route.
            tell: called with the number of the plan's steps that are done, 0 once the image is encoded.

        Raises:
            APIError: see `APIError.from_failure`.
        """
        partials: asyncio.Queue[Partial | None] = asyncio.Queue()
        begun = time.time()
        task = asyncio.create_task(self._run_hops(route, partials.put_nowait, tell))
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
            metrics.IMAGES.add(plan=route.preset or "inline", size=route.image.size, outcome=outcome)
        self._record(route, image.reply, begun)
        yield image

    def _record(self, route: Route, image: ImageReply, begun: float) -> None:
        plan, size = route.preset or "inline", route.image.size
        metrics.MEGAPIXELS.add(route.megapixels, plan=plan, size=size)
        worked: dict[str, float] = defaultdict(float)
        waited: dict[str, float] = defaultdict(float)
        for before, span in zip((begun, *(span.end for span in image.spans)), image.spans, strict=False):
            worked[span.stage] += span.end - span.start
            waited[span.stage] += max(0.0, span.start - before)  # clocks of nodes differ
        for stage, seconds in worked.items():
            metrics.STAGE_SECONDS.observe(seconds, stage=stage, size=size)
            metrics.STAGE_WAIT_SECONDS.observe(waited[stage], stage=stage, size=size)
        console.images.info(
            f"image {image.index} of {route.image.request_id}: {route.image.size}, plan {route.preset or 'inline'}, "
            f"seed {image.seed}, {sum(span.nfe for span in image.spans):g} evaluations, "
            f"{image.spans[-1].end - image.spans[0].start:.2f} s",
            extra={"request_id": route.image.request_id},
        )

    async def _run_hops(
        self, route: Route, show: Callable[[Partial], None], tell: Callable[[int], object] | None
    ) -> DecodedImage:
        """Take an image through its hops.

        Args:
            route: the image's route.
            show: called with the partial images in order; they are decoded while later stages run.
            tell: see `generate`.
        """
        orders, in_order = itertools.count(), asyncio.Lock()
        steps = sum(stage.steps for stage in route.plan.stages)

        async def decode(preview: bytes) -> None:
            async with in_order:
                image = await self._take(route, _Held(preview, done=steps))
                show(Partial(next(orders), image))

        held = _Held(tell=tell)
        attributes = {
            "request.id": route.image.request_id,
            "image.index": route.image.image_index,
            "image.seed": route.image.seed,
            "image.size": route.image.size,
            "image.plan": route.preset or "inline",
        }
        with tracing.span("image", attributes):
            async with asyncio.timeout(route.deadline - time.time()), asyncio.TaskGroup() as decoding:

                def decode_beside(preview: bytes) -> None:
                    decoding.create_task(decode(preview))

                image = await self._take(route, held, decode_beside)
        _trace_stages(held.attempts, image.reply.spans)
        return image

    async def _take(self, route: Route, held: _Held, show: Callable[[bytes], object] = _ignore) -> DecodedImage:
        """Take an image through what is left of its plan, hop by hop; a hop that is lost is tried again.

        Each call is awaited here, so that a failure shows where it happened (ray issue 61594).

        An image may itself be what kills replicas. All images that were in a replica when it died or stalled are
        suspects until they get further than they were. Of its suspects a deployment has one at a time, so that the
        next death is blamed on that one alone, which is given up; all others that were in the replica are resumed.

        Args:
            route: the image's route.
            held: the image so far.
            show: called with the packets of previews.

        Raises:
            APIError: a replica refused the image, or two were lost with it and it came no further in between.
        """
        while True:
            with self._balancer.assign(route.plan, route.megapixels, held.done, route.pools) as deployments:
                hop = next_hop(
                    route.plan,
                    deployments,
                    done=held.done,
                    partial_images=route.partial_images,
                    shown=held.shown,
                    checkpoint_steps=self._checkpoint_steps,
                    tells=held.tell is not None,
                )
                attributes = {"hop.deployment": hop.deployment, "hop.after_step": held.done or 0, "hop.work": hop.work}
                try:
                    with tracing.span(f"hop {hop.deployment}", attributes) as span:
                        stages = frozenset(stage for stage, name in deployments.items() if name == hop.deployment)
                        held.attempts.append(_Attempt(stages, time.time(), span))
                        reply, data = await self._call(route, hop, held, show)
                except Lost as lost:
                    await self._resume(route, held, lost)
                    continue
            if isinstance(reply, ImageReply) != hop.decodes:
                raise RuntimeError(f"{hop.deployment} ended with a {reply.kind}")
            if isinstance(reply, ImageReply):
                return DecodedImage(reply, data)
            held.keep(sum(stage.steps for stage in route.plan.stages[: hop.end]), data)

    async def _call(
        self, route: Route, hop: Hop, held: _Held, show: Callable[[bytes], object]
    ) -> tuple[PacketReply | ImageReply, bytes]:
        """Attempt a hop; raises Lost, or APIError if the replica refused the image."""
        with ExitStack() as alone:
            if held.suspect:
                await self._suspects[hop.deployment].acquire()
                alone.callback(self._suspects[hop.deployment].release)

            def on_step(reply: StepReply, data: bytes) -> None:
                metrics.HANDOVER_BYTES.add(len(data), target=hop.deployment, direction="received")
                if reply.kind == "preview":
                    held.shown = reply.step
                    show(data)
                elif reply.kind == "step":
                    if held.tell:
                        held.tell(reply.step)
                else:
                    held.keep(reply.step, data)
                    alone.close()

            with self._balancer.at_work(hop.deployment, route.megapixels * (hop.work or 1)) as limit_s:
                replicas = self._replicas[hop.deployment]
                # Serve would hold the call until there is a replica, while another deployment may run the stage. One
                # that is avoided was chosen because no other works.
                if not self._balancer.avoids(hop.deployment) and ray_internals.lacks_replicas(replicas):
                    raise Lost(hop.deployment, "refused")
                metrics.HANDOVER_BYTES.add(len(held.packet), target=hop.deployment, direction="sent")
                call = Call(route=route, hop=hop, traceparent=tracing.header())
                reply, data = await attempt(replicas, call, held.packet, limit_s, on_step)
                metrics.HANDOVER_BYTES.add(len(data), target=hop.deployment, direction="received")
        if isinstance(reply, RefusalReply):
            raise APIError.from_refusal(reply, hop.deployment)
        return reply, data

    async def _resume(self, route: Route, held: _Held, lost: Lost) -> None:
        """Take note of a lost attempt, and return when it is time for the next; raises APIError if there is none."""
        self._probe(lost.deployment)
        if lost.reason == "refused":  # and may be chosen again
            await asyncio.sleep(_PAUSE_S)
            return
        image = f"image {route.image.image_index} of {route.image.request_id}"
        if lost.reason != "hung":
            if held.suspect:
                logger.error(f"{image}: {lost.deployment} {lost.reason}, the second replica that was lost with it")
                raise APIError(503, "replica_lost", REPLICA_LOST, headers=RETRY) from lost
            held.suspect = True
        logger.warning(f"{image}: {lost.deployment} {lost.reason}; it goes on after step {held.done or 0}")
        metrics.RESUMED.add(lost_in=lost.deployment, reason=lost.reason)

    def _probe(self, deployment: str) -> None:
        """Let a deployment that is avoided come back once it answers; a task does so in the background."""
        if deployment not in self._probes:
            self._probes[deployment] = asyncio.create_task(self._probe_until_healthy(deployment))
            self._probes[deployment].add_done_callback(lambda _: self._probes.pop(deployment))

    async def _probe_until_healthy(self, deployment: str) -> None:
        while self._balancer.avoids(deployment):
            await asyncio.sleep(_PAUSE_S)
            with suppress(Exception):  # that it fails is its answer
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    await self._replicas[deployment].check_health.remote()
                    self._balancer.readmit(deployment)
        logger.info(f"{deployment} is no longer avoided")


def _trace_stages(attempts: Sequence[_Attempt], spans: Sequence[Span]) -> None:
    """Record the stages' work as children of the attempts that did it; clocks of nodes may differ a little."""
    for span in spans:
        able = [attempt for attempt in attempts if span.stage in attempt.stages]
        begun = [attempt for attempt in able if attempt.start <= span.start]
        parent = (begun[-1:] or able[:1] or attempts[:1])[0].span
        tracing.record(span.stage, span.start, span.end, parent, {"stage.evaluations": span.nfe})
