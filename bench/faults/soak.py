"""Use a server for long: images, streams, clients that go away, errors; and see whether anything grows.

Memory and open files of each process are sampled, and their slopes reported. In the end nothing may be left of any
request. Ends with an error if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

import httpx
import psutil

from bench.faults.answers import ask, requests
from bench.models import SCENES
from bench.results import add_output_argument, output_directory, positive, write_json
from bench.serving.load import connected
from bench.serving.servers import Running, servers, started, title_of

_PATH = "/v1/images/generations"
_CLIENTS = 4
_TIMEOUT_S = 110.0
_SAMPLE_PERIOD_S = 5.0
_GONE_AFTER_S = 0.1
_SETTLE_S = 60.0  # metrics are some seconds old
_EXPECTED = {"image", "stream", "gone", "error"}
# Of our own and Serve's: requests and images under way and in queues.
_GAUGES = (
    "ray_images_waiting",
    "ray_images_in_stage",
    "ray_serve_replica_processing_queries",
    "ray_serve_deployment_queued_queries",
)
_BARS = {"mib_per_hour": 64.0, "files_per_hour": 20.0}  # of a process, from the first third of the time on


@dataclass(frozen=True)
class Sample:
    """What a process had at a time, in seconds of the monotonic clock."""

    at: float
    mib: float
    files: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--minutes", type=positive, default=30.0)
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    output = output_directory(arguments)
    with started(servers(SCENES)[0], SCENES) as running:
        report = asyncio.run(_use(running, 60.0 * arguments.minutes))
    write_json(output / "soak.json", report)
    misses = []
    for process in report["processes"]:
        print(
            f"{process['name']:50} {process['mib']:7.1f} MiB {process['mib_per_hour']:+8.1f} an hour, "
            f"{process['files']:4d} files {process['files_per_hour']:+6.1f} an hour"
        )
        misses += [f"{process['name']}: {key} {process[key]}" for key, bar in _BARS.items() if process[key] > bar]
    print(report["outcomes"])
    if report["failed"]:
        misses.append(f"{report['failed']} requests failed")
    if report["left"]:
        misses.append(f"left of requests: {report['left']}")
    if misses:
        sys.exit("; ".join(misses))


async def _use(running: Running, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    outcomes: Counter[str] = Counter()
    async with asyncio.TaskGroup() as group:
        for number in range(_CLIENTS):
            group.create_task(_send(running, deadline, number, outcomes))
        group.create_task(_sample(running, deadline, samples))
    begin = deadline - seconds * 2 / 3  # what is loaded on first use is loaded by then
    processes = [
        {"name": name, "mib": round(found[-1].mib, 1), "files": found[-1].files, **_slopes(found)}
        for (name, _), all_of in sorted(samples.items())
        if len(found := [sample for sample in all_of if sample.at > begin]) > 2
    ]
    return {
        "minutes": seconds / 60,
        "outcomes": dict(outcomes),
        "failed": sum(count for outcome, count in outcomes.items() if outcome not in _EXPECTED),
        "left": await asyncio.to_thread(_left, running),
        "processes": processes,
    }


async def _send(running: Running, deadline: float, client_number: int, outcomes: Counter[str]) -> None:
    """Send one request after the other, of each way in turn, and count what becomes of them."""
    async with connected(running.url) as client:
        for turn, request in enumerate(requests(_TIMEOUT_S)):
            if time.monotonic() > deadline:
                return
            way = _WAYS[turn % len(_WAYS)]
            outcomes[await way(client, {**request, "seed": 1_000_000 * client_number + turn})] += 1


async def _image(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    answer = await ask(client, request["seed"], request)
    return f"{answer.status} {answer.error}" if answer.error else "image"


async def _stream(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    answer = await client.post(_PATH, json={**request, "stream": True, "partial_images": 2})
    return "stream" if "event: image_generation.completed" in answer.text else answer.text[-200:]


async def _leave(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    """Go away while the image is made."""
    try:
        async with asyncio.timeout(_GONE_AFTER_S):
            answer = await client.post(_PATH, json={**request, "plan": "base"})
    except TimeoutError:
        return "gone"
    return f"{answer.status_code} too early"


async def _err(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    answer = await client.post(_PATH, json={**request, "plan": "none"})
    return "error" if answer.status_code == 400 else str(answer.status_code)


_WAYS = (_image, _image, _stream, _image, _leave, _image, _err)


async def _sample(running: Running, deadline: float, samples: dict[tuple[str, int], list[Sample]]) -> None:
    """Sample each of the server's processes until the deadline."""
    while time.monotonic() < deadline:
        for process in await asyncio.to_thread(running.processes):
            with suppress(psutil.Error):  # it ends
                title = title_of(process)
                name = title if title.startswith("ray::") else process.name()
                mib = process.memory_info().rss / 2**20
                samples[name, process.pid].append(Sample(time.monotonic(), mib, process.num_fds()))
        await asyncio.sleep(_SAMPLE_PERIOD_S)


def _slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Fit lines to what a process had."""
    hours = [sample.at / 3600 for sample in samples]
    return {
        "mib_per_hour": round(linear_regression(hours, [each.mib for each in samples]).slope, 2),
        "files_per_hour": round(linear_regression(hours, [float(each.files) for each in samples]).slope, 2),
    }


def _left(running: Running) -> dict[str, float]:
    """Return gauges of what requests leave behind that are not zero, once they had the time to become so."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        lines = {gauge: running.metrics(gauge) for gauge in _GAUGES}
        if missing := [gauge for gauge, found in lines.items() if not found]:
            raise RuntimeError(f"the server does not tell {', '.join(missing)}")
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for found in lines.values() for line in found}
        left = {name: value for name, value in values.items() if value}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)
