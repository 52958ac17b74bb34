"""Tracking of the replicas that run, which notices a death within a fraction of a second."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deployments import metrics, ray_internals

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_LOOK_PERIOD_S = 0.2
_STATUS_PERIOD_S = 5.0  # while nothing happens
_STATUS_PERIOD_UNREADY_S = 0.5
_DEADLINE_S = 2.0  # after which a cluster that does not respond makes the server unready
_AT_REST = {"HEALTHY", "UPSCALING", "DOWNSCALING"}  # statuses in which a deployment may be scaled to zero replicas
# States in which a replica works; a controller that begins anew has yet to hear of one that it recovers.
_AT_WORK = {"RUNNING", "RECOVERING", "PENDING_MIGRATION"}
_DRAINING = "draining"
_STAGES = "stages of "  # before an application's name
_ORIGINS = "origins of "  # likewise
_UNANSWERED = (TimeoutError, RayError, RayServeException)


@dataclass(frozen=True)
class Deployments:
    """A report of Serve's controller on all deployments of all applications.

    Attributes:
        running: number of running replicas, by `application#deployment`.
        resting: deployments that are healthy without a replica.
        started: names of the replicas' actors when the controller was asked.
        stages: the stages that deployments are needed for, by `application#deployment`; any deployment of a stage will
            do. Those that are not here, such as the ingress, are needed themselves.
        cors_origins: origins whose pages in browsers may call the applications.
    """

    running: Mapping[str, int] = field(default_factory=dict)
    resting: frozenset[str] = frozenset()
    started: frozenset[str] = frozenset()
    stages: Mapping[str, Sequence[str]] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Readiness:
    """Whether images can be made.

    Attributes:
        replicas: number of running replicas, by deployment.
        reason: why images cannot be made, or None if they can.
        stages: for each stage, the number of running replicas of each deployment that runs it.
    """

    replicas: Mapping[str, int]
    reason: str | None
    stages: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, deployments: Deployments, alive: frozenset[str]) -> Readiness:
        """Combine the controller's report with the actors that are alive.

        The controller finds a death at its next health check, seconds later. Ray's own directory of named actors drops
        a dead replica at once, but does not distinguish replicas that load from those that run. A replica counts if
        both list it, and if it existed when the controller was asked.
        """
        known = [ray_internals.deployment_of(name) for name in alive & deployments.started]
        replicas = {key: min(running, known.count(key)) for key, running in deployments.running.items()}
        works = {key for key, count in replicas.items() if count or not _lacks(key, deployments)}
        alternatives: dict[tuple[str, str], list[str]] = defaultdict(list)  # by application and stage
        for key in replicas:
            for stage in deployments.stages.get(key, ()):
                alternatives[key.partition("#")[0], stage].append(key)
        needed: dict[tuple[str, ...], list[str]] = {(key,): [] for key in replicas if key not in deployments.stages}
        stages: dict[str, dict[str, int]] = defaultdict(dict)
        for (_, stage), keys in alternatives.items():
            needed.setdefault(tuple(keys), []).append(stage)
            stages[stage].update((key.partition("#")[2], replicas[key]) for key in keys)
        missing = sorted(_describe(keys, of) for keys, of in needed.items() if works.isdisjoint(keys))
        reason = f"no running replica of {', '.join(missing)}" if missing else None
        if not replicas:
            reason = "starting"
        return cls({key.partition("#")[2]: count for key, count in replicas.items()}, reason, dict(stages))


def _lacks(key: str, deployments: Deployments) -> bool:
    """Whether a deployment without a living replica should have one."""
    return bool(deployments.running[key]) or key not in deployments.resting


def _describe(keys: Sequence[str], stages: Sequence[str]) -> str:
    """Describe deployments of which one must run: `Base or BaseOnMI300 (base)`."""
    names = " or ".join(key.partition("#")[2] for key in keys)
    return f"{names} ({', '.join(stages)})" if stages else names


class Watch:
    """Follows the cluster in background tasks of an event loop.

    Attributes:
        was_ready: whether images could be made at some time since this watch began.
        draining: whether the server is about to stop; see `drain`.
    """

    def __init__(self, in_flight: Callable[[], int]) -> None:
        """Start watching, in the running event loop.

        Args:
            in_flight: returns the number of requests in progress here.
        """
        self.was_ready = False
        self.draining = False
        self._in_flight = in_flight
        self._name = ray.get_runtime_context().get_actor_name() or ""
        self._deployments = Deployments()
        self._alive: frozenset[str] = frozenset()
        self._seen = 0.0
        self._changed = asyncio.Event()
        self._calls = ThreadPoolExecutor(max_workers=2, thread_name_prefix="watch")
        self._tasks = (asyncio.create_task(self._follow_actors()), asyncio.create_task(self._follow_status()))
        for task in self._tasks:
            task.add_done_callback(_tell)

    @property
    def readiness(self) -> Readiness:
        """The current state."""
        if self._seen and not self.draining and time.monotonic() - self._seen > _DEADLINE_S:
            return Readiness({}, "the cluster does not answer")
        return self.last_known

    @property
    def last_known(self) -> Readiness:
        """The state when the cluster last answered: while it does not, replicas do what they are asked to."""
        if self.draining:
            return Readiness({}, "draining: the server is about to stop")
        return Readiness.of(self._deployments, self._alive)

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """Origins whose pages in browsers may call the applications."""
        return self._deployments.cors_origins

    async def _call(self, function: Callable[[], T]) -> T:
        async with asyncio.timeout(_DEADLINE_S):
            return await asyncio.get_running_loop().run_in_executor(self._calls, function)

    async def _follow_actors(self) -> None:
        told = False  # that this watch is here
        while True:
            with suppress(*_UNANSWERED):  # `readiness` notices when the last result is too old
                alive, draining = await self._call(
                    lambda: (ray_internals.list_replicas(), ray_internals.get(_DRAINING))
                )
                self._seen = time.monotonic()
                if alive != self._alive:
                    self._alive = alive
                    self._changed.set()
                self.was_ready |= self.readiness.reason is None
                if draining:
                    self.draining = True  # from here on nothing is accepted, so the count only falls
                if draining or not told:
                    says = str(self._in_flight()).encode() if draining else b"here"
                    await self._call(partial(ray_internals.put, self._name, says))
                    told = True
            metrics.READY.set(float(self.readiness.reason is None))
            await asyncio.sleep(_LOOK_PERIOD_S)

    async def _follow_status(self) -> None:
        while True:
            self._changed.clear()
            started = self._alive
            with suppress(*_UNANSWERED):
                self._deployments = await self._call(partial(_ask_controller, started, self._deployments))
            period = _STATUS_PERIOD_S if self.readiness.reason is None else _STATUS_PERIOD_UNREADY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await self._changed.wait()


def _tell(task: asyncio.Task[None]) -> None:
    """Log what ended a watch, which should have no end."""
    if not task.cancelled():
        logger.error("the watch over the cluster has ended", exc_info=task.exception())


def _ask_controller(started: frozenset[str], before: Deployments) -> Deployments:
    applications = serve.status().applications
    stages, origins = {}, set()
    for application in applications:
        announced = json.loads(ray_internals.get(_STAGES + application) or b"{}")
        stages.update({f"{application}#{deployment}": runs for deployment, runs in announced.items()})
        origins.update(json.loads(ray_internals.get(_ORIGINS + application) or b"[]"))
    running, resting = _report(applications, before)
    return Deployments(running, resting, started, stages, tuple(sorted(origins)))


def _report(
    applications: Mapping[str, ApplicationStatusOverview], before: Deployments
) -> tuple[dict[str, int], frozenset[str]]:
    """Return the deployments' running replicas, and the deployments at rest, as the controller reports them.

    While it builds an application anew, and when it could not, it reports no deployments of what goes on meanwhile.
    """
    running: dict[str, int] = {}
    resting: set[str] = set()
    for application, overview in applications.items():
        if not overview.deployments and overview.status != ApplicationStatus.DELETING:
            former = {key: count for key, count in before.running.items() if key.partition("#")[0] == application}
            running.update(former)
            resting.update(before.resting & former.keys())
        for deployment, status in overview.deployments.items():
            key = f"{application}#{deployment}"
            running[key] = sum(count for state, count in status.replica_states.items() if state in _AT_WORK)
            if status.status in _AT_REST:
                resting.add(key)
    return running, frozenset(resting)


def announce(application: str, stages: Mapping[str, Sequence[str]], cors_origins: Sequence[str] = ()) -> None:
    """Tell all watches what an application's deployments are needed for, and which pages may call it.

    Args:
        application: name of the application.
        stages: for each deployment that runs stages, those that the model's plans use.
        cors_origins: origins whose pages in browsers may call it.
    """
    ray_internals.put(_ORIGINS + application, json.dumps(list(cors_origins)).encode())
    ray_internals.put(_STAGES + application, json.dumps(stages).encode())


def begin() -> None:
    """Forget an earlier `drain` of this cluster."""
    ray_internals.delete(_DRAINING)


def followed() -> bool:
    """Whether every proxy has a watch, which only the environment of its node gives it."""
    return all(ray_internals.get(name) is not None for name in ray_internals.list_proxies())


def is_draining() -> bool:
    """Whether this cluster's server is about to stop; False while the cluster does not answer."""
    with suppress(*_UNANSWERED):
        return ray_internals.get(_DRAINING) is not None
    return False


