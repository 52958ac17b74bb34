"""Which of several deployments of a stage gets an image, and for how long."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from plans import PLANS
from served import log_lines, pixels

from bench.serving.servers import servers, started
from cluster.costs import MeasuredCost
from deployments.attempts import Lost, Reason
from deployments.balancer import Balancer
from deployments.settings import Placement, ServedStage
from stages.pipeline import Pipeline

HYBRID = PLANS["hybrid"]
FACTOR, FLOOR = 10.0, 45.0
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
    """The seconds that `deployments.balancer` sees, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_unit_alone_is_what_it_took_among_others_over_their_number(clock: list[float]) -> None:
    cost = MeasuredCost()
    assert cost.expect(3) == 0
    begun = [cost.begin(1) for _ in range(4)]
    clock[0] += 10.0
    for attempt in begun:
        cost.end(attempt)
    assert cost.in_flight == 0
    assert cost.seconds == pytest.approx(2.5)
    assert cost.expect(2) == 2 * cost.seconds
    cost.promise(3)
    assert cost.expect(2) == 5 * cost.seconds


def test_what_did_not_end_is_not_measured() -> None:
    cost = MeasuredCost()
    cost.end(cost.begin(1), measured=False)
    assert (cost.in_flight, cost.seconds) == (0, 0)


@pytest.mark.parametrize(("slow", "minutes"), [(2.0, 2), (10.0, 7), (1000.0, 20)])
def test_a_deployment_that_was_slow_is_tried_again_by_one_image(
    slow: float, minutes: float, clock: list[float]
) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    measure(routing, clock, "Slow", slow)

    def next_trial() -> float:
        """Seconds until Slow gets an image, where Fast does one each second."""
        start = clock[0]
        while assigned(routing)["base"] == "Fast":
            measure(routing, clock, "Fast", 1.0)
            assert clock[0] < start + 3600
        return clock[0] - start

    assert 60 * (minutes - 1) < next_trial() <= 60 * minutes
    with routing.assign(HYBRID, 1.0) as tried:
        assert tried["base"] == "Slow"
        assert {assigned(routing)["base"] for _ in range(3)} == {"Fast"}  # until that one is done
        measure(routing, clock, "Slow", slow)
    assert 60 * (minutes - 1) < next_trial()  # it is as slow as it was
    measure(routing, clock, "Slow", 1.0)
    measure(routing, clock, "Slow", 1.0)
    measure(routing, clock, "Fast", 1.0)
    chosen = shares(routing, 10)
    assert chosen["Slow"] >= 3  # it is not


def assigned(
    routing: Balancer, done: int | None = None, pools: dict[ServedStage, tuple[str, ...]] | None = None
) -> dict[ServedStage, str]:
    """Deployments of one more image, which is not begun, or has so many steps behind it, and may run on these pools."""
    with routing.assign(HYBRID, 1.0, done, pools or {}) as deployments:
        return dict(deployments)


def measure(routing: Balancer, clock: list[float], deployment: str, seconds: float) -> None:
    """Let a deployment do a unit of work."""
    with routing.at_work(deployment, 1.0):
        clock[0] += seconds


def lose(routing: Balancer, clock: list[float], deployment: str, reason: Reason, seconds: float = 1.0) -> None:
    """Let an attempt at a unit of work be lost after so many seconds."""
    with suppress(Lost), routing.at_work(deployment, 1.0):
        clock[0] += seconds
        raise Lost(deployment, reason)


