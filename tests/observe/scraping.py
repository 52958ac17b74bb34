"""What tests do with Prometheus' programs, which Debian has in one package."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.serving.servers import ROOT, free_ports

DIRECTORY = ROOT / "cluster" / "observability"
_START_S = 60.0


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian's package prometheus has it")
    return found


def eventually(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    """Return what a condition returns once that is true of it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@contextmanager
def prometheus(config: Path, directory: Path) -> Iterator[httpx.Client]:
    """Run Prometheus with a config; a client of its API."""
    (port,) = free_ports(1)
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:

            def ready() -> bool:
                assert process.poll() is None, (directory / "log").read_text()
                try:
                    return client.get("/-/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            eventually(ready, _START_S)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """What an expression is now, as samples."""
    answer = client.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]
