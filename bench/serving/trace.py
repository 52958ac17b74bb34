"""Send concurrent requests to a server and write a Chrome trace of its stages.

`python -m bench trace --requests 8 trace.json` writes a file that chrome://tracing and ui.perfetto.dev can open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from deployments.settings import SERVED_STAGES


def chrome_trace(images: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return a trace in Chrome's Trace Event Format: a row for each stage, with a slice for each image in it.

    Args:
        images: entries of `data` in the API's answers.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": stage}}
        for row, stage in enumerate(SERVED_STAGES)
    ]
    for number, image in enumerate(images):
        for timing in image["timings"]:
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": SERVED_STAGES.index(timing["stage"]),
                    "name": f"image {number}",
                    "ts": 1e6 * timing["start"],
                    "dur": 1e6 * (timing["end"] - timing["start"]),
                    "args": {"seed": image["seed"], "nfe": timing["nfe"]},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def most_busy(images: Iterable[dict[str, Any]]) -> int:
    """Return the largest number of stages that were busy at the same time."""
    edges = []
    for image in images:
        for timing in image["timings"]:
            edges += [(timing["start"], 1, timing["stage"]), (timing["end"], -1, timing["stage"])]
    working = dict.fromkeys(SERVED_STAGES, 0)
    most = 0
    for _, change, stage in sorted(edges):
        working[stage] += change
        most = max(most, sum(count > 0 for count in working.values()))
    return most


async def send(url: str, requests: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send concurrent requests, with the seeds 0, 1, ..., and return their images as the API does.

    Raises:
        httpx.HTTPError: a request failed.
    """
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/images/generations", json={**body, "seed": seed}) for seed in range(requests))
        )
    for answer in answers:
        answer.raise_for_status()
    return [image for answer in answers for image in answer.json()["data"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", default="a red star")
    parser.add_argument("--plan", default="hybrid")


def run(arguments: argparse.Namespace) -> None:
    """Send the requests, write the trace, and print how many stages were busy at the same time."""
    body = {"prompt": arguments.prompt, "plan": arguments.plan}
    images = asyncio.run(send(arguments.url, arguments.requests, body))
    arguments.output.write_text(json.dumps(chrome_trace(images)))
    print(f"{len(images)} images; at most {most_busy(images)} stages at work at one time; trace in {arguments.output}")
