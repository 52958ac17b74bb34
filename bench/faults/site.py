"""A server on a cluster of several nodes on this machine, and its processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil

from bench.models import SCENES
from bench.serving.servers import Running, Server, servers, started, titled
from cluster.local import running_head
from deployments.__main__ import ENVIRONMENT

_STORE_BYTES = 128 * 1024 * 1024  # of a node's object store
_CORES = 16  # that a node claims to have: room for the replicas of one that is lost


@dataclass(frozen=True)
class Site:
    """A server to disturb.

    Attributes:
        running: the server.
        cluster: Ray's `Cluster` that it is on.
    """

    running: Running
    cluster: Any

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """List the processes of a deployment's replicas."""
        return titled(psutil.Process().children(recursive=True), f"ray::ServeReplica:images:{deployment}")

    def controllers(self) -> list[psutil.Process]:
        """List the process of Serve's controller, if it is there."""
        return titled(psutil.Process().children(recursive=True), "ray::ServeController")

    def add_node(self) -> None:
        """Add a node with room for all replicas."""
        self.cluster.add_node(num_cpus=_CORES, num_gpus=0, object_store_memory=_STORE_BYTES)


def with_replicas(config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a Serve config with so many replicas of each deployment."""
    config = copy.deepcopy(config)
    for deployment in config["applications"][0]["deployments"]:
        deployment.pop("autoscaling_config", None)
        deployment["num_replicas"] = count
    return config


@contextmanager
def standing(nodes: int, *, apart: bool = False) -> Iterator[Site]:
    """Serve the small model with two replicas of each stage on a head, which has none of them, and further nodes.

    Args:
        nodes: number of the further nodes.
        apart: whether a node has one replica of each at most. Without that Serve starts those that a node's death took
            where there is room at once, and the next death may take both.
    """
    # The nodes' processes have it from here. They would start a worker ahead for each of the cores that they claim.
    os.environ.update(ENVIRONMENT, RAY_prestart_worker_first_driver="0")
    server: Server = servers(SCENES)[0]
    assert server.config
    config = with_replicas(server.config, 2)
    if apart:
        for deployment in config["applications"][0]["deployments"]:
            deployment["max_replicas_per_node"] = 1
    with running_head(num_cpus=0, object_store_memory=_STORE_BYTES, include_dashboard=True) as cluster:
        for _ in range(nodes):
            cluster.add_node(num_cpus=_CORES, num_gpus=0, object_store_memory=_STORE_BYTES)
        with started(replace(server, config=config), SCENES, address=cluster.address) as running:
            yield Site(running, cluster)
