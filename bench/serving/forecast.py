"""The simulator against a running server, by loads that it was not calibrated on."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serving.calibrate import calibrate
from bench.serving.load import Sent, closed_loop, figures, open_loop
from cluster.simulate import circulate, poisson_arrivals, replay
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan

_ROUNDS = 4
_CLIENTS = 8
_APART = 1e4  # seconds between the arrivals of two rounds, which do not meet


@dataclass(frozen=True)
class Forecast:
    """One figure of one load; its unit is the name's."""

    name: str
    foreseen: float
    measured: float

    @property
    def error(self) -> float:
        """Over what was measured."""
        return self.foreseen / self.measured - 1


def forecasts(
    url: str,
    bodies: Sequence[dict[str, Any]],
    pipeline: Pipeline,
    plan: Plan,
    prompted: Sequence[Prompted],
    *,
    rate: float,
    seconds: float,
    deadline: float,
    batch_tokens: int,
) -> Iterator[Forecast]:
    """Latency under random arrivals, and throughput of many clients, from what one and two clients see.

    All loads take turns, a part of each, since a shared machine has slow minutes.

    Args:
        bodies: of requests that the server answers by `plan`, in the model's first size.
        pipeline: with adapters as the server holds them.
        prompted: see `calibrate`.
        rate, seconds: of the random arrivals.
        deadline, batch_tokens: see `calibrate`.
    """
    count = round(rate * seconds / _ROUNDS)
    one: list[Sent] = []
    two: list[Sent] = []
    random: list[Sent] = []
    throughputs: list[float] = []
    for turn in range(_ROUNDS):
        one += asyncio.run(closed_loop(url, bodies, 1, 12))
        two += asyncio.run(closed_loop(url, bodies, 2, 24))
        random += asyncio.run(open_loop(url, bodies, rate, count, seed=turn))
        throughputs.append(figures(asyncio.run(closed_loop(url, bodies, _CLIENTS, 32)), deadline).throughput)
    scenario = calibrate(
        pipeline,
        plan,
        prompted,
        one_client=figures(one, deadline),
        two_clients=figures(two, deadline),
        rate=rate,
        deadline=deadline,
        batch_tokens=batch_tokens,
    )
    arrivals = [turn * _APART + arrival for turn in range(_ROUNDS) for arrival in poisson_arrivals(rate, count, turn)]
    foreseen, measured = replay(scenario, arrivals), figures(random, deadline)
    yield Forecast(f"p50 at {rate:.2f} a second, s", foreseen.p50, measured.p50)
    yield Forecast(f"p95 at {rate:.2f} a second, s", foreseen.p95, measured.p95)
    yield Forecast(
        f"images/s at concurrency {_CLIENTS}", circulate(scenario, _CLIENTS).throughput, statistics.fmean(throughputs)
    )
