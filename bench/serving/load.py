"""Load generators for a server of the images API, and the figures of a run."""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from cluster.simulate import poisson_arrivals

_POOLS = 64
_UNLIMITED = httpx.Limits(max_connections=None)
_TIMEOUT = 600.0  # seconds; a request that takes longer counts as failed


@dataclass(frozen=True)
class Sent:
    """A request that was sent.

    Attributes:
        due: when it was due to be sent, in seconds of the monotonic clock; a client that sends late adds to the
            latency.
        end: when its answer had arrived, on the same clock.
        stages: seconds of work by stage, empty if the server reports none.
        error: what went wrong, or None.
    """

    due: float
    end: float
    stages: dict[str, float]
    error: str | None

    @property
    def latency(self) -> float:
        return self.end - self.due


@dataclass(frozen=True)
class LoadFigures:
    """Figures of a run.

    Attributes:
        requests, failed: number of requests, and of those that failed.
        throughput: answers per second, from the first request to the last answer.
        p50, p95, p99: percentiles of the latency in seconds.
        goodput: answers per second within the deadline.
        stages: mean seconds of work by stage.
        elsewhere: mean seconds that a request spends outside its stages: in queues, between deployments, in HTTP.
    """

    requests: int
    failed: int
    throughput: float
    p50: float
    p95: float
    p99: float
    goodput: float
    stages: dict[str, float]
    elsewhere: float


def figures(sent: Sequence[Sent], deadline: float) -> LoadFigures:
    """Summarise a run.

    Args:
        sent: the run's requests.
        deadline: seconds within which an answer counts for goodput.

    Raises:
        ValueError: every request failed; the message holds the first one's error.
    """
    answered = [request for request in sent if request.error is None]
    if not answered:
        raise ValueError(f"no request was answered: {sent[0].error if sent else 'none was sent'}")
    elapsed = max(request.end for request in sent) - min(request.due for request in sent)
    latencies = [request.latency for request in answered]
    p50, p95, p99 = (float(value) for value in np.percentile(latencies, [50, 95, 99]))
    names = dict.fromkeys(name for request in answered for name in request.stages)
    stages = {name: float(np.mean([request.stages.get(name, 0.0) for request in answered])) for name in names}
    return LoadFigures(
        requests=len(sent),
        failed=len(sent) - len(answered),
        throughput=len(answered) / elapsed,
        p50=p50,
        p95=p95,
        p99=p99,
        goodput=sum(latency <= deadline for latency in latencies) / elapsed,
        stages=stages,
        elsewhere=float(np.mean(latencies)) - sum(stages.values()),
    )


class _Pools(httpx.AsyncBaseTransport):
    """Several pools of connections, of which each request takes the one with the fewest others.

    A pool looks at all of its connections with every request, which for a thousand of them is most of a core's time.
    """

    def __init__(self, verify: ssl.SSLContext) -> None:
        self._pools = [httpx.AsyncHTTPTransport(verify=verify, limits=_UNLIMITED) for _ in range(_POOLS)]
        self._in_flight = [0] * _POOLS

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        index = self._in_flight.index(min(self._in_flight))
        self._in_flight[index] += 1
        try:
            answer = await self._pools[index].handle_async_request(request)
        finally:
            self._in_flight[index] -= 1
        return answer

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Connect to a server, without a limit to the number of connections."""
    transport = _Pools(httpx.create_ssl_context())
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, transport=transport) as client:
        yield client


def go_first() -> bool:
    """Let the calling thread go before all others, as a client does that is on another machine; False if it may not.

    On a machine that is full its load would otherwise come late and in bursts, and its clock run on while it waits.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


async def _send(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Sent:
    try:
        answer = await client.post("/v1/images/generations", json=body)
    except httpx.HTTPError as error:
        return Sent(due, time.monotonic(), {}, repr(error))
    end = time.monotonic()
    if answer.status_code != 200:
        return Sent(due, end, {}, f"{answer.status_code}: {answer.text[:200]}")
    image = answer.json()["data"][0]
    stages: dict[str, float] = defaultdict(float)  # a stage in parts has several timings
    for timing in image.get("timings", ()):
        stages[timing["stage"]] += timing["seconds"]
    return Sent(due, end, stages, None)


async def closed_loop(url: str, bodies: Sequence[dict[str, Any]], concurrency: int, count: int) -> list[Sent]:
    """Send `count` requests, with `concurrency` under way at any time; `bodies` are used in turn."""
    queue = iter(list(itertools.islice(itertools.cycle(bodies), count)))
    sent: list[Sent] = []
    async with connected(url) as client:

        async def worker() -> None:
            for body in queue:
                sent.append(await _send(client, body, time.monotonic()))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return sent


async def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, count: int, seed: int = 0) -> list[Sent]:
    """Send `count` requests as a Poisson process of `rate` per second, without waiting for answers."""
    async with connected(url) as client:

        async def one(body: dict[str, Any], due: float) -> Sent:
            await asyncio.sleep(due - time.monotonic())
            return await _send(client, body, due)

        start, arrivals = time.monotonic(), poisson_arrivals(rate, count, seed)
        requests = [
            one(body, start + arrival) for body, arrival in zip(itertools.cycle(bodies), arrivals, strict=False)
        ]
        return list(await asyncio.gather(*requests))
