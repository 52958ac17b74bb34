"""Send a server several times as much as it can do, and see what it still does.

First clients that wait for their answers find out what the server can do, and once more in the end. In between requests
come without waiting, a multiple of that, each of which may take some seconds; probes ask for `/readyz` meanwhile.
Goodput is what is answered with an image in time. Ends with an error if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from bench.faults.answers import Answer, ask, counts, requests, steadily
from bench.models import SCENES
from bench.results import add_output_argument, output_directory, positive, write_json
from bench.serving.load import connected, go_first
from bench.serving.servers import Running, servers, started

_CLIENTS = 24  # that saturate the server
_WARM_UP_S = 10.0
_TIMEOUT_S = 110.0  # of a request while there is not too much
_PROBE_PERIOD_S = 0.5
_PROBES_A_LOOK = 10
_RECOVERY_S = 120.0
_BARS = {"goodput": 0.9, "refused_p50_s": 0.1, "probe_p50_s": 0.1}  # the first as a share of what it can do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--seconds", type=positive, default=120.0, help="of too much load")
    parser.add_argument("--saturation-seconds", type=positive, default=40.0, help="to find out what the server can do")
    parser.add_argument("--times", type=positive, default=5.0, help="how many times as much as that")
    parser.add_argument("--timeout", type=positive, default=20.0, help="seconds that a request may take")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    output = output_directory(arguments)
    with started(servers(SCENES)[0], SCENES) as running:
        report = asyncio.run(_load(running, arguments))
    write_json(output / "overload.json", report)
    for key, value in report.items():
        print(f"{key:18} {value}")
    misses = [
        f"{key} {report[key]} is past {bar}"
        for key, bar in _BARS.items()
        if (report[key] / report["saturation"] < bar if key == "goodput" else report[key] > bar)
    ]
    if report["late"]:
        misses.append(f"{report['late']} were admitted and not done in time")
    if misses:
        sys.exit("; ".join(misses))


async def _load(running: Running, arguments: argparse.Namespace) -> dict[str, Any]:
    client_first = go_first()
    await _saturate(running, _WARM_UP_S)
    idle = await _latency(running)
    saturation = await _saturate(running, arguments.saturation_seconds)
    memory = running.resident_memory()
    rate = arguments.times * saturation
    sent = list(itertools.islice(requests(arguments.timeout), round(rate * arguments.seconds)))
    start = time.monotonic()
    load = asyncio.create_task(steadily(running.url, sent, rate))
    probes, peak = await _watch(running, load)
    answers = await load
    memory_after = running.resident_memory()
    recovery = await _recover(running, 2 * idle)
    afterwards = await _saturate(running, arguments.saturation_seconds)
    images = [answer.latency for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 503]
    late = [answer for answer in answers if answer.status not in (200, 503)]
    return {
        "client_first": client_first,
        "saturation": round((saturation + afterwards) / 2, 3),
        "sent_per_s": round(rate, 3),
        "timeout_s": arguments.timeout,
        "answers": counts(answers),
        "late": len(late) + sum(latency > arguments.timeout for latency in images),
        "goodput": round(_goodput(answers, start, arguments.seconds, arguments.timeout), 3),
        "images_p50_s": _percentile(images, 50),
        "images_p99_s": _percentile(images, 99),
        "refused_p50_s": _percentile([answer.latency for answer in refused], 50),
        "refused_p99_s": _percentile([answer.latency for answer in refused], 99),
        "retry_after_p50_s": _percentile([answer.retry_after_s or 0.0 for answer in refused], 50),
        "retry_after_p99_s": _percentile([answer.retry_after_s or 0.0 for answer in refused], 99),
        "probe_p50_s": _percentile(probes, 50),
        "probe_p99_s": _percentile(probes, 99),
        "memory_before": memory,
        "memory_peak": peak,
        "memory_after": memory_after,
        "recovery_s": round(recovery, 1),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 3) if values else 0.0


def _goodput(answers: Sequence[Answer], start: float, seconds: float, timeout_s: float) -> float:
    """Images a second that came in time while there was too much, without the time that the first ones need."""
    begin, end = start + seconds / 4, start + seconds
    return sum(answer.status == 200 and begin < answer.end <= end for answer in answers) / (end - begin)


async def _saturate(running: Running, seconds: float) -> float:
    """Images a second of clients that each wait for an answer before they send the next request."""
    sent = requests(_TIMEOUT_S)
    ends: list[float] = []
    start = time.monotonic()
    async with connected(running.url) as client:

        async def one() -> None:
            while time.monotonic() < start + seconds:
                request = next(sent)
                answer = await ask(client, request["seed"], request)
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status} {answer.error} before there was too much")
                ends.append(answer.end)

        await asyncio.gather(*(one() for _ in range(_CLIENTS)))
    begin, end = start + seconds / 4, start + seconds
    return sum(begin < each <= end for each in ends) / (end - begin)


async def _latency(running: Running) -> float:
    """Seconds that one image takes; infinite if there is none."""
    async with connected(running.url) as client:
        answer = await ask(client, 0, next(requests(_TIMEOUT_S)))
        return answer.latency if answer.status == 200 else math.inf


async def _recover(running: Running, latency: float) -> float:
    """Seconds until an image takes no longer than that; raises TimeoutError."""
    start = time.monotonic()
    async with asyncio.timeout(_RECOVERY_S):
        while await _latency(running) > latency:
            await asyncio.sleep(0.2)
    return time.monotonic() - start


async def _watch(running: Running, load: asyncio.Task[list[Answer]]) -> tuple[list[float], int]:
    """Return the seconds of probes while the load lasts, and the most bytes of memory."""
    probes, peak = [], 0
    async with httpx.AsyncClient(base_url=running.url, timeout=30.0) as client:
        for number in itertools.count():
            if load.done():
                break
            start = time.monotonic()
            answer = await client.get("/readyz")
            probes.append(time.monotonic() - start)
            answer.raise_for_status()
            if number % _PROBES_A_LOOK == 0:  # at memory, which takes some of the processor's time
                peak = max(peak, await asyncio.to_thread(running.resident_memory))
            await asyncio.sleep(_PROBE_PERIOD_S)
    return probes, peak
