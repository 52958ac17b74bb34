"""This engine under load over HTTP, beside what a user would run without it, on the same machine in one run.

Rivals: diffusers' base model behind FastAPI, and a monolithic Ray Serve deployment that runs the same hybrid plan.
Each server in turn is started, warmed up, and driven by a closed loop at several concurrencies; then this engine and
the monolith by an open loop (Poisson arrivals) at 70 % of the monolith's saturation. The overhead is this engine's
latency at concurrency 1 over the bare sum of encoding, network evaluations and decoding in one process, with the
adapters as the server holds them and as many threads as a replica has; the same sum with a thread a core is reported
beside it. Requests and bare images take turns, since a shared machine has slow minutes. What does not grow with the
work weighs most on a small image, so that a large one is measured as well. Last, the simulator (`cluster.simulate`)
must foresee what the spread stages do (`bench.serving.forecast`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends import get_backend
from bench.machine import machine_name
from bench.models import SCENES
from bench.results import add_output_argument, output_directory, write_json
from bench.serving.forecast import Forecast, forecasts
from bench.serving.load import LoadFigures, closed_loop, figures, open_loop
from bench.serving.overhead import Overhead, overheads
from bench.serving.servers import COLOCATED, MONOLITH, SPREAD, Running, Server, servers, started
from bench.serving.traffic import body, mixed, vary
from bench.spread import SpreadPipeline
from scenes.cases import DEV, Cases
from stages.config import ModelConfig
from stages.pipeline import Pipeline

_SATURATION = 0.7  # of the monolith's throughput, for the open loop
_OPEN_LOOP = 6  # times as long as a closed one: its tail is what counts


@dataclass(frozen=True)
class Row:
    """One server at one load; `load` is `concurrency N` or `N a second`."""

    server: str
    load: str
    figures: LoadFigures
    memory: int


class Comparison:
    """Measures server after server on the same requests, and prints as it goes.

    Attributes:
        rows, overheads, forecasts: what was measured.
    """

    def __init__(self, model: Path, concurrencies: Sequence[int], seconds: float, deadline: float) -> None:
        """Args: as the command's."""
        config, backend = ModelConfig.read(model), get_backend("cpu")
        self.rows: list[Row] = []
        self.overheads: list[Overhead] = []
        self.forecasts: list[Forecast] = []
        self._model = model
        self._concurrencies = concurrencies
        self._seconds = seconds
        self._deadline = deadline
        self._plan = config.plan("hybrid")
        self._pipelines = {SPREAD: SpreadPipeline(config, backend), COLOCATED: Pipeline(config, backend)}
        self._sizes = config.sizes
        self._prompted = mixed(Cases.read(DEV))
        self._requests = [body(case) for case in self._prompted]
        self._rate = 0.0

    def run(self) -> None:
        for server in reversed(servers(self._model)):  # the monolith tells the rate of the open loops
            with started(server, self._model) as running:
                self._closed_loops(server, running)
                if server.name == MONOLITH:
                    throughputs = [row.figures.throughput for row in self.rows if row.server == MONOLITH]
                    self._rate = _SATURATION * max(throughputs)
                if server.name in self._pipelines:
                    self._compare_with_bare(server, running)
                if not server.slow:
                    count = round(self._rate * self._seconds * _OPEN_LOOP)
                    sent = asyncio.run(open_loop(running.url, self._requests, self._rate, count))
                    self._record(server, running, f"{self._rate:.2f} a second", figures(sent, self._deadline))
                if server.name == SPREAD:
                    self._forecast(server, running.url)

    def _closed(self, url: str, bodies: Sequence[dict[str, Any]], concurrency: int, count: int) -> LoadFigures:
        return figures(asyncio.run(closed_loop(url, bodies, concurrency, count)), self._deadline)

    def _closed_loops(self, server: Server, running: Running) -> None:
        """One for each concurrency, after one to warm up; each as long as the throughput before makes it."""
        made = self._closed(running.url, self._requests, 2, 4 if server.slow else 24)
        for concurrency in [1, 8] if server.slow else sorted({1, *self._concurrencies}):
            count = max(concurrency * 2, 4, round(made.throughput * self._seconds))
            made = self._closed(running.url, self._requests, concurrency, count)
            self._record(server, running, f"concurrency {concurrency}", made)

    def _compare_with_bare(self, server: Server, running: Running) -> None:
        pipeline = self._pipelines[server.name]
        for overhead in overheads(server.name, running.url, pipeline, self._plan, self._prompted[:18]):
            self.overheads.append(overhead)
            print(f"{overhead}, {overhead.ratio:.2f}x", flush=True)
        varied = vary(self._requests, self._sizes)
        made = self._closed(running.url, varied, 8, 4 * len(varied))
        self._record(server, running, "concurrency 8, mixed plans and sizes", made)

    def _forecast(self, server: Server, url: str) -> None:
        (application,) = (server.config or {})["applications"]
        for forecast in forecasts(
            url,
            self._requests,
            self._pipelines[server.name],
            self._plan,
            self._prompted,
            rate=self._rate,
            seconds=self._seconds * _OPEN_LOOP,
            deadline=self._deadline,
            batch_tokens=application["args"]["placement"]["Base"]["max_batch_tokens"],
        ):
            self.forecasts.append(forecast)
            print(f"{forecast}, {forecast.error:+.0%}", flush=True)

    def _record(self, server: Server, running: Running, load: str, made: LoadFigures) -> None:
        self.rows.append(Row(server.name, load, made, running.resident_memory()))
        print(
            f"{server.name}, {load}: {made.throughput:.2f} images/s, p50 {made.p50:.3f}, p95 {made.p95:.3f}, "
            f"p99 {made.p99:.3f} s, goodput {made.goodput:.2f}/s, {made.failed} failed",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help=f"of each closed loop, about; the open one takes {_OPEN_LOOP} times as long",
    )
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, for goodput")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    output = output_directory(arguments)
    comparison = Comparison(arguments.config.resolve(), arguments.concurrencies, arguments.seconds, arguments.deadline)
    comparison.run()
    content = {
        "machine": machine_name(),
        "overheads": [{**asdict(overhead), "ratio": overhead.ratio} for overhead in comparison.overheads],
        "rows": [asdict(row) for row in comparison.rows],
        "forecasts": [{**asdict(forecast), "error": forecast.error} for forecast in comparison.forecasts],
    }
    write_json(output / "serving.json", content)
