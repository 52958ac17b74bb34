"""A cluster file of `ray up`, which starts virtual machines of a cloud provider."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cluster.manifests.layout import HEAD_CPUS, Group, Layout
from cluster.manifests.vendors import VENDORS
from deployments import PROXY_CALLBACK
from stages.yaml_file import ConfigError

_FILES = "ulimit -n 65536"
_PORT = 6379


def render(layout: Layout, name: str, provider: Mapping[str, str]) -> dict[str, Any]:
    """Render the cluster called `name`.

    Args:
        layout: the cluster's nodes.
        name: the cluster's name.
        provider: `provider` of the file, with at least its `type`.

    Raises:
        ConfigError: a pool says nothing of its machines.
    """
    for group in layout.groups:
        if not group.pool.node.config:
            raise ConfigError(
                f"{layout.config.settings.pools}: {group.name}.node.config: must be what the provider calls such a "
                "machine, as {InstanceType: m7i.2xlarge} for aws"
            )
    metrics = f"--metrics-export-port={layout.config.settings.metrics_port}"
    return {
        "cluster_name": name,
        "max_workers": sum(group.most for group in layout.groups),
        "idle_timeout_minutes": math.ceil(layout.drain_s / 60),
        "provider": dict(provider),
        "docker": {
            "image": layout.head.image,
            "container_name": name,
            "pull_before_run": True,
            "run_options": [
                "--ulimit=nofile=65536:65536",
                *(f"--env={variable}={value}" for variable, value in PROXY_CALLBACK.items()),
            ],
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {
                "node_config": dict(layout.head.pool.node.config),
                "resources": {"CPU": HEAD_CPUS},
                "min_workers": 0,
                "max_workers": 0,
            },
            **{group.name: _node_type(group) for group in layout.groups},
        },
        "head_start_ray_commands": [
            "ray stop",
            f"{_FILES}; ray start --head --port={_PORT} --autoscaling-config=~/ray_bootstrap_config.yaml "
            f"--dashboard-host=127.0.0.1 {metrics}",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_FILES}; ray start --address=$RAY_HEAD_IP:{_PORT} {metrics}"],
    }


def _node_type(group: Group) -> dict[str, Any]:
    vendor, kept = VENDORS.get(group.pool.backend), group.pool.environment.compilation_cache
    return {
        "node_config": dict(group.pool.node.config),
        "resources": {"CPU": group.pool.node.cpus, **group.resources},
        "labels": dict(group.pool.labels),
        "min_workers": group.least,
        "max_workers": group.most,
        "docker": {
            "worker_image": group.image,
            "worker_run_options": [
                *(vendor.run_options if vendor else ()),
                *([f"--volume={kept}:{kept}"] if kept else ()),  # of the machine, which outlives the container
            ],
        },
    }
