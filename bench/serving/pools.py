"""Load two pools of one stage, the second of which takes three times as long, apart and together.

Both pools are this machine's processor, on which a step takes one image and waits until its time is over
(`bench.serving.paced`), so that figures are those of the router and not of the cores. Requests choose the pools by
their field `pools`.

What the pools bear together is compared with the sum of what each bears alone, and the 95th percentile of latency with
that of the fast pool alone, under the same Poisson arrivals at 70 % of what that one bears. Both are compared with the
simulator's forecast as well, which is calibrated on one client of each pool.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

from bench.machine import machine_name
from bench.models import SCENES
from bench.results import add_output_argument, output_directory, write_json
from bench.serving.forecast import Forecast
from bench.serving.load import LoadFigures, Sent, closed_loop, figures, open_loop
from bench.serving.paced import SECONDS
from bench.serving.servers import Server, servers, started
from bench.serving.traffic import body
from cluster.costs import Device
from cluster.simulate import Scenario, Stage, circulate, poisson_arrivals, replay
from scenes.cases import DEV, Cases
from stages.config import ModelConfig
from stages.image import megapixels

FAST, SLOW = "fast", "slow"
APART, TOGETHER = ((FAST,), (SLOW,)), (FAST, SLOW)
_SLOWER = 3.0
_SATURATION = 0.7  # of the fast pool's throughput, for the open loop
_OPEN_LOOP = 4  # times as long as a closed loop, because its tail latency is of interest
_CLIENTS = 8  # that saturate
_STEPS = 4
_PLAN = {"stages": [{"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": _STEPS}]}
_DEADLINE = 60.0  # seconds; no goodput is reported


@dataclass(frozen=True)
class Row:
    """Figures of the server under one load.

    Attributes:
        pools: pools that the requests chose.
        load: such as `concurrency 8` or `1.50 a second`.
        throughput: answers a second; of a closed loop, between its first answer and its last request.
        figures: the figures.
    """

    pools: tuple[str, ...]
    load: str
    throughput: float
    figures: LoadFigures


def two_pools(model: Path, step_s: float, directory: Path) -> Server:
    """Return a server of a model whose stage base stands on two pools, and write the file of its pools.

    Args:
        model: path of the model's config.
        step_s: seconds of a step of an image on the fast pool.
        directory: where to write.
    """
    spread = servers(model)[0]
    config = copy.deepcopy(spread.config)
    assert config
    resources = {"backend": "cpu", "resources": {"CPU": 0.1}}
    times = {FAST: step_s, SLOW: _SLOWER * step_s}
    pools = {name: {**resources, "environment": {"env_vars": {SECONDS: str(time)}}} for name, time in times.items()}
    path = directory / "pools.yaml"
    path.write_text(yaml.safe_dump({"cpu": resources, **pools}))
    (application,) = config["applications"]
    application["import_path"] = "bench.serving.paced:build"
    application["args"]["pools"] = str(path)
    model_config = ModelConfig.read(model)
    tokens = prod(model_config.grid(model_config.sizes[0]))
    application["args"]["placement"] = {
        "Rest": {"stages": ["encode", "bridge", "distilled", "decode"], "pool": "cpu", "max_batch_tokens": tokens},
        "Fast": {"stages": ["base"], "pool": FAST, "max_batch_tokens": tokens},
        "Slow": {"stages": ["base"], "pool": SLOW, "max_batch_tokens": tokens},
    }
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    stage = {key: value for key, value in deployments["Bridge"].items() if key != "name"}
    application["deployments"] = [
        deployments["Ingress"], *({"name": name, **stage} for name in application["args"]["placement"])
    ]  # fmt: skip
    command = (str(Path(sys.executable).with_name("serve")), "run", "{config}")
    return replace(spread, name="two pools of base", command=command, config=config)


def steady(sent: Sequence[Sent]) -> float:
    """Return the answers a second of a closed loop while it is full: from its first answer to its last request.

    Raises:
        ValueError: the first answer came after the last request.
    """
    begin, end = min(request.end for request in sent), max(request.due for request in sent)
    if end <= begin:
        raise ValueError("a closed loop was too short to be full")
    return sum(begin < request.end <= end for request in sent if request.error is None) / (end - begin)


class TwoPools:
    """Loads a server of `two_pools`, and prints each result.

    Attributes:
        rows: figures by pools and load.
        forecasts: figures of both pools, simulated and measured.
    """

    def __init__(self, url: str, requests: Sequence[dict[str, Any]], megapixels: float, seconds: float) -> None:
        """Load a server.

        Args:
            url: the server's URL.
            requests: bodies of requests, without plan and pools.
            megapixels: size of their images.
            seconds: duration of each closed loop, roughly.
        """
        self.rows: list[Row] = []
        self.forecasts: list[Forecast] = []
        self._url = url
        self._requests = requests
        self._megapixels = megapixels
        self._seconds = seconds

    def run(self) -> None:
        """Run all loads; raises ValueError if every request of one fails."""
        self._closed(TOGETHER, _CLIENTS, 2 * _CLIENTS)  # warms up
        alone = {pool: self._record((pool,), 1, 8).figures for (pool,) in APART}
        rates = {pool: 1 / made.stages["base"] for pool, made in alone.items()}
        for pools in (*APART, TOGETHER):
            rate = sum(rates[pool] for pool in pools)
            self._record(pools, _CLIENTS, max(4 * _CLIENTS, round(rate * self._seconds)))
        rate = _SATURATION * self._row((FAST,), _CLIENTS).throughput
        count = max(2, round(rate * self._seconds * _OPEN_LOOP))
        for pools in (APART[0], TOGETHER):
            sent = asyncio.run(open_loop(self._url, self._bodies(pools), rate, count))
            made = figures(sent, _DEADLINE)
            self._add(Row(pools, f"{rate:.2f} a second", made.throughput, made))
        self._forecast(alone, rate, count)

    @property
    def comparisons(self) -> dict[str, float]:
        """Throughput of both pools as a share of the sum, and p95 as a share of the fast pool's."""
        apart = sum(self._row(pools, _CLIENTS).throughput for pools in APART)
        fast, both = self.rows[-2:]
        return {
            "throughput": self._row(TOGETHER, _CLIENTS).throughput / apart,
            "p95": both.figures.p95 / fast.figures.p95,
        }

    def _bodies(self, pools: Sequence[str]) -> list[dict[str, Any]]:
        return [{**request, "plan": _PLAN, "pools": {"base": {"only": pools}}} for request in self._requests]

    def _closed(self, pools: Sequence[str], clients: int, count: int) -> list[Sent]:
        return asyncio.run(closed_loop(self._url, self._bodies(pools), clients, count))

    def _record(self, pools: tuple[str, ...], clients: int, count: int) -> Row:
        sent = self._closed(pools, clients, count)
        return self._add(Row(pools, f"concurrency {clients}", steady(sent), figures(sent, _DEADLINE)))

    def _add(self, row: Row) -> Row:
        self.rows.append(row)
        made = row.figures
        print(
            f"{' and '.join(row.pools)}, {row.load}: {row.throughput:.2f} images/s, p50 {made.p50:.3f}, "
            f"p95 {made.p95:.3f} s, {made.failed} failed",
            flush=True,
        )
        return row

    def _row(self, pools: tuple[str, ...], clients: int) -> Row:
        return next(row for row in self.rows if (row.pools, row.load) == (pools, f"concurrency {clients}"))

    def _forecast(self, alone: dict[str, LoadFigures], rate: float, count: int) -> None:
        stages = {
            pool: Stage(
                device=pool,
                steps=_STEPS,
                per_image=made.stages["base"] / _STEPS,
                replicas=1,
                shares=None if pool == FAST else FAST,
            )
            for pool, made in alone.items()
        }
        fast = alone[FAST]
        scenario = Scenario(
            devices={pool: Device() for pool in stages},
            stages=stages,
            rate=rate,
            megapixels=self._megapixels,
            deadline=_DEADLINE,
            hop=fast.elsewhere + sum(seconds for name, seconds in fast.stages.items() if name != "base"),
        )
        measured = self._row(TOGETHER, _CLIENTS).throughput
        foreseen, under_arrivals = replay(scenario, poisson_arrivals(rate, count)), self.rows[-1].figures
        self.forecasts = [
            Forecast(f"images/s at concurrency {_CLIENTS}", circulate(scenario, _CLIENTS, 800).throughput, measured),
            Forecast(f"p50 at {rate:.2f} a second, s", foreseen.p50, under_arrivals.p50),
            Forecast(f"p95 at {rate:.2f} a second, s", foreseen.p95, under_arrivals.p95),
        ]
        for forecast in self.forecasts:
            print(f"{forecast}, {forecast.error:+.0%}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--step", type=float, default=0.25, help="seconds of a step of an image on the fast pool")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help=f"approximate duration of each closed loop; the open loops take {_OPEN_LOOP} times as long",
    )
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load the two pools and write `pools.json`."""
    output = output_directory(arguments)
    model = arguments.config.resolve()
    size = ModelConfig.read(model).sizes[0]
    requests = [body(case) for case in Cases.read(DEV).accuracy[:16]]
    with tempfile.TemporaryDirectory() as directory:
        server = two_pools(model, arguments.step, Path(directory))
        with started(server, model) as running:
            measured = TwoPools(running.url, requests, megapixels(size), arguments.seconds)
            measured.run()
    comparisons = measured.comparisons
    print(f"throughput {comparisons['throughput']:.2f} of the sum, p95 {comparisons['p95']:.2f} of the fast pool's")
    content = {
        "machine": machine_name(),
        "rows": [asdict(row) for row in measured.rows],
        "comparisons": comparisons,
        "forecasts": [{**asdict(forecast), "error": forecast.error} for forecast in measured.forecasts],
    }
    write_json(output / "pools.json", content)