def test_images_go_where_they_are_expected_to_be_done_first(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    for deployment, seconds in (("Slow", 3.0), ("Fast", 1.0)):
        measure(routing, clock, deployment, seconds)
    with ExitStack() as images:
        chosen = [images.enter_context(routing.assign(HYBRID, 1.0))["base"] for _ in range(8)]
    assert chosen.count("Fast") == 6  # three times as fast, three times as many
    assert all(cost.expected == pytest.approx(0) for cost in routing._costs.values())


def test_a_deployment_that_nobody_has_measured_is_tried(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    measure(routing, clock, "Slow", 1.0)
    assert assigned(routing)["base"] == "Fast"


def test_the_first_images_of_all_spread_out_before_any_is_begun() -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    with routing.assign(HYBRID, 1.0) as first:
        assert {first["base"], assigned(routing)["base"]} == {"Slow", "Fast"}


def test_an_image_stays_where_it_is_if_its_next_stage_runs_there() -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    tails = []
    with ExitStack() as images:
        for _ in range(2):
            deployments = images.enter_context(routing.assign(HYBRID, 1.0))
            tails.append([deployments[stage] for stage in ("bridge", "distilled", "decode")])
    assert sorted(tails) == [["All", "All", "All"], ["Tail", "Tail", "Pixels"]]


def test_an_image_on_its_way_is_assigned_for_what_is_left_of_it() -> None:
    """The hybrid plan has four steps of base, one of the bridge and one of the distilled model."""
    routing = Balancer(TWO, FACTOR, FLOOR)
    for done, stages in (
        (None, ["encode", "base", "bridge", "distilled", "decode"]),
        (3, ["base", "bridge", "distilled", "decode"]),
        (4, ["bridge", "distilled", "decode"]),
        (6, ["decode"]),
    ):
        with routing.assign(HYBRID, 1.0, done) as deployments:
            assert list(deployments) == stages
    with routing.assign(HYBRID, 0.5, 2) as deployments:  # and has two of base's five evaluations to come
        assert routing._costs[deployments["base"]].expected == 0.5 * 2


@pytest.mark.parametrize("reason", ["died", "stalled", "hung", "refused"])
def test_a_deployment_that_lost_an_attempt_is_avoided_until_it_has_done_one(clock: list[float], reason: Reason) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    measure(routing, clock, "Slow", 3.0)
    measure(routing, clock, "Fast", 1.0)
    with routing.at_work("Fast", 1.0):  # an image in another of its replicas, say
        lose(routing, clock, "Fast", reason, seconds=0.0)
        assert routing.avoids("Fast")
        assert {assigned(routing)["base"] for _ in range(3)} == {"Slow"}
        clock[0] += 1.0
    assert not routing.avoids("Fast")
    assert assigned(routing)["base"] == "Fast"


def test_a_deployment_that_is_avoided_comes_back(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    lose(routing, clock, "Slow", "died")
    assert assigned(routing)["base"] == "Fast"
    routing.readmit("Slow")
    with routing.assign(HYBRID, 1.0) as first:
        assert {first["base"], assigned(routing)["base"]} == {"Slow", "Fast"}


def test_what_no_other_deployment_does_is_done_where_it_is_all_the_same(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    for deployment in ("Text", "Slow", "Fast"):
        lose(routing, clock, deployment, "died")
    assert assigned(routing)["encode"] == "Text"
    assert assigned(routing)["base"] in ("Slow", "Fast")


def test_an_image_leaves_a_deployment_that_is_avoided_for_its_next_stage(clock: list[float]) -> None:
    alone = {**TWO, "Last": Placement(stages=("distilled",))}
    routing = Balancer({name: placed for name, placed in alone.items() if name != "Tail"}, FACTOR, FLOOR)
    assert {stage: assigned(routing)[stage] for stage in ("bridge", "distilled", "decode")} == {
        "bridge": "All", "distilled": "All", "decode": "All"
    }  # fmt: skip
    lose(routing, clock, "All", "died")
    assert {stage: assigned(routing)[stage] for stage in ("bridge", "distilled", "decode")} == {
        "bridge": "All", "distilled": "Last", "decode": "Pixels"
    }  # fmt: skip


ELSEWHERE = {
    **ENDS,
    "Here": Placement(stages=("base", "bridge"), pool="a"),
    "There": Placement(stages=("base", "distilled"), pool="b"),
    "Both": Placement(stages=("bridge", "distilled"), pool="b"),
}


def test_a_stage_runs_on_the_pools_that_its_image_may_run_on(clock: list[float]) -> None:
    routing = Balancer(ELSEWHERE, FACTOR, FLOOR)
    for pool, deployment in (("a", "Here"), ("b", "There")):
        with ExitStack() as images:
            chosen = [images.enter_context(routing.assign(HYBRID, 1.0, None, {"base": (pool,)})) for _ in range(4)]
        assert {each["base"] for each in chosen} == {deployment}
    # It leaves a deployment that runs its next stage on a pool where that may not run.
    assert assigned(routing, pools={"base": ("a",), "bridge": ("b",)})["bridge"] == "Both"


def test_no_other_pool_takes_over_from_one_that_an_image_is_pinned_to(clock: list[float]) -> None:
    routing = Balancer(ELSEWHERE, FACTOR, FLOOR)
    lose(routing, clock, "Here", "died")
    assert assigned(routing)["base"] == "There"
    assert assigned(routing, pools={"base": ("a",)})["base"] == "Here"
    assert assigned(routing, pools={"base": ("a", "b")})["base"] == "There"


ORDERED = {
    **ENDS,
    "First": Placement(stages=("base",), pool="a"),
    "Twin": Placement(stages=("base",), pool="b"),
    "Second": Placement(stages=("base", "bridge"), pool="c", preference=1),
    "Third": Placement(stages=("base", "distilled"), pool="d", preference=7),
    "Tail": Placement(stages=("bridge", "distilled"), pool="a"),
}


def shares(routing: Balancer, count: int) -> Counter[str]:
    """How many of so many images at once each deployment of base gets."""
    with ExitStack() as images:
        return Counter(images.enter_context(routing.assign(HYBRID, 1.0))["base"] for _ in range(count))


def test_a_deployment_of_a_later_preference_gets_images_while_none_before_it_works(clock: list[float]) -> None:
    routing = Balancer(ORDERED, FACTOR, FLOOR)
    assert shares(routing, 8) == {"First": 4, "Twin": 4}
    for deployment, seconds in (("First", 9.0), ("Twin", 9.0), ("Second", 1.0), ("Third", 1.0)):
        measure(routing, clock, deployment, seconds)
    assert shares(routing, 8) == {"First": 4, "Twin": 4}
    lose(routing, clock, "First", "died")
    assert shares(routing, 8) == {"Twin": 8}
    lose(routing, clock, "Twin", "stalled")
    assert shares(routing, 8) == {"Second": 8}
    lose(routing, clock, "Second", "hung")
    assert shares(routing, 8) == {"Third": 8}
    lose(routing, clock, "Third", "refused")
    assert shares(routing, 8) == {"First": 4, "Twin": 4}
    routing.readmit("Second")
    assert shares(routing, 8) == {"Second": 8}


def test_an_image_leaves_a_later_preference_for_the_next_stage(clock: list[float]) -> None:
    routing = Balancer(ORDERED, FACTOR, FLOOR)
    assert assigned(routing, pools={"base": ("c",)}) == {
        "encode": "Text", "base": "Second", "bridge": "Tail", "distilled": "Tail", "decode": "Pixels"
    }  # fmt: skip


def test_past_a_wait_images_go_to_the_next_preference(clock: list[float]) -> None:
    """Base of the hybrid plan is five evaluations."""
    routing = Balancer(ORDERED, FACTOR, FLOOR, overflow_wait_s=20.0)
    for deployment, seconds in (("First", 1.0), ("Twin", 1.0), ("Second", 2.0), ("Third", 4.0)):
        measure(routing, clock, deployment, seconds)
    assert shares(routing, 10) == {"First": 5, "Twin": 5}
    assert shares(routing, 13) == {"First": 5, "Twin": 5, "Second": 3}
    assert shares(routing, 15) == {"First": 5, "Twin": 5, "Second": 3, "Third": 2}
    beyond = shares(routing, 60)  # no wait is short, and preferences do not count
    assert beyond["First"] == beyond["Twin"] > beyond["Second"] > beyond["Third"] > 2


def test_a_wait_counts_among_preferences_alone(clock: list[float]) -> None:
    """The fast one of two that share images gets most of them, also past the wait."""
    routing = Balancer(
        {name: placed for name, placed in TWO.items() if name != "All"}, FACTOR, FLOOR, overflow_wait_s=0.0
    )
    measure(routing, clock, "Slow", 100.0)
    measure(routing, clock, "Fast", 1.0)
    assert shares(routing, 8) == {"Fast": 8}


def test_an_attempt_may_take_some_times_what_its_deployment_takes_under_the_load_that_it_finds(
    clock: list[float],
) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    measure(routing, clock, "Fast", 2.0)
    with routing.at_work("Fast", 1.0) as short:
        assert short == FLOOR
        with routing.at_work("Fast", 4.0) as long:
            assert long == FACTOR * (1.0 + 4.0) * 2.0


def test_where_there_may_be_no_replica_only_the_deadline_counts(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    with routing.at_work("Fast", 1.0) as limit_s:
        assert limit_s is None  # nobody knows what it takes
        clock[0] += 1.0
    lose(routing, clock, "Fast", "died")
    with routing.at_work("Fast", 1.0) as limit_s:
        assert limit_s is None
    with routing.at_work("Fast", 1.0) as limit_s:
        assert limit_s == FLOOR


def test_a_hung_attempt_counts_as_slow_and_one_that_died_not(clock: list[float]) -> None:
    routing = Balancer(TWO, FACTOR, FLOOR)
    measure(routing, clock, "Fast", 1.0)
    lose(routing, clock, "Fast", "died", seconds=100.0)
    assert routing._costs["Fast"].seconds == 1.0
    lose(routing, clock, "Fast", "hung", seconds=100.0)
    assert routing._costs["Fast"].seconds > 10
    assert routing._costs["Fast"].in_flight == 0


async def send(url: str, **fields: object) -> list[httpx.Response]:
    """Send twelve requests at once."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        bodies = [{"prompt": "a striped heart", "seed": seed, **fields} for seed in range(12)]
        return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_two_deployments_of_a_stage_share_its_images_but_for_those_that_choose_a_pool(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    model = Path(__file__).parent.parent / "configs" / "scenes.yaml"
    server = servers(model)[0]
    config = copy.deepcopy(server.config)
    assert config
    (application,) = config["applications"]
    pool = {"backend": "cpu", "resources": {"CPU": 0.1}, "replicas": 6}
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump({"cpu": pool, "other": pool}))
    application["args"]["pools"] = str(tmp_path / "pools.yaml")
    application["args"]["placement"]["Second"] = {**application["args"]["placement"]["Base"], "pool": "other"}
    (base,) = [deployment for deployment in application["deployments"] if deployment["name"] == "Base"]
    application["deployments"].append({**base, "name": "Second"})

    with started(replace(server, config=config), model) as running:
        answers = asyncio.run(send(running.url))
        done = Counter({name: len(log_lines(running, name, "evaluations")) for name in ("Base", "Second")})
        answers += asyncio.run(send(running.url, pools={"base": {"ignore": ["cpu"]}}))
        pinned = Counter({name: len(log_lines(running, name, "evaluations")) for name in done}) - done
        (refused,) = {answer.text for answer in asyncio.run(send(running.url, pools={"base": {"only": ["tpu"]}}))}
    assert min(done.values()) >= 3, done
    assert done.total() == 12
    assert pinned == {"Second": 12}
    assert json.loads(refused)["error"]["param"] == "pools.base.only"
    for seed, answer in zip([*range(12), *range(12)], answers, strict=True):
        (local,) = pipeline.run("hybrid", "a striped heart", seeds=(seed,), size="128x128")
        served = pixels(answer.raise_for_status().json()["data"][0])
        assert np.abs(served - np.asarray(local.image).astype(int)).max() <= 3


@pytest.mark.ray
@pytest.mark.slow
def test_images_pass_over_a_deployment_whose_pool_has_no_node(tmp_path: Path) -> None:
    model = Path(__file__).parent.parent / "configs" / "scenes.yaml"
    server = servers(model)[0]
    config = copy.deepcopy(server.config)
    assert config
    (application,) = config["applications"]
    pool = {"backend": "cpu", "resources": {"CPU": 0.1}}
    away = {**pool, "labels": {"pool": "away"}, "replicas": {"min": 0, "max": 1}}
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump({"cpu": {**pool, "replicas": 5}, "away": away}))
    application["args"]["pools"] = str(tmp_path / "pools.yaml")
    application["args"]["placement"]["Away"] = {**application["args"]["placement"]["Base"], "pool": "away"}
    application["deployments"].append({"name": "Away", "num_replicas": 1})
    with started(replace(server, config=config, late=("Away",)), model) as running:
        answers = asyncio.run(send(running.url))
        readiness = httpx.get(f"{running.url}/readyz", timeout=10).json()
        log = running.log.read_text()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert readiness["stages"]["base"] == {"Base": 1, "Away": 0}
    assert "without Away: no node of its pool is here yet" in log
    assert "ready: API at" in log
