"""Disturb a server under steady load: processes and a node are killed, stopped and slowed, object stores are filled.

The server stands on a head and two nodes on this machine, each of which has a replica of each deployment. The same
requests are sent twice, without faults and with them. Ends with an error if a request is not answered with the image
that it got without faults.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import httpx

from bench.faults.answers import Answer, Figures, different, lost, requests, steadily
from bench.faults.faults import FAULTS
from bench.faults.site import Site, standing
from bench.results import add_output_argument, output_directory, positive, write_json

_NODES = 2
_TIMEOUT_S = 110.0
_RECOVERY_S = 120.0


@dataclass(frozen=True)
class Struck:
    """A fault that befell the server.

    Attributes:
        name: its name.
        at: seconds from the first request.
        seconds: how long it lasted.
    """

    name: str
    at: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rate", type=positive, default=1.0, help="requests a second")
    parser.add_argument("--faults", type=int, default=24, help="how many, at equal distances")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), help="which ones, in turns")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the kinds, and of what is hit")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    output = output_directory(arguments)
    with standing(_NODES, apart=True) as site:
        undisturbed, disturbed, struck, recovery = asyncio.run(_compare(site, arguments))
    missing = lost(disturbed)
    others = different(disturbed, undisturbed)
    report = {
        "requests": arguments.requests,
        "rate": arguments.rate,
        "faults": [
            {
                "name": each.name,
                "at": round(each.at, 1),
                "seconds": round(each.seconds, 1),
                "longest": round(_longest(each, disturbed), 2),
            }
            for each in struck
        ],
        "undisturbed": Figures.of(undisturbed).rounded(),
        "disturbed": Figures.of(disturbed).rounded(),
        "lost": missing,
        "different": others,
        "recovery_s": round(recovery, 1),
    }
    write_json(output / "chaos.json", report)
    _print(report)
    if missing or others:
        sys.exit(f"{len(missing)} requests without an image, {len(others)} with another one")


async def _compare(site: Site, arguments: argparse.Namespace) -> tuple[list[Answer], list[Answer], list[Struck], float]:
    """Return the answers without faults and with them, the faults, and the seconds until all replicas are back."""
    sent = list(islice(requests(_TIMEOUT_S), arguments.requests))
    undisturbed = await steadily(site.running.url, sent, arguments.rate)
    # In a thread of its own: the start of a node takes seconds, and must be where signals are handled.
    load = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(steadily(site.running.url, sent, arguments.rate))))
    struck = await _strike(site, arguments, over_s=arguments.requests / arguments.rate)
    disturbed = await load
    start = time.monotonic()
    await asyncio.to_thread(_wait_until_whole, site)
    return undisturbed, disturbed, struck, time.monotonic() - start


def _longest(fault: Struck, answers: Sequence[Answer]) -> float:
    """Longest latency in seconds of the requests that were under way when a fault began."""
    begin = min(answer.sent for answer in answers)
    return max((each.latency for each in answers if each.sent - begin <= fault.at < each.end - begin), default=0.0)


async def _strike(site: Site, arguments: argparse.Namespace, over_s: float) -> list[Struck]:
    chance = random.Random(arguments.seed)
    names = list(islice(cycle(chance.sample(arguments.kinds, len(arguments.kinds))), arguments.faults))
    start = time.monotonic()

    async def one(number: int, name: str) -> Struck:
        await asyncio.sleep((number + 0.5) * over_s / len(names))
        begin = time.monotonic()
        print(f"{begin - start:6.1f} s  {name}", flush=True)
        await FAULTS[name](site, random.Random(f"{arguments.seed} {number}"))
        return Struck(name, begin - start, time.monotonic() - begin)

    return list(await asyncio.gather(*(one(number, name) for number, name in enumerate(names))))


def _wait_until_whole(site: Site) -> None:
    """Wait until each deployment has its two replicas again; raises TimeoutError."""
    deadline = time.monotonic() + _RECOVERY_S
    while time.monotonic() < deadline:
        answer = httpx.get(f"{site.running.url}/readyz", timeout=10)
        if answer.status_code == 200 and set(answer.json()["replicas"].values()) == {2}:
            return
        time.sleep(0.2)
    raise TimeoutError(f"after {_RECOVERY_S:g} s: {answer.text}")


def _print(report: dict[str, Any]) -> None:
    for name in ("undisturbed", "disturbed"):
        figures = report[name]
        print(
            f"{name:12} {figures['answers']}, p50 {figures['p50']:.2f} s, p99 {figures['p99']:.2f} s, "
            f"longest {figures['longest']:.2f} s, longest gap {figures['gap']:.2f} s"
        )
    for fault in report["faults"]:
        print(f"{fault['at']:6.1f} s  {fault['name']:24} longest of those under way {fault['longest']:.2f} s")
    print(f"{len(report['faults'])} faults; all replicas back {report['recovery_s']:.1f} s after the last answer")
