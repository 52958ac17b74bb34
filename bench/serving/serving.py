"""Load this engine and its alternatives over HTTP, one after the other on the same machine.

The alternatives are diffusers' base model behind FastAPI, and a monolithic Ray Serve deployment that runs the same
hybrid plan. Each server is started, warmed up, and loaded by a closed loop at several concurrencies. This engine and
the monolith are then loaded by an open loop (Poisson arrivals) at 70 % of the monolith's saturation throughput.

The overhead is this engine's latency at concurrency 1, relative to the sum of encoding, network evaluations and
decoding in one process, with the same adapters and number of threads as a replica. The sum with a thread per core is
reported as well. Requests and local runs alternate, because the speed of a shared machine drifts. Costs that do not
depend on the size of an image weigh most on a small one, so a large one is measured too.

Last, the spread deployments' figures are compared with the simulator's (`cluster.simulate`); see
`bench.serving.forecast`.
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
_OPEN_LOOP = 6  # times as long as a closed loop, because its tail latency is of interest


@dataclass(frozen=True)
class Row:
    """Figures of one server under one load.

    Attributes:
        server: name of the server.
        load: such as `concurrency 8` or `1.50 a second`.
        figures: the figures.
        memory: resident bytes of its processes after the run.
    """

    server: str
    load: str
    figures: LoadFigures
    memory: int


class Comparison:
    """Measures the servers one after the other on the same requests, and prints each result.

    Attributes:
        rows: figures by server and load.
        overheads: overhead of this engine.
        forecasts: figures of the spread deployments, simulated and measured.
    """

    def __init__(self, model: Path, concurrencies: Sequence[int], seconds: float, deadline: float) -> None:
        """Load the model for the local runs.

        Args:
            model: path of the model's config.
            concurrencies: numbers of clients of the closed loops.
            seconds: duration of a closed loop, roughly.
            deadline: seconds within which an answer counts for goodput.
        """
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
        """Start and measure every server; raises RuntimeError if one does not start."""
        for server in reversed(servers(self._model)):  # the monolith's throughput sets the rate of the open loops
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
        """Run a loop at each concurrency, after a warm-up; the throughput before gives its number of requests."""
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
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help=f"approximate duration of each closed loop; the open loop takes {_OPEN_LOOP} times as long",
    )
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds within which an answer counts for goodput")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Compare the servers and write `serving.json`."""
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
