"""Change a server under steady load by `serve deploy`: an update that replaces all replicas, fewer of them, and more.

The server stands on a head and two nodes on this machine, with two replicas of each deployment. The same requests are
sent twice, without changes and with them. Ends with an error if a request is not answered with the image that it got
without changes.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.faults.answers import Answer, Figures, ask, different, lost, requests, steadily
from bench.faults.site import standing, with_replicas
from bench.results import add_output_argument, output_directory, positive, write_json
from bench.serving.load import connected
from bench.serving.servers import Running

_NODES = 2
_TIMEOUT_S = 110.0
_CHANGE_S = 600.0  # that a change may take
_POLL_S = 0.5

Config = dict[str, Any]


def _update(config: Config) -> Config:
    """Change what all replicas are made from."""
    config = copy.deepcopy(config)
    config["applications"][0]["args"] |= {"checkpoint_steps": 5, "stall_timeout_s": 29.0}
    return config


# In this order, each on top of those before it.
_CHANGES: dict[str, Callable[[Config], Config]] = {
    "an update of all": _update,
    "one replica of each": partial(with_replicas, count=1),
    "two replicas of each": partial(with_replicas, count=2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--rate", type=positive, default=0.5, help="requests a second")
    parser.add_argument("--still", type=positive, default=10.0, help="seconds before the first change and after each")
    parser.add_argument("--changes", nargs="+", choices=_CHANGES, default=list(_CHANGES))
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    output = output_directory(arguments)
    with standing(_NODES) as site, tempfile.TemporaryDirectory() as directory:
        changed, changes = asyncio.run(_change(site.running, Path(directory), arguments))
        sent = list(islice(requests(_TIMEOUT_S), len(changed)))
        unchanged = asyncio.run(steadily(site.running.url, sent, arguments.rate))
    missing = lost(changed)
    others = different(changed, unchanged)
    report = {
        "rate": arguments.rate,
        "changes": changes,
        "changed": Figures.of(changed).rounded(),
        "unchanged": Figures.of(unchanged).rounded(),
        "lost": missing,
        "different": others,
    }
    write_json(output / "rollout.json", report)
    for key, value in report.items():
        print(f"{key:10} {value}")
    if missing or others:
        sys.exit(f"{len(missing)} requests without an image, {len(others)} with another one")


async def _change(
    running: Running, directory: Path, arguments: argparse.Namespace
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Return the answers to requests from before the first change to after the last, and what was changed when."""
    config = running.config
    assert config
    over = asyncio.Event()
    load = asyncio.create_task(_until(over, running.url, arguments.rate))
    changes = []
    start = time.monotonic()
    await asyncio.sleep(arguments.still)
    for name in arguments.changes:
        config = _CHANGES[name](config)
        begin = time.monotonic()
        print(f"{begin - start:6.1f} s  {name}", flush=True)
        await asyncio.to_thread(_deploy, running, config, directory)
        changes.append({"name": name, "at": round(begin - start, 1), "seconds": round(time.monotonic() - begin, 1)})
        await asyncio.sleep(arguments.still)
    over.set()
    return await load, changes


async def _until(over: asyncio.Event, url: str, rate: float) -> list[Answer]:
    """Send requests, `rate` of them a second, until it is over."""
    asked: list[asyncio.Task[Answer]] = []
    start = time.monotonic()
    async with connected(url) as client:
        for number, request in enumerate(requests(_TIMEOUT_S)):
            await asyncio.sleep(start + number / rate - time.monotonic())
            if over.is_set():
                break
            asked.append(asyncio.create_task(ask(client, number, request)))
        return list(await asyncio.gather(*asked))


def _deploy(running: Running, config: Config, directory: Path) -> None:
    """Deploy a config on the running server, and wait until it is there."""
    path = directory / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path), "--address", running.dashboard]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    deadline = time.monotonic() + _CHANGE_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)  # by HTTP, since each `serve status` would take seconds of a core
        status = httpx.get(f"{running.dashboard}/api/serve/applications/", timeout=30).raise_for_status().json()
        application = status["applications"][config["applications"][0]["name"]]
        if application["status"] == "RUNNING":
            return
    raise TimeoutError(f"not done after {_CHANGE_S:g} s: {application['status']} {application['message']}")
