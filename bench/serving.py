"""This engine under load over HTTP, beside what a user would run without it, on the same machine in one run.

Rivals: diffusers' base model behind FastAPI, and a monolithic Ray Serve deployment that runs the same hybrid plan.
Each server in turn is started, warmed up, and driven by a closed loop at several concurrencies; then this engine and
the monolith by an open loop (Poisson arrivals) at 70 % of the monolith's saturation. The overhead is this engine's
latency at concurrency 1 over the bare sum of encoding, network evaluations and decoding in one process, with the
adapters as the server holds them and as many threads as a replica has; the same sum with a thread a core is reported
beside it. Requests and bare images take turns, since a shared machine has slow minutes. What does not grow with the
work weighs most on a small image, so that a large one is measured as well. Last, the simulator (`cluster.simulate`)
must foresee what the spread stages do (`bench.forecast`).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from backends import get_backend
from bench.calibrate import REPLICA_THREADS, threads
from bench.cases import Cases
from bench.forecast import Forecast, forecasts
from bench.load import LoadFigures, closed_loop, figures, open_loop
from bench.machine import machine_name
from bench.results import add_output_argument, output_directory, write_json
from bench.spread import SpreadPipeline
from stages.model import ModelConfig, parse_size
from stages.pipeline import Pipeline, Prompted
from stages.plan import presets

ROOT = Path(__file__).parent.parent
SPREAD, COLOCATED = "three stages, spread", "three stages, co-located"
_START_TIMEOUT = 300.0  # seconds
_SATURATION = 0.7  # of the monolith's throughput, for the open loop
_OPEN_LOOP = 3  # times as long as a closed one: its tail is what counts
_FORECAST = 6  # and to compare with a simulated tail


@dataclass(frozen=True)
class Server:
    """How to start one.

    Attributes:
        command: with `{port}` and `{config}` to be filled in.
        config: of `serve run`, if it takes a file.
        slow: seconds an image are so many that only a few requests are sent.
    """

    name: str
    command: tuple[str, ...]
    config: dict[str, Any] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Row:
    """One server at one load; `load` is `concurrency N` or `N a second`."""

    server: str
    load: str
    figures: LoadFigures
    memory: int


@dataclass(frozen=True)
class Overhead:
    """Of a server at concurrency 1, in seconds.

    Attributes:
        bare, bare_all_cores: the same work in one process, with a replica's one thread and with a thread a core.
    """

    server: str
    size: str
    latency: float
    bare: float
    bare_all_cores: float

    @property
    def ratio(self) -> float:
        return self.latency / self.bare


def colocated(config: dict[str, Any]) -> dict[str, Any]:
    """`serve_config.yaml` with all stages in one deployment, on one set of weights."""
    config = copy.deepcopy(config)
    (application,) = config["applications"]
    tokens = application["args"]["transformers"]["Base"]["max_batch_tokens"]
    stages = {"stages": ["base", "bridge", "distilled"], "max_batch_tokens": tokens}
    application["args"]["transformers"] = {"Transformer": stages}
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    transformer = {**deployments["Base"], "name": "Transformer"}
    application["deployments"] = [
        transformer,
        *(deployment for name, deployment in deployments.items() if name not in ("Base", "Bridge", "Distilled")),
    ]
    return config


def servers(model: Path) -> list[Server]:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"]["model"] = str(model)
    monolith = {
        "http_options": {"host": "127.0.0.1", "port": 0},
        "applications": [
            {
                "name": "monolith",
                "import_path": "bench.rivals.monolithic_serve:build",
                "args": {"model": str(model), "plan": "hybrid"},
                # It alone computes: a thread a core, where Ray's default is one.
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(os.cpu_count())}},
            }
        ],
    }
    uvicorn = (sys.executable, "-m", "uvicorn", "bench.rivals.diffusers_fastapi:app", "--port", "{port}")
    serve = (str(Path(sys.executable).with_name("serve")), "run", "{config}")
    return [
        Server(SPREAD, serve, config),
        Server(COLOCATED, serve, colocated(config)),
        Server("monolithic Ray Serve", serve, monolith),
        Server("diffusers behind FastAPI, base", uvicorn, slow=True),
    ]


@contextmanager
def started(server: Server, model: Path) -> Iterator[str]:
    """Run a server; its address. Raises RuntimeError with its log if it does not get ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as directory:
        path, log = Path(directory) / "serve.yaml", Path(directory) / "server.log"
        if server.config:
            config = copy.deepcopy(server.config)
            config["http_options"]["port"] = port
            path.write_text(yaml.safe_dump(config))
        command = [part.format(port=port, config=path) for part in server.command]
        environment = {**os.environ, "RIVAL_MODEL": str(model), "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} did not get ready:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)
            if server.config:
                ray = Path(sys.executable).with_name("ray")
                subprocess.run([str(ray), "stop", "--force"], check=False, capture_output=True)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def _memory() -> int:
    """Bytes resident in the server's own processes: those that hold a model or serve HTTP, without Ray's daemons."""
    total = 0
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") or "uvicorn" in title:
            total += process.memory_info().rss
    return total


def mixed(cases: Cases) -> list[Prompted]:
    """Prompts of several kinds, some with a negative one, in turn."""
    prompted = [*cases.negative[::4][:16], *cases.accuracy[:16], *cases.accuracy[-16:]]
    return [case for _, case in sorted(enumerate(prompted), key=lambda pair: pair[0] * 7 % len(prompted))]


def body(prompted: Prompted) -> dict[str, Any]:
    """Of a request."""
    made = {"prompt": prompted.prompt, "seed": prompted.seed}
    return made | ({"negative_prompt": prompted.negative_prompt} if prompted.negative_prompt else {})


def vary(requests: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Two of three by the hybrid plan, one by the distilled, without its negative prompt; sizes in turn."""
    varied = []
    for index, (request, size) in enumerate(zip(requests, itertools.cycle(sizes), strict=False)):
        plan = "distilled" if index % 3 == 2 else "hybrid"
        kept = {key: value for key, value in request.items() if plan == "hybrid" or key != "negative_prompt"}
        varied.append({**kept, "plan": plan, "size": size})
    return varied


class Bare:
    """The hybrid plan in one process, without a server."""

    def __init__(self, config: ModelConfig) -> None:
        backend = get_backend("cpu")
        self.plan = presets()["hybrid"].with_adapters(config.adapters)
        self.pipelines = {SPREAD: SpreadPipeline(config, backend), COLOCATED: Pipeline(config, backend)}
        self.sizes = config.sizes

    def overheads(self, server: str, url: str, prompted: Sequence[Prompted]) -> Iterator[Overhead]:
        """Of a running server, on the model's first size and on its largest.

        Args:
            prompted: drawn by either; the first two, to warm up, do not count.
        """
        for size in (self.sizes[0], max(self.sizes, key=lambda size: prod(parse_size(size)))):
            latencies, bare, every_core = [], [], []
            for one in prompted:
                (sent,) = asyncio.run(closed_loop(url, [{**body(one), "size": size}], 1, 1))
                if sent.error:
                    raise RuntimeError(f"{server}: {sent.error}")
                latencies.append(sent.latency)
                bare.append(self._seconds(server, one, size, REPLICA_THREADS))
                every_core.append(self._seconds(server, one, size, os.cpu_count() or 1))
            yield Overhead(server, size, *(statistics.median(times[2:]) for times in (latencies, bare, every_core)))

    def _seconds(self, server: str, prompted: Prompted, size: str, thread_count: int) -> float:
        with threads(thread_count):
            (result,) = self.pipelines[server].run_batch(self.plan, [prompted], size)
        return sum(span.end - span.start for span in result.spans)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "scenes.yaml")
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
    model = arguments.config.resolve()
    prompted = mixed(Cases.read(Path(__file__).parent / "cases" / "scenes-dev.yaml"))
    requests = [body(case) for case in prompted]
    rows: list[Row] = []

    def record(server: Server, load: str, made: LoadFigures) -> None:
        rows.append(Row(server.name, load, made, _memory()))
        print(
            f"{server.name}, {load}: {made.throughput:.2f} images/s, p50 {made.p50:.3f}, p95 {made.p95:.3f}, "
            f"p99 {made.p99:.3f} s, goodput {made.goodput:.2f}/s, {made.failed} failed",
            flush=True,
        )

    bare = Bare(ModelConfig.read(model))
    overheads: list[Overhead] = []
    foreseen: list[Forecast] = []
    saturation = 0.0
    compared = servers(model)
    for server in reversed(compared):  # the monolith tells the rate of the open loop
        ours = server.name in (SPREAD, COLOCATED)
        with started(server, model) as url:

            def closed(bodies: Sequence[dict[str, Any]], concurrency: int, count: int, url: str = url) -> LoadFigures:
                return figures(asyncio.run(closed_loop(url, bodies, concurrency, count)), arguments.deadline)

            made = closed(requests, 2, 4 if server.slow else 24)
            for concurrency in [1, 8] if server.slow else sorted({1, *arguments.concurrencies}):
                count = max(concurrency * 2, 4, round(made.throughput * arguments.seconds))
                made = closed(requests, concurrency, count)
                record(server, f"concurrency {concurrency}", made)
            if ours:
                for overhead in bare.overheads(server.name, url, prompted[:18]):
                    overheads.append(overhead)
                    print(f"{overhead}, {overhead.ratio:.2f}x", flush=True)
                varied = vary(requests, bare.sizes)
                record(server, "concurrency 8, mixed plans and sizes", closed(varied, 8, 4 * len(varied)))
            if server.name == "monolithic Ray Serve":
                saturation = max(row.figures.throughput for row in rows if row.server == server.name)
            if not server.slow:
                rate = _SATURATION * saturation
                sent = asyncio.run(open_loop(url, requests, rate, round(rate * arguments.seconds * _OPEN_LOOP)))
                record(server, f"{rate:.2f} a second", figures(sent, arguments.deadline))
            if server.name == SPREAD:
                (application,) = (server.config or {})["applications"]
                for forecast in forecasts(
                    url,
                    requests,
                    bare.pipelines[SPREAD],
                    bare.plan,
                    prompted,
                    rate=rate,
                    seconds=arguments.seconds * _FORECAST,
                    deadline=arguments.deadline,
                    batch_tokens=application["args"]["transformers"]["Base"]["max_batch_tokens"],
                ):
                    foreseen.append(forecast)
                    print(f"{forecast}, {forecast.error:+.0%}", flush=True)
    content = {
        "machine": machine_name(),
        "overheads": [{**asdict(overhead), "ratio": overhead.ratio} for overhead in overheads],
        "rows": [asdict(row) for row in rows],
        "forecasts": [{**asdict(forecast), "error": forecast.error} for forecast in foreseen],
    }
    write_json(output / "serving.json", content)
