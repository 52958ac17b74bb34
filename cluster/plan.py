"""Plan how many replicas each pool needs for a load and a bound on latency, and what an image then costs.

`python -m cluster plan cluster/published.yaml --rate 5 --deadline 4`

A file of scenarios has `scenarios` by name (see `cluster.simulate.Scenario`), and either `pools`, the path of a file of
pools, or the `devices` of all scenarios. Each scenario is planned by simulation: the fewest replicas with which 95 % of
the images are done within the deadline.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.costs import Device
from cluster.pools import Pool, read_pools
from cluster.simulate import Scenario, plan_replicas, simulate
from stages.yaml_file import ConfigError, read_mapping, validate


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    pools: str | None = None
    devices: dict[str, Device] = {}
    scenarios: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Scenarios:
    """What a file of scenarios says.

    Attributes:
        by_name: scenarios by name.
        pools: the pools that the file names, by name; empty if it has devices of its own.
    """

    by_name: dict[str, Scenario]
    pools: dict[str, Pool]


def read_scenarios(path: Path) -> Scenarios:
    """Read a file of scenarios; `pools` is relative to its directory.

    Raises:
        FileNotFoundError: the file or its pools' is missing.
        ConfigError: the error names the file and the key that is wrong.
    """
    file = validate(path, _File, read_mapping(path))
    if (file.pools is None) == (not file.devices):
        raise ConfigError(f"{path}: must have either pools or devices")
    pools = read_pools(path.parent / file.pools) if file.pools else {}
    devices = {name: {"price": pool.price} for name, pool in pools.items()} or {
        name: device.model_dump() for name, device in file.devices.items()
    }
    by_name = {
        name: validate(f"{path}: scenarios.{name}", Scenario, {"devices": devices, **values})
        for name, values in file.scenarios.items()
    }
    return Scenarios(by_name, pools)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("scenarios", type=Path)
    parser.add_argument("--rate", type=float, help="images that arrive per second, in place of the scenarios'")
    parser.add_argument("--deadline", type=float, help="seconds for 95 %% of the images, in place of the scenarios'")


def run(arguments: argparse.Namespace) -> None:
    """Plan the scenarios of a file, and print a line for each.

    Raises:
        ConfigError: the file is wrong, or no number of replicas meets a deadline.
    """
    read = read_scenarios(arguments.scenarios)
    given = {key: value for key in ("rate", "deadline") if (value := getattr(arguments, key)) is not None}
    for name, scenario in read.by_name.items():
        where = f"{arguments.scenarios}: scenarios.{name}"
        scenario = validate(where, Scenario, {**scenario.model_dump(), **given})
        try:
            planned = plan_replicas(scenario)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        outcome = simulate(planned)
        stages = ", ".join(f"{stage.count} {name}" for name, stage in planned.stages.items())
        print(
            f"{name}: {_counts(planned, read.pools)} ({stages}); p50 {outcome.p50:.2f} s, p95 {outcome.p95:.2f} s, "
            f"{outcome.throughput:.2f} images/s, ${planned.price:.2f} an hour, "
            f"${outcome.dollars_per_megapixel:.5f} a megapixel"
        )


def _counts(planned: Scenario, pools: dict[str, Pool]) -> str:
    """Replicas by device, and whether its pool has room for them."""
    counts: Counter[str] = Counter()
    for stage in planned.stages.values():
        counts[stage.device] += stage.count
    return ", ".join(
        f"{count} on {name}"
        + (
            f", which has room for {pools[name].replicas.max}"
            if name in pools and count > pools[name].replicas.max
            else ""
        )
        for name, count in counts.items()
    )
