"""Overhead of a server: its latency relative to that of the same work in one process."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from bench.serving.calibrate import REPLICA_THREADS, threads
from bench.serving.load import closed_loop
from bench.serving.traffic import body
from stages.image import parse_size
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan


@dataclass(frozen=True)
class Overhead:
    """Latency of a server at concurrency 1; medians in seconds.

    Attributes:
        server: name of the server.
        size: `WIDTHxHEIGHT` in pixels.
        latency: latency of a request.
        bare: the same work in one process, with the one thread of a replica.
        bare_all_cores: the same with a thread per core.
    """

    server: str
    size: str
    latency: float
    bare: float
    bare_all_cores: float

    @property
    def ratio(self) -> float:
        """Latency relative to `bare`."""
        return self.latency / self.bare


def overheads(
    server: str, url: str, pipeline: Pipeline, plan: Plan, prompted: Sequence[Prompted]
) -> Iterator[Overhead]:
    """Measure a server's overhead at the model's first size and at its largest, with requests and local runs in turns.

    Args:
        server: name of the server.
        url: its URL.
        pipeline: the model, with adapters as the server holds them.
        plan: the server's default plan.
        prompted: images to generate both ways; the first two are a warm-up.

    Raises:
        RuntimeError: a request failed.
    """
    sizes = pipeline.config.sizes
    for size in (sizes[0], max(sizes, key=lambda size: prod(parse_size(size)))):
        latencies, bare, every_core = [], [], []
        for one in prompted:
            (sent,) = asyncio.run(closed_loop(url, [{**body(one), "size": size}], 1, 1))
            if sent.error:
                raise RuntimeError(f"{server}: {sent.error}")
            latencies.append(sent.latency)
            bare.append(_seconds(pipeline, plan, one, size, REPLICA_THREADS))
            every_core.append(_seconds(pipeline, plan, one, size, os.cpu_count() or 1))
        yield Overhead(server, size, *(statistics.median(times[2:]) for times in (latencies, bare, every_core)))


def _seconds(pipeline: Pipeline, plan: Plan, prompted: Prompted, size: str, thread_count: int) -> float:
    with threads(thread_count):
        (result,) = pipeline.run_batch(plan, [prompted], size)
    return sum(span.end - span.start for span in result.spans)
