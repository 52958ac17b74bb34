"""Validation of the simulator against a running server, under loads that it was not calibrated on."""

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
_APART = 1e4  # seconds between the arrivals of two rounds, so that they do not overlap


@dataclass(frozen=True)
class Forecast:
    """A figure under one load, simulated and measured.

    Attributes:
        name: the figure with its unit, and the load.
        foreseen: the simulated value.
        measured: the server's value.
    """

    name: str
    foreseen: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the simulated value."""
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
    """Simulate latency under Poisson arrivals and the throughput of many clients, and measure both.

    The simulator is calibrated on loops of one and two clients. The loads run in turns, because the speed of a shared
    machine drifts.

    Args:
        url: the server's URL.
        bodies: bodies of requests for `plan` at the model's first size.
        pipeline: the model, with adapters as the server holds them.
        plan: the plan of the requests.
        prompted: images for `calibrate`.
        rate: requests per second of the Poisson arrivals.
        seconds: duration of the Poisson arrivals.
        deadline: seconds within which an answer counts for goodput.
        batch_tokens: the server's `max_batch_tokens`.

    Raises:
        ValueError: every request of a load failed.
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
