"""What all manifests have in common: nodes of pools, the head, and seconds to drain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cluster.manifests.vendors import VENDORS
from cluster.pools import Pool
from deployments.check import IMPORT_PATH, Config
from stages.yaml_file import ConfigError, read_mapping

# What the head runs beside Ray's own processes is the ingress alone.
HEAD_CPUS = 2
HEAD_MEMORY_GIB = 8
_MARGIN_S = 30.0


@dataclass(frozen=True)
class Group:
    """Nodes of a pool.

    Attributes:
        name: name of the pool.
        pool: the pool.
        image: container image of the nodes.
        least, most: numbers of nodes between which the group scales.
    """

    name: str
    pool: Pool
    image: str
    least: int
    most: int

    @property
    def resources(self) -> dict[str, int]:
        """Ray resources of a node, without cores and memory, in whole devices."""
        return {
            name: math.ceil(amount * self.pool.node.devices)
            for name, amount in self.pool.resources.items()
            if name not in ("CPU", "memory")
        }


@dataclass(frozen=True)
class Layout:
    """A cluster for a config.

    Attributes:
        config: the config, with its pools.
        groups: nodes of each pool.
    """

    config: Config
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, config: Config) -> Layout:
        """Lay out the nodes of a config's pools.

        Raises:
            ConfigError: a pool has no image, or none of several pools' nodes could be told from the others'.
        """
        file = config.settings.pools
        groups = []
        for name, pool in config.pools.items():
            if pool.environment.image is None:
                raise ConfigError(
                    f"{file}: {name}.environment.image: must name the container image of the pool's nodes"
                )
            if len(config.pools) > 1 and not pool.labels:
                raise ConfigError(f"{file}: {name}.labels: must name one, or its replicas would start in any pool")
            vendor = VENDORS.get(pool.backend)
            if vendor and vendor.resource not in pool.resources:
                raise ConfigError(f"{file}: {name}.resources: must have {vendor.resource} on backend {pool.backend}")
            nodes = (math.ceil(count / pool.node.devices) for count in (pool.replicas.min, pool.replicas.max))
            groups.append(Group(name, pool, pool.environment.image, *nodes))
        return cls(config, tuple(groups))

    @property
    def head(self) -> Group:
        """The group whose image and machine the head has too: processors if there are any, else the first."""
        return next((group for group in self.groups if group.pool.backend not in VENDORS), self.groups[0])

    @property
    def scales(self) -> bool:
        """Whether the number of nodes changes with the load."""
        return any(group.least < group.most for group in self.groups)

    @property
    def drain_s(self) -> int:
        """Seconds in which every request that has begun is answered."""
        return math.ceil(self.config.settings.request_timeout_s + _MARGIN_S)

    @property
    def serve_config(self) -> dict[str, Any]:
        """The config for a cluster: nodes answer on all addresses, and replicas drain before they end."""
        content = read_mapping(self.config.path)
        content["proxy_location"] = "EveryNode"  # a proxy where there are replicas, so that any such node may be asked
        content["http_options"] = {**content.get("http_options", {}), "host": "0.0.0.0"}
        for application in content["applications"]:
            if application["import_path"] == IMPORT_PATH:
                for deployment in application["deployments"]:
                    deployment.setdefault("graceful_shutdown_timeout_s", self.drain_s)
        return content
