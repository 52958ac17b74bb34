"""Jobs of a real server, two replicas of Ingress over one store, which is killed and started again."""

from __future__ import annotations

import base64
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from served import pixels

from bench.serving.servers import ROOT, Running, Server, servers, started
from deployments.jobs.store import Store
from scenes.oracle import holds, read

MODEL = ROOT / "configs" / "scenes.yaml"
LEASE_S = 10.0
PROMPT = "a dotted heart above a plain moon"
BODY = {"prompt": PROMPT, "plan": "base", "size": "128x128"}  # fifty steps
DEADLINE_S = 300.0


def keeping(directory: Path) -> Server:
    """The co-located server, which keeps jobs."""
    server = servers(MODEL)[1]
    assert server.config
    (application,) = server.config["applications"]
    application["args"]["jobs"] = {"directory": str(directory), "concurrent": 2, "lease_s": LEASE_S}
    (ingress,) = (each for each in application["deployments"] if each["name"] == "Ingress")
    ingress["num_replicas"] = 2
    return server


def create(running: Running, **body: Any) -> dict[str, Any]:
    key = f"seed-{body['seed']}"
    answer = httpx.post(
        f"{running.url}/v1/images/jobs", json={**BODY, **body}, headers={"Idempotency-Key": key}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def jobs_of(running: Running) -> dict[str, dict[str, Any]]:
    page = httpx.get(f"{running.url}/v1/images/jobs", params={"limit": 100}, timeout=30).json()
    return {job["id"]: job for job in page["data"]}


def looks(running: Running) -> Iterator[dict[str, dict[str, Any]]]:
    """All jobs, again and again."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        yield jobs_of(running)
        time.sleep(0.2)


def wait_for(running: Running, wanted: Callable[[list[dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
    for jobs in looks(running):
        if wanted(list(jobs.values())):
            return jobs
    raise AssertionError(jobs_of(running))


def kill(running: Running) -> None:
    """Kill all of a server's processes at once."""
    processes = running.processes()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left


def is_completed(jobs: list[dict[str, Any]]) -> bool:
    return any(job["status"] == "completed" for job in jobs)


def in_its_steps(jobs: list[dict[str, Any]]) -> bool:
    return any(0 < job["progress"] < 100 for job in jobs)


def follow_docs(running: Running, directory: Path) -> None:
    """Run the first job of docs/jobs.md as it stands there."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "jobs.md").read_text(), re.MULTILINE | re.DOTALL)
    code = "".join(blocks[:2]).replace("http://127.0.0.1:8000", running.url)
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", code], cwd=directory, check=True, timeout=300)
    with Image.open(directory / "heart.png") as image:
        assert holds(read(image), ("heart", "red"), "left of", ("ring", "blue"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_accepted_jobs_survive_the_death_of_everything(tmp_path: Path) -> None:
    server = keeping(tmp_path / "jobs")
    with started(server, MODEL) as running:
        made = [create(running, seed=seed, response_format="url") for seed in range(8)]
        before = wait_for(running, lambda jobs: is_completed(jobs) and in_its_steps(jobs))
        kill(running)
    done = [job for job in before.values() if job["status"] == "completed"]
    with started(server, MODEL) as running:
        assert create(running, seed=0, response_format="url")["id"] == made[0]["id"]
        after = wait_for(running, lambda jobs: {job["status"] for job in jobs} == {"completed"})
        assert set(after) == {job["id"] for job in made}
        assert [after[job["id"]] for job in done] == done  # not made again
        for job in after.values():
            result = httpx.get(f"{running.url}/v1/images/jobs/{job['id']}/result", timeout=30).json()
            (image,) = result["data"]
            file = httpx.get(image["url"], timeout=30).content
            direct = httpx.post(
                f"{running.url}/v1/images/generations", json={**BODY, "seed": job["seed"]}, timeout=120
            ).json()
            assert np.abs(pixels({"b64_json": base64.b64encode(file)}) - pixels(direct["data"][0])).max() <= 1
            assert len(list((tmp_path / "jobs" / "images" / job["id"]).iterdir())) == 1
        follow_docs(running, tmp_path)
        last = create(running, seed=100, n=4)
        wait_for(running, in_its_steps)
        logs = Path(running.process.environ()["RAY_TMPDIR"]).glob("*/session_latest/logs/**/*")
        assert not [log for log in logs if log.is_file() and PROMPT in log.read_text(errors="replace")]
    store = Store(f"sqlite:///{tmp_path}/jobs/jobs.sqlite3")
    given_back = store.get(last["id"])
    store.close()
    assert given_back  # by SIGTERM, at once and as if it had not been begun
    assert (given_back.status, given_back.owner, given_back.attempts) == ("queued", None, 0)