def hold() -> None:
    """Make `drain` wait for the replica that this runs in, until it lets go."""
    ray_internals.put(_held_by(ray.get_runtime_context().get_actor_name() or ""), b"1")


def let_go() -> None:
    """Let `drain` no longer wait for the replica that this runs in."""
    ray_internals.put(_held_by(ray.get_runtime_context().get_actor_name() or ""), b"0")


def _held_by(replica: str) -> str:
    return f"{replica} holds"


def _occupied() -> bool:
    """Whether a proxy has requests in progress, or a replica holds the drain."""
    if any(ray_internals.get(name) != b"0" for name in ray_internals.list_proxies()):
        return True
    return any(ray_internals.get(_held_by(name)) == b"1" for name in ray_internals.list_replicas())


def drain(timeout_s: float, cut_short: Callable[[], bool]) -> bool:
    """Make every proxy refuse new requests, and wait until those in progress are done and replicas have let go.

    Args:
        timeout_s: longest time to wait, in seconds.
        cut_short: returns whether to stop waiting.

    Returns:
        Whether all requests were done in time.
    """
    ray_internals.put(_DRAINING, b"1")
    deadline = time.monotonic() + timeout_s
    while _occupied():
        if time.monotonic() > deadline or cut_short():
            return False
        time.sleep(_LOOK_PERIOD_S / 2)
    return True
