"""Which of several deployments of a stage gets an image."""

from __future__ import annotations

import pytest
from plans import PLANS

from cluster.costs import MeasuredCost
from deployments import pools
from deployments.pools import Pools
from deployments.settings import Placement

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
    monkeypatch.setattr(pools.time, "monotonic", lambda: now[0])
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


def test_what_did_not_end_is_not_measured() -> None:
    cost = MeasuredCost()
    cost.end(1, elapsed=None, together=cost.begin(1))
    assert (cost.in_flight, cost.seconds) == (0, 0)


def test_images_go_where_they_are_expected_to_be_done_first(clock: list[float]) -> None:
    routing = Pools(TWO)
    for deployment, seconds in (("Slow", 3.0), ("Fast", 1.0)):
        with routing.at_work(deployment, 1.0):
            clock[0] += seconds
    chosen = []
    working = []
    for _ in range(8):
        base = routing.assign(HYBRID, 1.0)["base"]
        chosen.append(base)
        work = routing.at_work(base, 5.0)
        work.__enter__()
        working.append(work)
    assert chosen.count("Fast") == 6  # three times as fast, three times as many
    for work in working:
        work.__exit__(None, None, None)


def test_a_deployment_that_nobody_has_measured_is_tried(clock: list[float]) -> None:
    routing = Pools(TWO)
    with routing.at_work("Slow", 1.0):
        clock[0] += 1.0
    assert routing.assign(HYBRID, 1.0)["base"] == "Fast"


def test_the_first_images_of_all_spread_out() -> None:
    routing = Pools(TWO)
    with routing.at_work(first := routing.assign(HYBRID, 1.0)["base"], 1.0):
        assert {first, routing.assign(HYBRID, 1.0)["base"]} == {"Slow", "Fast"}


def test_an_image_stays_where_it_is_if_its_next_stage_runs_there() -> None:
    routing = Pools(TWO)
    with routing.at_work("Tail", 1.0):
        assigned = routing.assign(HYBRID, 1.0)
    assert (assigned["bridge"], assigned["distilled"], assigned["decode"]) == ("All", "All", "All")
    routing = Pools(TWO)
    with routing.at_work("All", 1.0):
        assigned = routing.assign(HYBRID, 1.0)
    assert (assigned["bridge"], assigned["distilled"], assigned["decode"]) == ("Tail", "Tail", "Pixels")
