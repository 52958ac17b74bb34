"""The life cycle of a server on a Ray cluster: start, readiness, drain, end."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import ssl
import time
from collections import Counter
from contextlib import redirect_stdout
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

import ray
from ray import serve
from ray.serve.schema import DeploymentStatusOverview
from ray.serve.scripts import cli as serve_cli

from cluster.nodes import check_address, find_lack, live_nodes
from deployments.check import Config, StartError
from deployments.fit import starting_resources
from deployments.http import readiness

_POLL_S = 0.25
_STATUS_POLL_S = 1.0  # asking takes time of the processors that replicas start on
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server:
    """Serves a config on the Ray cluster at `RAY_ADDRESS`, or else on a cluster of its own."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stops = 0
        self._late: frozenset[str] = frozenset()  # deployments whose pools have no node

    def run(self) -> None:
        """Serve until a signal arrives; raises StartError if the server does not get ready."""
        self._listen()
        try:
            dashboard = self._start()
            if self._wait_until_ready():
                if not readiness.followed():
                    raise StartError(
                        "the cluster's proxies do not answer probes: set RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="
                        f"{os.environ['RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH']} in the environment of its nodes"
                    )
                for name in sorted(self._late):
                    self._say(f"without {name}: no node of its pool is here yet")
                host = self._address() + self._prefix()
                token = ", token by `ray get-auth-token`" if os.environ.get("RAY_AUTH_MODE") != "disabled" else ""
                self._say(
                    f"ready: API at {host}/v1, its description at {host}/docs; dashboard at http://{dashboard}{token}; "
                    f"metrics at {', '.join(_metrics())}"
                )
            while not self._stops:
                time.sleep(_POLL_S)
            if not readiness.drain(self._grace(), cut_short=lambda: self._stops > 1):
                self._say("stopped before all requests were answered")
        finally:
            if ray.is_initialized():
                if os.environ.get("RAY_ADDRESS"):  # otherwise the cluster ends with this process
                    serve.shutdown()
                ray.shutdown()

    def _say(self, message: str) -> None:
        """Print a line, which is JSON if Serve's logs are."""
        line = json.dumps({"message": message}) if self._config.logs_json else message
        print(line, flush=True)

    def _listen(self) -> None:
        """Handle signals; called again after Ray's start, which sets a handler of its own."""
        for name in _SIGNALS:
            signal.signal(name, self._stop)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _start(self) -> str:
        """Start Ray and deploy the config; return the dashboard's address."""
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        address = os.environ.get("RAY_ADDRESS", "local")  # by name, or Ray would join whatever cluster runs here
        try:
            check_address(address)
            own = {} if os.environ.get("RAY_ADDRESS") else {"_metrics_export_port": self._config.settings.metrics_port}
            context = ray.init(address, namespace="serve", logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            hint = "; if it asks for a token, set RAY_AUTH_MODE=token" if os.environ.get("RAY_ADDRESS") else ""
            raise StartError(f"Ray: {error}{hint}") from error
        self._listen()
        if not os.environ.get("RAY_ADDRESS"):
            self._check_resources()
        self._check_pools()
        readiness.begin()
        with redirect_stdout(io.StringIO()) as output:
            try:
                serve_cli.main(args=["run", "--non-blocking", str(self._config.path)], standalone_mode=False)
            except SystemExit as error:  # after printing a traceback
                raise StartError(
                    f"serve run {self._config.path}: {output.getvalue().strip().splitlines()[-1]}"
                ) from error
        return context.dashboard_url

    def _check_resources(self) -> None:
        """Check that this machine has the resources of all replicas; Ray would wait for them forever."""
        placement = self._config.settings.placement
        required: Counter[str] = Counter()
        for application in self._config.serve.applications:
            for deployment in application.deployments:
                placed = application is self._config.application and placement.get(deployment.name)
                required.update(starting_resources(deployment, self._config.pools[placed.pool] if placed else None))
        has = ray.cluster_resources()
        for name, amount in required.items():
            if amount > has.get(name, 0) + 1e-6:
                raise StartError(
                    f"{self._config.path}: deployments.*.ray_actor_options ask for {amount:g} {name} together, "
                    f"and this machine has {has.get(name, 0):g}"
                )

    def _check_pools(self) -> None:
        """Check that the cluster has nodes for each pool, with room for the replicas that it must have."""
        nodes = live_nodes()
        for name, pool in self._config.pools.items():
            if lack := find_lack(pool, nodes):
                raise StartError(f"{self._config.settings.pools}: {name}: {lack}")
        empty = {
            name
            for name, pool in self._config.pools.items()
            if not any(node.belongs_to(pool) and node.room(pool) for node in nodes)
        }
        self._late = frozenset(
            name for name, placement in self._config.settings.placement.items() if placement.pool in empty
        )

    def _wait_until_ready(self) -> bool:
        """Wait until the server is ready, with all deployments whose pools have nodes.

        Returns:
            Whether it is; False if a signal arrives first.

        Raises:
            StartError: a deployment cannot start.
        """
        running: set[str] = set()
        while not self._stops:
            responds, starting = _responds(f"{self._address()}/readyz"), set()
            for name, application in serve.status().applications.items():
                starting |= {key for key, status in application.deployments.items() if _starts(status)}
                healthy = {key for key, status in application.deployments.items() if status.status == "HEALTHY"}
                if new := healthy - running:
                    running |= new
                    self._say(f"{name}: {', '.join(sorted(new))} of {len(application.deployments)} deployments")
                failed = [status for status in application.deployments.values() if status.status == "DEPLOY_FAILED"]
                if failed or application.status == "DEPLOY_FAILED":
                    message = failed[0].message if failed else application.message
                    where = next((key for key, status in application.deployments.items() if status in failed), name)
                    raise StartError(f"{where}: {_reason(message)}")
            if responds and starting <= self._late:
                return True
            time.sleep(_STATUS_POLL_S)
        return False

    def _address(self) -> str:
        options = self._config.serve.http_options
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
        return f"{'https' if options.ssl_certfile else 'http'}://{host}:{options.port}"

    def _prefix(self) -> str:
        """Where the application is, `/` left out."""
        return (self._config.application.route_prefix or "").rstrip("/")

    def _grace(self) -> float:
        """Return the longest `graceful_shutdown_timeout_s` of any application's ingress."""
        graces = {self._config.application.name: self._config.settings.request_timeout_s}  # if its config has none
        graces |= {
            application.name: deployment.graceful_shutdown_timeout_s
            for application in self._config.serve.applications
            for deployment in application.deployments
            if deployment.name == "Ingress" and isinstance(deployment.graceful_shutdown_timeout_s, int | float)
        }
        return max(graces.values())


def _metrics() -> list[str]:
    """List the addresses of the nodes' metrics."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def _starts(status: DeploymentStatusOverview) -> bool:
    """Whether a deployment has yet to get its first replica."""
    return status.status == "UPDATING" and not status.replica_states.get("RUNNING")


def _responds(url: str) -> bool:
    """Whether the server, which is ours, answers well; its certificate need not be for this address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without authorities, which take long to read
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urlopen(url, timeout=2, context=context):
            return True
    except (URLError, TimeoutError, ConnectionError):
        return False


def _reason(message: str) -> str:
    """Return the last line with an exception's name in one of Serve's messages, or else the last line."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: \S", line)]
    return (named or [line.strip() for line in lines] or ["the deployment failed"])[-1]
