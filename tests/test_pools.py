"""Which of several deployments of a stage gets an image."""

from __future__ import annotations

import asyncio
import copy
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from plans import PLANS
from served import log_lines, pixels

from bench.serving.servers import servers, started
from cluster.costs import MeasuredCost
from deployments.pools import Pools
from deployments.settings import Placement, ServedStage
from stages.pipeline import Pipeline

HYBRID = PLANS["hybrid"]
ENDS = {"Text": Placement(stages=("encode",)), "Pixels": Placement(stages=("decode",))}
TWO = {
    **ENDS,
    "Slow": Placement(stages=("base",)),
    "Fast": Placement(stages=("base",)),
    "Tail": Placement(stages=("bridge", "distilled")),
    "All": Placement(stages=("bridge", "distilled", "decode")),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `deployments.pools` sees, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_unit_alone_is_what_it_took_among_others_over_their_number() -> None:
    cost = MeasuredCost()
    assert cost.expect(3) == 0
    together = [cost.begin(1) for _ in range(4)]
    assert together == [1, 2, 3, 4]
    for number in together:
        cost.end(1, elapsed=2.5 * (number + 5 - number) / 2, together=number)
    assert cost.in_flight == 0
    assert cost.seconds == pytest.approx(2.5, rel=0.2)
    assert cost.expect(2) == 2 * cost.seconds
    cost.expected = 3
    assert cost.expect(2) == 5 * cost.seconds


def test_what_did_not_end_is_not_measured() -> None:
    cost = MeasuredCost()
    cost.end(1, elapsed=None, together=cost.begin(1))
    assert (cost.in_flight, cost.seconds) == (0, 0)


def assigned(routing: Pools) -> dict[ServedStage, str]:
    """Deployments of one more image, which is not begun."""
    with routing.assign(HYBRID, 1.0) as deployments:
        return dict(deployments)


def test_images_go_where_they_are_expected_to_be_done_first(clock: list[float]) -> None:
    routing = Pools(TWO)
    for deployment, seconds in (("Slow", 3.0), ("Fast", 1.0)):
        with routing.at_work(deployment, 1.0):
            clock[0] += seconds
    with ExitStack() as images:
        chosen = [images.enter_context(routing.assign(HYBRID, 1.0))["base"] for _ in range(8)]
    assert chosen.count("Fast") == 6  # three times as fast, three times as many
    assert all(cost.expected == pytest.approx(0) for cost in routing._costs.values())


def test_a_deployment_that_nobody_has_measured_is_tried(clock: list[float]) -> None:
    routing = Pools(TWO)
    with routing.at_work("Slow", 1.0):
        clock[0] += 1.0
    assert assigned(routing)["base"] == "Fast"


def test_the_first_images_of_all_spread_out_before_any_is_begun() -> None:
    routing = Pools(TWO)
    with routing.assign(HYBRID, 1.0) as first:
        assert {first["base"], assigned(routing)["base"]} == {"Slow", "Fast"}


def test_an_image_stays_where_it_is_if_its_next_stage_runs_there() -> None:
    routing = Pools(TWO)
    tails = []
    with ExitStack() as images:
        for _ in range(2):
            deployments = images.enter_context(routing.assign(HYBRID, 1.0))
            tails.append([deployments[stage] for stage in ("bridge", "distilled", "decode")])
    assert sorted(tails) == [["All", "All", "All"], ["Tail", "Tail", "Pixels"]]


@pytest.mark.slow
def test_two_deployments_of_a_stage_share_its_images(pipeline: Pipeline) -> None:
    model = Path(__file__).parent.parent / "configs" / "scenes.yaml"
    server = servers(model)[0]
    config = copy.deepcopy(server.config)
    assert config
    (application,) = config["applications"]
    application["args"]["placement"]["Second"] = application["args"]["placement"]["Base"]
    (base,) = [deployment for deployment in application["deployments"] if deployment["name"] == "Base"]
    application["deployments"].append({**base, "name": "Second"})
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}

    async def send(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            bodies = [{"prompt": "a striped heart", "seed": seed} for seed in range(12)]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))

    with started(replace(server, config=config), model) as running:
        answers = asyncio.run(send(running.url))
        done = {name: len(log_lines(running, name, "evaluations")) for name in ("Base", "Second")}
    assert min(done.values()) >= 3, done
    assert sum(done.values()) == 12
    for seed, answer in enumerate(answers):
        (local,) = pipeline.run("hybrid", "a striped heart", seeds=(seed,), size="128x128")
        served = pixels(answer.raise_for_status().json()["data"][0])
        assert np.abs(served - np.asarray(local.image).astype(int)).max() <= 3
