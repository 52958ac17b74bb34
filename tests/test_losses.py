"""Images outlive the replicas that they are in, as a user meets it: processes are killed and devices stop."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty
import httpx
import numpy as np
import psutil
import pytest
from served import log_lines, pixels

from bench.serving.servers import ROOT, Running, Server, servers, started, titled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]  # CI has `bench chaos`

MODEL = ROOT / "configs" / "scenes.yaml"
LONG = {"prompt": "a striped heart", "plan": "base"}  # fifty steps, in batches of at most eight
FINISHED = {  # as long, but by the distilled model
    "prompt": "a striped heart",
    "plan": {
        "stages": [
            {"name": "base", "sigma_start": 1, "sigma_end": 0.9, "steps": 1},
            {
                "name": "distilled", "sigma_start": 0.9, "sigma_end": 0, "steps": 30, "adapter": "distilled",
                "shift": 3,
            },
        ]
    },
}  # fmt: skip
SHORT = {"prompt": "a striped heart", "plan": "distilled"}


@dataclass(frozen=True)
class Faulty:
    """A server whose replicas a test can stop."""

    running: Running
    directory: Path

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas that ever began, the newest last."""
        paths = sorted(
            self.directory.glob(faulty.began(Path(), deployment, "*").name), key=lambda path: path.stat().st_ctime_ns
        )
        return [int(path.name.rpartition("-")[2]) for path in paths]

    def pid(self, deployment: str) -> int:
        """The process of a deployment's replica."""
        (pid,) = [pid for pid in self.pids(deployment) if psutil.pid_exists(pid)]
        return pid

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """Stop a replica's device before its next piece of work."""
        faulty.stops(self.directory, pid).touch()
        yield
        faulty.stops(self.directory, pid).unlink()

    def send(self, body: dict[str, Any], names: list[str]) -> list[Future[httpx.Response]]:
        """Send a request for each name, which becomes its id."""
        pool = ThreadPoolExecutor(len(names))

        def post(seed: int, name: str) -> httpx.Response:
            return httpx.post(
                f"{self.running.url}/v1/images/generations",
                json={**body, "seed": seed},
                headers={"X-Request-ID": name},
                timeout=150,
            )

        answers = [pool.submit(post, seed, name) for seed, name in enumerate(names)]
        pool.shutdown(wait=False)
        return answers

    def wait_until_it_has(self, pid: int, names: list[str]) -> None:
        wait_for(lambda: all((self.directory / f"has-{pid}-{name}").exists() for name in names))

    def ready(self) -> bool:
        return httpx.get(f"{self.running.url}/readyz", timeout=10).status_code == 200


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    directory = tmp_path_factory.mktemp("faulty")
    config = copy.deepcopy(servers(MODEL)[0].config)
    assert config
    (application,) = config["applications"]
    application["import_path"] = "faulty:build"
    application["args"] |= {"stall_timeout_s": 8.0, "hang_floor_s": 15.0}
    command = (str(Path(sys.executable).with_name("serve")), "run", "{config}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv(faulty.DIRECTORY, str(directory))
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deployments.http.front:middlewares")
        with started(Server("faulty replicas", command, config), MODEL) as running:
            yield Faulty(running, directory)


def images(answers: list[Future[httpx.Response]]) -> list[np.ndarray]:
    assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    return [pixels(answer.result().json()["data"][0]) for answer in answers]


def wait_until_counted(server: Faulty, deployment: str, reason: str) -> None:
    """Wait until the metrics tell of hops that were lost there for this reason."""
    tags = {f'lost_in="{deployment}"', f'reason="{reason}"'}
    wait_for(
        lambda: any(all(tag in line for tag in tags) for line in server.running.metrics("ray_images_resumed_hops"))
    )


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Within rounding: other batches sum in another order."""
    assert max(np.abs(one - other).max() for one, other in zip(actual, expected, strict=True)) <= 3


@pytest.mark.parametrize(
    ("deployment", "body"), [("Base", LONG), ("Distilled", FINISHED), ("TextEncoder", SHORT), ("VAEDecoder", SHORT)]
)
def test_eight_images_outlive_their_replica(server: Faulty, deployment: str, body: dict[str, Any]) -> None:
    names = [f"{deployment}-{number}" for number in range(8)]
    undisturbed = images(server.send(body, [f"undisturbed-{name}" for name in names]))
    pid = server.pid(deployment)
    with server.stopped(pid):
        answers = server.send(body, names)
        server.wait_until_it_has(pid, names)
        start = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not server.ready())
        print(f"/readyz told of the death of {deployment} after {time.monotonic() - start:.2f} s")
        assert_same(images(answers), undisturbed)
        print(f"eight images were done {time.monotonic() - start:.1f} s after it")
    assert len(log_lines(server.running, "Ingress", f"of {deployment}-", f"{deployment} died")) == 8
    wait_for(server.ready)
    wait_until_counted(server, deployment, "died")


def test_requests_outlive_the_replica_of_ingress_that_had_them(server: Faulty) -> None:
    """Those of the other one go on, and those of the dead one begin anew."""
    names = [f"ingress-{number}" for number in range(8)]
    undisturbed = images(server.send(LONG, [f"undisturbed-{name}" for name in names]))
    answers = server.send(LONG, names)
    server.wait_until_it_has(server.pid("Base"), names)
    ingresses = titled(server.running.processes(), "ray::ServeReplica:images:Ingress")
    assert len(ingresses) == 2
    ingresses[0].kill()
    assert_same(images(answers), undisturbed)
    begun = [len(log_lines(server.running, "Ingress", f" {name} ", " by plan base,")) for name in names]
    assert set(begun) == {1, 2}
    print(f"{begun.count(2)} of 8 requests began anew")
    wait_for(server.ready)


def test_an_image_that_was_far_on_goes_on_from_its_last_checkpoint(server: Faulty) -> None:
    """Its replica dies before step 26 of fifty, each of which is two evaluations."""
    (expected,) = images(server.send(LONG, ["undisturbed-late"]))
    answers = server.send(LONG, [f"{faulty.LATE}-Base"])
    assert_same(images(answers), [expected])
    timings = answers[0].result().json()["data"][0]["timings"]
    assert [span["nfe"] for span in timings if span["stage"] == "base"] == [40, 60]
    wait_for(server.ready)


@pytest.mark.parametrize(("deployment", "body"), [("Base", LONG), ("TextEncoder", SHORT)])
def test_an_image_that_kills_is_given_up_after_two_replicas_and_the_others_are_made(
    server: Faulty, deployment: str, body: dict[str, Any]
) -> None:
    innocent = [f"beside-{deployment}-{number}" for number in range(7)]
    names = [f"{faulty.POISON}-{deployment}", *innocent]
    undisturbed = images(server.send(body, [f"undisturbed-{name}" for name in names]))[1:]
    before, pid = server.pids(deployment), server.pid(deployment)
    with server.stopped(pid):
        poison, *others = server.send(body, names)
        server.wait_until_it_has(pid, names)
    assert poison.result().status_code == 503
    assert poison.result().json()["error"]["code"] == "replica_lost"
    assert poison.result().headers["retry-after"] == "1"
    assert_same(images(others), undisturbed)
    wait_for(server.ready)
    images(server.send(body, ["after"]))
    assert len(server.pids(deployment)) == len(before) + 2


def test_a_replica_whose_device_stands_still_is_replaced_and_its_images_are_made_elsewhere(server: Faulty) -> None:
    names = [f"stalled-{number}" for number in range(3)]
    undisturbed = images(server.send(LONG, [f"undisturbed-{name}" for name in names]))
    pid = server.pid("Base")
    with server.stopped(pid):
        answers = server.send(LONG, names)
        assert_same(images(answers), undisturbed)
        wait_for(lambda: not psutil.pid_exists(pid))
    assert len(log_lines(server.running, "Ingress", "of stalled-", "Base stalled")) == 3
    wait_for(server.ready)
    wait_until_counted(server, "Base", "stalled")
