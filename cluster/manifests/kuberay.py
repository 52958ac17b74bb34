"""A `RayService` of KubeRay: the cluster and what it serves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import yaml

from cluster.manifests.layout import HEAD_CPUS, HEAD_MEMORY_GIB, Group, Layout
from cluster.manifests.vendors import VENDORS
from cluster.pools import Pool
from deployments import PROXY_CALLBACK
from stages.yaml_file import ConfigError

Manifest = dict[str, Any]

_AGENT_PORT = 52365  # Ray's agent, which answers for its node's health
_COMPILATIONS = "compilations"  # the volume that keeps them
_SPARE_S = 60  # beyond the drain, before Kubernetes kills


def render(layout: Layout, name: str) -> Manifest:
    """Render the service called `name`.

    Raises:
        ConfigError: the API would be open to whoever reaches the pods, or the config ends TLS in Serve's proxies.
    """
    _check_access(layout)
    groups = [_worker_group(group, layout, name) for group in layout.groups]
    cluster: Manifest = {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": layout.scales,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # Within the cluster alone: whoever reaches the dashboard can run code.
            "serviceType": "ClusterIP",
            "enableIngress": False,
            "rayStartParams": _start_params(layout),
            "template": _head_template(layout, name),
        },
        "workerGroupSpecs": groups,
    }
    if layout.scales:
        cluster["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": layout.drain_s}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            "serveConfigV2": yaml.safe_dump(layout.serve_config, sort_keys=False),
            # After an upgrade the old cluster stays until it has answered what it was asked.
            "rayClusterDeletionDelaySeconds": layout.drain_s,
            "rayClusterConfig": cluster,
        },
    }


def _check_access(layout: Layout) -> None:
    config = layout.config
    access = config.settings.access
    if access is None or not access.database.startswith("postgresql:"):
        raise ConfigError(
            f"{config.where}.args.access: must be there, with a database that begins with postgresql://, since pods "
            "answer on all their addresses and share their keys"
        )
    if config.serve.http_options.ssl_certfile:
        raise ConfigError(
            f"{config.path}: http_options.ssl_certfile: KubeRay asks Serve's proxies over plain HTTP whether they are "
            "well; let what stands in front of the service, an Ingress or a Gateway, end TLS"
        )


def _head_template(layout: Layout, name: str) -> Manifest:
    resources = {"cpu": str(HEAD_CPUS), "memory": f"{HEAD_MEMORY_GIB}Gi"}
    container = _container("ray-head", layout.head.image, resources, layout, name)
    # Not of the application: KubeRay deploys it when the head is ready, and asks the head's proxy by itself.
    container["readinessProbe"] = _probe("/api/healthz", _AGENT_PORT, failures=10)
    container["lifecycle"] = _before_end(f"sleep {layout.drain_s}")
    return {"spec": _pod_spec(container, layout.head.pool, layout)}


def _worker_group(group: Group, layout: Layout, name: str) -> Manifest:
    pool, vendor = group.pool, VENDORS.get(group.pool.backend)
    resources = {"cpu": str(pool.node.cpus), "memory": f"{pool.node.memory_gib:g}Gi"}
    if vendor:
        resources[vendor.plugin] = str(group.resources[vendor.resource])
    container = _container("ray-worker", group.image, resources, layout, name)
    # Requests go to ready workers; of those, only where replicas run is there a proxy.
    container["readinessProbe"] = _probe("/-/healthz", layout.config.serve.http_options.port, failures=1)
    container["lifecycle"] = _before_end(
        # Serve moves the replicas of a node that is drained, and they answer what they were asked.
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' "
        f"--deadline-remaining-seconds {layout.drain_s}; sleep {layout.drain_s}"
    )
    spec = _pod_spec(container, pool, layout)
    if pool.node.selector:
        spec["nodeSelector"] = dict(pool.node.selector)
    if vendor:
        spec["tolerations"] = [{"key": vendor.plugin, "operator": "Exists", "effect": "NoSchedule"}]
    manifest: Manifest = {
        "groupName": group.name,
        "replicas": group.least,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "rayStartParams": _start_params(layout),
        "template": {"spec": spec},
    }
    if pool.labels:
        manifest["labels"] = dict(pool.labels)
    # Those that KubeRay does not derive from the container's resources.
    known = vendor.resource if vendor and vendor.known_to_kuberay else None
    if told := {name: str(amount) for name, amount in group.resources.items() if name != known}:
        manifest["resources"] = told
    return manifest


def _start_params(layout: Layout) -> dict[str, str]:
    return {"metrics-export-port": str(layout.config.settings.metrics_port)}


def _container(name: str, image: str, resources: dict[str, str], layout: Layout, service: str) -> Manifest:
    return {
        "name": name,
        "image": image,
        "env": [{"name": variable, "value": value} for variable, value in PROXY_CALLBACK.items()],
        # Where the database of keys is, and as whom: PGHOST, PGUSER, PGPASSWORD and what else libpq reads.
        "envFrom": [{"secretRef": {"name": f"{service}-postgres"}}],
        "ports": [
            {"name": "serve", "containerPort": layout.config.serve.http_options.port},
            {"name": "metrics", "containerPort": layout.config.settings.metrics_port},
        ],
        "resources": {"requests": resources, "limits": dict(resources)},
        "livenessProbe": _probe("/api/healthz", _AGENT_PORT, delay=30, failures=120),
    }


def _pod_spec(container: Manifest, pool: Pool, layout: Layout) -> Manifest:
    spec: Manifest = {"terminationGracePeriodSeconds": layout.drain_s + _SPARE_S, "containers": [container]}
    if pool.environment.compilation_cache:
        directory, claim = str(pool.environment.compilation_cache), pool.node.cache_claim
        # A volume that outlives the pod, or the next one would compile anew.
        host_path = {"path": directory, "type": "DirectoryOrCreate"}
        kept = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"hostPath": host_path}
        container["volumeMounts"] = [{"name": _COMPILATIONS, "mountPath": directory}]
        spec["volumes"] = [{"name": _COMPILATIONS, **kept}]
    return spec


def _probe(path: str, port: int, *, delay: int = 10, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": delay,
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _before_end(command: str) -> Manifest:
    return {"preStop": {"exec": {"command": ["bash", "-c", command]}}}
