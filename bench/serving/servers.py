"""This engine and its alternatives, started as a user would start them."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[2]
SPREAD, COLOCATED = "three stages, spread", "three stages, co-located"
MONOLITH, FASTAPI = "monolithic Ray Serve", "diffusers behind FastAPI, base"
_START_TIMEOUT = 300.0  # seconds
_TOLD_S = 30.0


@dataclass(frozen=True)
class Server:
    """How to start a server.

    Attributes:
        name: name in results.
        command: command line with the placeholders `{port}` and `{config}`.
        config: content of the config file, or None if it takes none.
        slow: whether an image takes so long that only a few requests are sent.
        late: deployments without a replica of which the server counts as started.
    """

    name: str
    command: tuple[str, ...]
    config: dict[str, Any] | None = None
    slow: bool = False
    late: tuple[str, ...] = ()


def colocated(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Serve config with all stages of `config` in one deployment, on one set of weights."""
    config = copy.deepcopy(config)
    (application,) = config["applications"]
    placement = application["args"]["placement"]
    together = [stage for placed in placement.values() for stage in placed["stages"]]
    device = {"stages": together, "max_batch_tokens": placement["Base"]["max_batch_tokens"]}
    application["args"]["placement"] = {"Device": device}
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    application["deployments"] = [{**deployments["Base"], "name": "Device"}, deployments["Ingress"]]
    return config


def servers(model: Path) -> list[Server]:
    """Return this engine, spread and co-located, and then its alternatives, to serve the model of a config."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"]["model"] = str(model)
    monolith = {
        "http_options": {"host": "127.0.0.1", "port": 0},
        "applications": [
            {
                "name": "monolith",
                "import_path": "bench.serving.rivals.monolithic_serve:build",
                "args": {"model": str(model), "plan": "hybrid"},
                # Its one replica may use all cores; Ray's default is one thread.
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(os.cpu_count())}},
            }
        ],
    }
    uvicorn = (sys.executable, "-m", "uvicorn", "bench.serving.rivals.diffusers_fastapi:app", "--port", "{port}")
    ours = (sys.executable, "-m", "deployments", "{config}")
    serve = (str(Path(sys.executable).with_name("serve")), "run", "{config}")
    return [
        Server(SPREAD, ours, config),
        Server(COLOCATED, ours, colocated(config)),
        Server(MONOLITH, serve, monolith),
        Server(FASTAPI, uvicorn, slow=True),
    ]


@dataclass(frozen=True)
class Running:
    """A server that is ready.

    Attributes:
        url: its URL.
        process: the process that was started, in a new session; Ray's daemons and workers descend from it.
        log: file with its output.
        config: what it serves by, with the ports that it listens on; None for one that has no config.
    """

    url: str
    process: psutil.Process
    log: Path
    config: dict[str, Any] | None

    @property
    def dashboard(self) -> str:
        """URL of Ray's dashboard, which one of our own servers tells once it has seen that it is ready."""
        deadline = time.monotonic() + _TOLD_S
        while not (found := re.search(r"dashboard at (http://[\w.:\[\]-]+)", self.log.read_text())):
            assert time.monotonic() < deadline, "the server does not tell it"
            time.sleep(0.1)
        return found[1]

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes that are alive."""
        return [self.process, *self.process.children(recursive=True)] if self.process.is_running() else []

    def metrics(self, name: str) -> list[str]:
        """Return the lines of a metric, as Prometheus would scrape them from the server's nodes."""
        (discovery,) = Path(self.process.environ()["RAY_TMPDIR"]).glob("*/prom_metrics_service_discovery.json")
        targets = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]
        pages = [httpx.get(f"http://{target}/metrics", timeout=10).text for target in targets]
        return [line for page in pages for line in page.splitlines() if line.startswith(name)]

    def resident_memory(self) -> int:
        """Return the resident bytes of the processes that hold a model or serve HTTP, without Ray's daemons."""
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") or "uvicorn" in title:
                    total += process.memory_info().rss
        return total


def title_of(process: psutil.Process) -> str:
    """Return what Ray calls a process of its own, without the method that it may run; raises psutil.Error."""
    return "".join(process.cmdline()[:1]).partition(".")[0].strip()


def titled(processes: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Return those of Ray's processes that have this title, whatever method they run."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # it ends
            if title_of(process) == title:
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of this machine on which nobody listens."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@contextmanager
def started(server: Server, model: Path, address: str | None = None) -> Iterator[Running]:
    """Run a server within the `with` block.

    Args:
        server: the server.
        model: path of the model's config.
        address: address of the Ray cluster to run on, or None for one of its own.

    Raises:
        RuntimeError: the server ended or was not ready in time; the message holds the end of its log.
    """
    port, metrics_port = free_ports(2)
    certificate = ((server.config or {}).get("http_options") or {}).get("ssl_certfile")
    url = f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as directory:
        path, log = Path(directory) / "serve.yaml", Path(directory) / "server.log"
        config = copy.deepcopy(server.config)
        if config:
            config["http_options"]["port"] = port
            for application in config["applications"]:
                if "placement" in application["args"]:  # this engine's
                    application["args"]["metrics_port"] = metrics_port
            path.write_text(yaml.safe_dump(config))
        command = [part.format(port=port, config=path) for part in server.command]
        # Otherwise Ray might join another cluster: it looks for one in RAY_TMPDIR and in RAY_ADDRESS.
        environment = {**os.environ, "RIVAL_MODEL": str(model), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": directory}
        environment.pop("RAY_ADDRESS", None)
        if address:
            environment["RAY_ADDRESS"] = address
        with log.open("w") as file:
            process = psutil.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        running = Running(url, process, log, config)
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not _ready(url, server.late, certificate):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} did not get ready:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            yield running
        finally:
            _end(running)


def _end(running: Running) -> None:
    """Stop a server and all its processes."""
    processes = running.processes()
    with suppress(psutil.NoSuchProcess):
        running.process.terminate()
    _, survivors = psutil.wait_procs(processes, timeout=60)
    for survivor in survivors:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
    running.process.wait(timeout=10)


def _ready(url: str, late: Collection[str], certificate: str | None) -> bool:
    """Whether a server is ready, and no deployment but those that come late lacks a replica."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10, verify=ssl.create_default_context(cafile=certificate))
        replicas = answer.json().get("replicas", {})
        return answer.status_code == 200 and all(count for name, count in replicas.items() if name not in late)
    except httpx.HTTPError:
        return False
