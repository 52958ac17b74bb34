"""Serve a config on a Ray cluster of several nodes on this machine: a head, and nodes for each of the config's pools.

`python -m cluster local cluster/heterogeneous/serve.yaml` gives each node its pool's labels and the resources of its
devices, whether it has such devices or not, and then serves as `python -m deployments` does: several environments, and
hops from node to node, without several machines. What a pool's replicas run in must be here.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.pools import Pool
from deployments.__main__ import ENVIRONMENT
from deployments.check import StartError, check_free, check_pythons, read_config
from stages.yaml_file import ConfigError

_STORE_BYTES = 128 * 1024 * 1024  # of a node's object store; packets go from replica to replica without it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("config", type=Path, help="in Serve's own schema")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal arrives; return the server's status.

    Raises:
        ConfigError: the config or its pools are wrong.
    """
    os.environ.update(ENVIRONMENT)  # the nodes' processes have it from here
    try:
        config = read_config(arguments.config)
        check_pythons(config)
        for number in range(len(config.pools) + 1):
            check_free("", config.settings.metrics_port + number, f"{config.where}.args.metrics_port")
    except StartError as error:
        raise ConfigError(str(error)) from error
    with started(config.pools.values(), config.settings.metrics_port) as address:
        command = [sys.executable, "-m", "deployments", str(arguments.config)]
        server = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address}, start_new_session=True)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda signum, frame: server.send_signal(signum))
        try:
            return server.wait()
        finally:
            server.kill()


@contextmanager
def started(pools: Iterable[Pool], metrics_port: int) -> Iterator[str]:
    """Run a head with a core, and for each pool a node with room for as many replicas as it must have; its address.

    Args:
        pools: the pools.
        metrics_port: port of the head's metrics; the others have those that follow.
    """
    head = {"num_cpus": 1, "object_store_memory": _STORE_BYTES, "include_dashboard": True}
    with running_head(**head, metrics_export_port=metrics_port) as cluster:
        for number, pool in enumerate(pools, 1):
            replicas = max(1, pool.replicas.min)
            rooms = {name: math.ceil(replicas * amount) for name, amount in pool.needed_resources.items()}
            cluster.add_node(
                num_cpus=rooms.pop("CPU"),
                num_gpus=rooms.pop("GPU", 0),
                resources=rooms,
                labels=dict(pool.labels),
                metrics_export_port=metrics_port + number,
                object_store_memory=_STORE_BYTES,
            )
        yield cluster.address


@contextmanager
def running_head(**options: Any) -> Iterator[Any]:
    """Run a cluster of a head without GPUs, and whatever nodes are added to Ray's `Cluster`, which this yields."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": 0, **options})
    try:
        yield cluster
    finally:
        for node in cluster.list_all_nodes():  # each would drain for half a minute, one after the other
            node.kill_all_processes(check_alive=False, allow_graceful=False)
