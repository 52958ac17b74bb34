"""The nodes of a live Ray cluster, beside what pools need of them."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ray

from cluster.pools import Pool

_CONNECT_S = 10.0
_TOLERANCE = 1e-6  # of sums of resources, which are floats


@dataclass(frozen=True, eq=False)
class LiveNode:
    """A node of a Ray cluster.

    Attributes:
        id: Ray's id of the node, hexadecimal.
        labels: the node's labels.
        resources: all of the node's Ray resources, whether free or not.
    """

    id: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]

    def belongs_to(self, pool: Pool) -> bool:
        """Whether the node has the pool's labels."""
        return pool.labels.items() <= self.labels.items()

    def room(self, pool: Pool) -> int:
        """Number of the pool's replicas that fit on the node while nothing else is there."""
        return min(
            int(self.resources.get(name, 0.0) / amount + _TOLERANCE) for name, amount in pool.needed_resources.items()
        )


def check_address(address: str) -> None:
    """Check that somebody listens at the address of a cluster, for which Ray itself would wait without end.

    Args:
        address: as in RAY_ADDRESS; only `HOST:PORT` is checked, not words such as `auto`.

    Raises:
        ConnectionError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nobody answers at {address}: {error}") from error


def live_nodes() -> list[LiveNode]:
    """List the nodes of the cluster that this process has joined."""
    return [LiveNode(node["NodeID"], node["Labels"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def find_lack(pool: Pool, nodes: Iterable[LiveNode]) -> str | None:
    """Say what a cluster lacks for the replicas that must have room in a pool; None if it lacks nothing."""
    nodes = list(nodes)
    needed = pool.replicas.min
    own = [node for node in nodes if node.belongs_to(pool)]
    if needed and not own:
        labels = ", ".join(f"{key}={value}" for key, value in pool.labels.items())
        return f"no node of the cluster, which has {len(nodes)}, has the labels {labels}"
    room = sum(node.room(pool) for node in own)
    if room < needed:
        resources = ", ".join(f"{amount:g} {name}" for name, amount in pool.needed_resources.items())
        return f"its nodes have room for {room} replicas of {resources} each, and replicas.min is {needed}"
    return None
