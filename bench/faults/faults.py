"""What can befall a server; each coroutine returns when it is over, and runs where signals are handled."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import psutil

from bench.faults.site import Site

Fault = Callable[[Site, random.Random], Awaitable[None]]

STAGES = ("TextEncoder", "Base", "Bridge", "Distilled", "VAEDecoder")
_STOPPED_S = 20.0
_AWAY_S = 10.0  # of a node
_FULL_S = 10.0
_START_S = 110.0  # that a process of its own may need on busy cores
_SLICE_S = 0.1  # of a slowed process
_RUNS = 0.25  # share of each slice


async def _one_of(list_processes: Callable[[], Sequence[psutil.Process]], chance: random.Random) -> psutil.Process:
    """Choose a process, as soon as there is one: an earlier fault may have ended them all. Raises TimeoutError."""
    async with asyncio.timeout(_START_S):
        while not (processes := list_processes()):
            await asyncio.sleep(0.5)
        return chance.choice(processes)


def _kill(deployment: str) -> Fault:
    async def strike(site: Site, chance: random.Random) -> None:
        (await _one_of(lambda: site.replicas(deployment), chance)).kill()

    return strike


def _stop(deployment: str) -> Fault:
    async def strike(site: Site, chance: random.Random) -> None:
        process = await _one_of(lambda: site.replicas(deployment), chance)
        process.suspend()
        await asyncio.sleep(_STOPPED_S)
        with suppress(psutil.NoSuchProcess):
            process.resume()

    return strike


def _slow(deployment: str) -> Fault:
    """Let a deployment's replicas run for a share of the time alone."""

    async def strike(site: Site, chance: random.Random) -> None:
        processes, deadline = site.replicas(deployment), time.monotonic() + _STOPPED_S
        while time.monotonic() < deadline:
            for name, seconds in ((signal.SIGSTOP, _SLICE_S * (1 - _RUNS)), (signal.SIGCONT, _SLICE_S * _RUNS)):
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(name)
                await asyncio.sleep(seconds)

    return strike


async def _kill_controller(site: Site, chance: random.Random) -> None:
    (await _one_of(site.controllers, chance)).kill()


async def _kill_node(site: Site, chance: random.Random) -> None:
    """Kill a node with all that runs there, and add another one a while later."""
    site.cluster.remove_node(chance.choice(list(site.cluster.worker_nodes)), allow_graceful=False)
    await asyncio.sleep(_AWAY_S)
    site.add_node()


async def _fill_stores(site: Site, chance: random.Random) -> None:
    """Fill the object store of every node with what cannot leave it."""
    command = [sys.executable, "-m", "bench.faults.fill", site.cluster.address, str(_FULL_S)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    async with asyncio.timeout(_FULL_S + _START_S):
        if status := await process.wait():
            raise RuntimeError(f"{' '.join(command)} ended with {status}")


FAULTS: Mapping[str, Fault] = {
    **{f"kill {deployment}": _kill(deployment) for deployment in (*STAGES, "Ingress")},
    "kill the controller": _kill_controller,
    "kill a node": _kill_node,
    "fill the object stores": _fill_stores,
    "stop Base": _stop("Base"),
    "stop Distilled": _stop("Distilled"),
    "slow Base": _slow("Base"),
}
