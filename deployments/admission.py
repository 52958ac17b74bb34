"""Admission: an image is let in, has to wait for its turn, or is refused at once because it would be late."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from deployments import metrics, tracing
from deployments.balancer import Balancer
from deployments.fairness import FairQueue
from deployments.http.errors import APIError
from deployments.http.refusals import Refusal
from deployments.messages import Route

Priority = Literal["interactive", "batch"]

_CAUTION = 0.25  # share of the wait that it may take longer than estimated: others' requests also need processors
_WEIGHTS: dict[Priority, float] = {"interactive": 8.0, "batch": 1.0}  # neither starves the other


@dataclass(frozen=True)
class Flow:
    """Images that wait in one line; lines share the devices fairly.

    Attributes:
        priority: share of the line among those of other priorities.
        tenant: whose images they are; empty for everybody's.
        size: `WIDTHxHEIGHT`.
    """

    priority: Priority
    tenant: str
    size: str


class Late(Exception):
    """Images that would be done too late, or for which there is no room.

    Attributes:
        seconds: until they would be done.
        wait: seconds until there is room for them if nothing else comes.
        takes: seconds that they take of those that follow.
        alone: seconds that one takes if nothing else is there.
    """

    def __init__(self, seconds: float, wait: float, takes: float, alone: float) -> None:
        super().__init__(seconds, wait, takes, alone)
        self.seconds, self.wait, self.takes, self.alone = seconds, wait, takes, alone


class Turn:
    """The place of an admitted image; it is the image's turn within an `async with` block of this.

    Entering raises Late if waiting took so long that the image would no longer be done in time, and TimeoutError after
    its deadline. A turn that nobody enters is over at the deadline.
    """

    def __init__(
        self, admission: Admission, route: Route, flow: Flow, work: dict[str, float], promise: ExitStack
    ) -> None:
        self.route, self.flow, self.work, self.promise = route, flow, work, promise
        self.has_come = asyncio.Event()
        self.late: Late | None = None
        self._admission = admission
        self._begun = time.monotonic()
        self._expiry = asyncio.get_running_loop().call_later(self.left_s, admission.leave, self)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.route.deadline - time.time())

    async def __aenter__(self) -> None:
        try:
            with tracing.span("wait", {"priority": self.flow.priority, "size": self.flow.size}):
                async with asyncio.timeout(self.left_s):
                    await self.has_come.wait()
            if self.late:
                raise self.late
        except BaseException:
            self.end()
            raise
        self.promise.close()  # the router promises what is left of the image from here on
        self._admission.waited(self.flow, time.monotonic() - self._begun)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Make room for others; once more has no effect."""
        self._expiry.cancel()
        self._admission.leave(self)


class Admission:
    """Lets a bounded number of images in at once; the others wait here, where lines of clients and sizes are fair.

    Behind the door, devices take the image with the earliest deadline first.
    """

    def __init__(self, balancer: Balancer, in_service: int, waiting: int) -> None:
        """Open the door.

        Args:
            balancer: knows the work that is expected, and what it takes.
            in_service: most images behind the door: enough to fill the batches of all stages.
            waiting: most images in front of it.
        """
        self._balancer = balancer
        self._in_service, self._waiting = in_service, waiting
        self._inside: set[Turn] = set()
        self._queue: FairQueue[Turn] = FairQueue()
        self._levels = metrics.LevelGauge(metrics.WAITING)

    def admit(self, routes: Sequence[Route], flow: Flow, within_s: float) -> list[Turn]:
        """Give images of one plan their turns, all of them or none.

        Args:
            routes: the images' routes.
            flow: the line that they wait in.
            within_s: seconds in which they must be done, by the estimate.

        Raises:
            Late: they would not be, or no more may wait.
        """
        promised = []
        with ExitStack() as undo:
            for route in routes:
                work = self._balancer.share(route.plan, route.megapixels, pools=route.pools).work
                promise = undo.enter_context(ExitStack())
                promise.enter_context(self._balancer.promised(work))
                promised.append((route, work, promise))
            overtaken = (turn.work for turn in self._queue.behind(flow))
            seconds = self._balancer.seconds_until_done(work, self._in_service, overtaken)
            crowd = len(self._queue) + len(routes) - self._free - self._waiting  # images that have no room to wait
            alone = self._balancer.seconds_alone(work)
            seconds += _CAUTION * max(0.0, seconds - alone)
            if seconds > within_s or crowd > 0:
                pace = self._balancer.pace(work, self._in_service)
                raise Late(seconds, max(seconds - within_s, crowd * pace), len(routes) * pace, alone)
            undo.pop_all()
        self._levels.expect(flow.priority, flow.size)
        turns = [Turn(self, route, flow, work, promise) for route, work, promise in promised]
        for turn in turns:
            self._queue.push(turn, flow, sum(turn.work.values()), _WEIGHTS[flow.priority])
        self._let_in()
        return turns

    def admit_first(
        self, choices: Sequence[Sequence[Route]], flow: Flow, within_s: float, soon_s: float
    ) -> tuple[int, list[Turn]]:
        """Admit the first choice that would be done soon or, if none is, the first that would be done in time.

        Args:
            choices: the same images by several plans, the preferred one first; a single one need not be soon.
            flow: the line that they wait in.
            within_s: seconds in which they must be done.
            soon_s: seconds in which they should be done.

        Returns:
            The choice's index, and the images' turns.

        Raises:
            Late: none would be done in time.
        """
        limits = [min(soon_s, within_s), within_s] if len(choices) > 1 else [within_s]
        late: Late | None = None
        for limit, (index, routes) in itertools.product(limits, enumerate(choices)):
            try:
                return index, self.admit(routes, flow, limit)
            except Late as error:
                late = error
        assert late, "there must be a choice"
        raise late

    def leave(self, turn: Turn) -> None:
        """End an image's turn, or take it out of the queue; once more has no effect."""
        turn.promise.close()
        self._inside.discard(turn)
        if not turn.has_come.is_set():
            self._queue.discard(turn)
        self._let_in()

    def refuse(self, late: Late, images: int, size: str, timeout_s: float) -> APIError:
        """Return the answer to a request whose images are late.

        What would be late on an idle server, too, has exceeded its deadline.

        Args:
            late: why.
            images: number of the request's images.
            size: their size.
            timeout_s: seconds that the request may take.
        """
        if late.alone > timeout_s:
            metrics.REFUSED.add(images, reason="too_short", size=size)
            message = f"an image takes about {late.alone:.2g} s, more than the {timeout_s:g} s that the request has"
            return APIError(504, "deadline_exceeded", message)
        metrics.REFUSED.add(images, reason="overloaded", size=size)
        return Refusal(late.seconds, late.wait, late.takes, images, size).error()

    def waited(self, flow: Flow, seconds: float) -> None:
        """Take note of how long an image waited."""
        metrics.WAIT_SECONDS.observe(seconds, priority=flow.priority, size=flow.size)

    def tell(self) -> None:
        """Tell the metrics how many images wait; Ray forgets what it was not told for some time."""
        self._levels.set(Counter((turn.flow.priority, turn.flow.size) for turn in self._queue))

    @property
    def _free(self) -> int:
        return self._in_service - len(self._inside)

    def _let_in(self) -> None:
        while self._queue and self._free > 0:
            turn = self._queue.pop()
            seconds = self._balancer.seconds_alone(turn.work)
            if seconds > turn.left_s:
                turn.late = Late(seconds, 0.0, self._balancer.pace(turn.work, self._in_service), seconds)
                turn.promise.close()
            else:
                self._inside.add(turn)
            turn.has_come.set()
