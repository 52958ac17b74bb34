"""Who is let in, who waits in which order, and who is refused."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import PLANS
from virtual_time import run_in_virtual_time

from cluster.costs import MeasuredCost
from deployments.admission import Admission, Flow, Late, Priority, Turn
from deployments.balancer import Balancer
from deployments.fairness import FairQueue
from deployments.messages import ImageRequest, Route
from deployments.settings import Placement, ServedStage
from stages.plan import Plan

HYBRID = PLANS["hybrid"]
SPREAD: dict[str, tuple[ServedStage, ...]] = {
    "Text": ("encode",),
    "Base": ("base",),
    "Bridge": ("bridge",),
    "Distilled": ("distilled",),
    "Pixels": ("decode",),
}
TOGETHER: dict[str, tuple[ServedStage, ...]] = {"All": ("encode", "base", "bridge", "distilled", "decode")}


def pop_all(queue: FairQueue[Any]) -> list[Any]:
    return [queue.pop() for _ in range(len(queue))]


def test_a_flow_keeps_the_order_in_which_its_items_came() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(20):
        queue.push(number, "one", cost=1 + number % 3)
    assert pop_all(queue) == list(range(20))


def test_a_newcomer_is_served_next_to_a_flow_with_a_long_queue() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push(f"long {number}", "long", cost=1)
    assert [queue.pop() for _ in range(10)] == [f"long {number}" for number in range(10)]
    for number in range(3):
        queue.push(f"short {number}", "short", cost=1)
    assert [item.split()[0] for item in (queue.pop() for _ in range(6))].count("short") == 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 100)), min_size=1, max_size=200))
def test_backlogged_flows_get_their_shares_by_weight(items: list[tuple[int, float]]) -> None:
    """Work that two flows were given while both wait differs by no more than an item of each, over their weights."""
    weights = [1.0, 1.0, 2.0, 8.0]
    queue: FairQueue[tuple[int, float]] = FairQueue()
    for flow, cost in items:
        queue.push((flow, cost), flow, cost, weights[flow])
    left = Counter(flow for flow, _ in items)
    served = Counter[int]()
    largest = [max((cost for flow, cost in items if flow == each), default=0) / weights[each] for each in range(4)]
    for flow, cost in pop_all(queue):
        left[flow] -= 1
        served[flow] += cost / weights[flow]
        for other in left:
            if left[other] and left[flow]:
                assert abs(served[flow] - served[other]) <= largest[flow] + largest[other] + 1e-6


def test_what_was_discarded_does_not_come() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a", "b", "c"):
        queue.push(item, item, 1)
    queue.discard("b")
    queue.discard("nobody")
    assert pop_all(queue) == ["a", "c"]
    with pytest.raises(IndexError):
        queue.pop()


def test_an_item_overtakes_those_that_would_be_served_after_it() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.push(f"{number}", "long", 1)
    assert sorted(queue.behind("long")) == []
    assert sorted(queue.behind("new")) == ["1", "2", "3"]


def test_flows_that_have_been_served_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(1000):
        queue.push(number, number, 1)
        queue.push(number, number, 1)
        queue.pop()
        queue.pop()
    assert len(queue._finished) <= 2


def test_units_cost_less_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cost = MeasuredCost()
    assert cost.seconds_among(7) == 0
    alone = cost.begin(1)
    now += 2
    cost.end(alone)
    together = [cost.begin(1) for _ in range(8)]
    now += 8
    for each in together:
        cost.end(each)
    assert (cost.seconds_among(1), cost.seconds_among(8)) == (2, 1)
    assert cost.seconds_among(100) == cost.seconds_among(8)


class Device:
    """Takes all images that are there one step further, as `stages.batching` does; a batch of two takes 1.5 times."""

    STEP = 0.25  # units of work

    def __init__(self) -> None:
        self._left: dict[object, float] = {}

    async def work(self, units: float) -> None:
        image = object()
        self._left[image] = units
        if len(self._left) == 1:
            self._running = asyncio.create_task(self._run())
        while image in self._left:
            await asyncio.sleep(self.STEP / 2)

    async def _run(self) -> None:
        while batch := list(self._left):
            await asyncio.sleep(self.STEP * (0.5 + 0.5 * len(batch)))
            for image in batch:
                self._left[image] -= self.STEP
                if self._left[image] <= 0:
                    del self._left[image]


class Door:
    """An admission before deployments of which each takes a second for a unit of work on an image that is alone."""

    def __init__(
        self, placement: dict[str, tuple[ServedStage, ...]] = SPREAD, in_service: int = 4, waiting: int = 1000
    ) -> None:
        placed = {name: Placement(stages=stages, pool=name) for name, stages in placement.items()}
        self.balancer = Balancer(placed, 10.0, 45.0)
        self.admission = Admission(self.balancer, in_service, waiting)
        self.devices = {name: Device() for name in placement}
        self.served: list[str] = []

    def admit(
        self,
        name: str = "image",
        *,
        count: int = 1,
        within_s: float = 1e6,
        priority: Priority = "interactive",
        tenant: str = "",
        size: str = "1000x1000",
    ) -> list[Turn]:
        return self.admission.admit(self.routes(name, count, within_s, size), Flow(priority, tenant, size), within_s)

    def routes(self, name: str, count: int, within_s: float, size: str, plan: Plan = HYBRID) -> list[Route]:
        return [
            Route(
                image=ImageRequest(
                    request_id=name, image_index=index, seed=7, size=size, prompt="a ring", negative_prompt=None
                ),
                plan=plan,
                preset=None,
                format="png",
                quality=90,
                partial_images=0,
                deadline=time.time() + within_s,
            )
            for index in range(count)
        ]

    async def make(self, turn: Turn) -> None:
        """Take an image through its deployments."""
        async with turn:
            self.served.append(turn.route.image.request_id)
            for deployment, units in turn.work.items():
                with self.balancer.promised({deployment: units}), self.balancer.at_work(deployment, units):
                    await self.devices[deployment].work(units)

    async def learn(self) -> None:
        """Measure all deployments, alone and under load."""
        for count in (1, 1, 4, 16, 16):
            await asyncio.gather(*(self.make(turn) for turn in self.admit(count=count)))
        self.served.clear()


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            start = time.time()
            patch.setattr(time, "time", lambda: start + time.monotonic())
            run_in_virtual_time(test())

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_the_estimate_is_when_the_last_image_is_done() -> None:
    for placement in (SPREAD, TOGETHER):
        door = Door(placement, in_service=16)
        await door.learn()
        for count in (1, 4, 16, 64):
            with pytest.raises(Late) as late:
                door.admit(count=count, within_s=1e-9)
            start = time.monotonic()
            await asyncio.gather(*(door.make(turn) for turn in door.admit(count=count)))
            assert late.value.seconds == pytest.approx(time.monotonic() - start, rel=0.35), (placement, count)


@in_virtual_time
async def test_images_that_would_be_late_are_refused_at_once_with_the_time_until_there_is_room() -> None:
    door = Door(TOGETHER)
    await door.learn()
    waiting = door.admit(count=20)
    with pytest.raises(Late) as late:
        door.admit(count=1, within_s=100.0)
    assert late.value.wait == pytest.approx(late.value.seconds - 100.0)
    refusal = door.admission.refuse(late.value, 1, "1000x1000", 100.0)
    assert refusal.headers
    assert (refusal.status, refusal.headers["Retry-After"]) == (503, str(math.ceil(late.value.wait)))
    assert late.value.takes > 1
    hopeless = door.admission.refuse(late.value, 1, "1000x1000", 1.0)
    assert (hopeless.status, hopeless.body["error"]["code"]) == (504, "deadline_exceeded")
    work = asyncio.gather(*(door.make(turn) for turn in waiting))
    await asyncio.sleep(late.value.wait + 30)
    (turn,) = door.admit(count=1, within_s=100.0)  # as it was told
    await door.make(turn)
    assert turn.left_s > 0
    await work


@in_virtual_time
async def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    door = Door(waiting=3)
    turns = door.admit(count=7)  # four are let in, three wait
    with pytest.raises(Late):
        door.admit()
    await asyncio.gather(*(door.make(turn) for turn in turns))
    with pytest.raises(Late):
        door.admit(count=8)
    await asyncio.gather(*(door.make(turn) for turn in door.admit(count=7)))
    assert all(cost.expected == pytest.approx(0) and not cost.images for cost in door.balancer._costs.values())


@in_virtual_time
async def test_a_loaded_server_takes_the_first_plan_that_is_soon_enough() -> None:
    door = Door(TOGETHER)
    await door.learn()
    plans = [PLANS["base"], HYBRID, PLANS["distilled"]]
    choices = [door.routes("image", 1, 1000.0, "1000x1000", plan) for plan in plans]

    async def chosen(within_s: float, soon_s: float, count: int = 3) -> int:
        index, turns = door.admission.admit_first(choices[:count], Flow("interactive", "", ""), within_s, soon_s)
        await asyncio.gather(*(door.make(turn) for turn in turns))
        return index

    assert await chosen(1000.0, soon_s=1000.0) == 0
    assert await chosen(1000.0, soon_s=20.0) == 1
    assert await chosen(1000.0, soon_s=8.0) == 2
    assert await chosen(1000.0, soon_s=1.0) == 0  # none is soon, so it may as well be the one that was asked for
    assert await chosen(20.0, soon_s=1.0) == 1  # or the first that is not late
    assert await chosen(1000.0, soon_s=1.0, count=1) == 0
    with pytest.raises(Late):
        await chosen(1.0, soon_s=1000.0)


@in_virtual_time
async def test_no_more_images_are_behind_the_door_than_agreed() -> None:
    door = Door(in_service=3)
    inside = most = 0

    async def make(turn: Turn) -> None:
        nonlocal inside, most
        async with turn:
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(1)
            inside -= 1

    await asyncio.gather(*(make(turn) for turn in door.admit(count=10)))
    assert most == 3


@in_virtual_time
async def test_a_tenant_or_a_size_with_a_long_queue_does_not_starve_another() -> None:
    door = Door(in_service=1)
    crowd = door.admit("crowd", count=30, tenant="a")
    other = door.admit("other", count=3, tenant="b")
    small = door.admit("small", count=3, tenant="a", size="500x500")
    await asyncio.gather(*(door.make(turn) for turn in (*crowd, *other, *small)))
    assert max(index for index, name in enumerate(door.served) if name != "crowd") <= 9
    assert Counter(door.served) == {"crowd": 30, "other": 3, "small": 3}


@in_virtual_time
async def test_interactive_images_go_before_a_batch_that_goes_on_all_the_same() -> None:
    door = Door(in_service=1)
    batch = door.admit("batch", count=10, priority="batch")
    interactive = door.admit("interactive", count=40)
    await asyncio.gather(*(door.make(turn) for turn in (*batch, *interactive)))
    assert door.served[1:25].count("batch") in (2, 3, 4)


@in_virtual_time
async def test_who_leaves_makes_room() -> None:
    door = Door(in_service=1)
    first, second, third = door.admit(count=3)
    making = asyncio.create_task(door.make(first))
    gone = asyncio.create_task(door.make(second))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(making, door.make(third))
    assert gone.cancelled()
    assert not door.admission._inside


@in_virtual_time
async def test_a_turn_that_nobody_takes_is_over_at_its_deadline() -> None:
    door = Door(in_service=1)
    door.admit(count=2, within_s=30.0)  # by a client that has gone
    (turn,) = door.admit(within_s=1000.0)
    await asyncio.wait_for(door.make(turn), 100.0)


@in_virtual_time
async def test_an_image_that_waited_too_long_is_not_begun() -> None:
    door = Door(TOGETHER, in_service=1)  # nothing is measured, so all are admitted
    turns = door.admit(count=20, within_s=60.0)
    outcomes = await asyncio.gather(*(door.make(turn) for turn in turns), return_exceptions=True)
    late = [outcome for outcome in outcomes if isinstance(outcome, Late)]
    assert outcomes.count(None) >= 3
    assert late
    assert len(door.served) <= outcomes.count(None) + 1


def test_estimates_leave_out_what_is_overtaken() -> None:
    balancer = Balancer({"All": Placement(stages=TOGETHER["All"])}, 10.0, 45.0)
    with balancer.at_work("All", 1.0):
        pass
    balancer._costs["All"]._by_load = {1: 2.0}
    with ExitStack() as promised:
        for _ in range(3):
            promised.enter_context(balancer.promised({"All": 5.0}))
        assert balancer.seconds_until_done({"All": 5.0}, 64) == pytest.approx(30.0)
        assert balancer.seconds_until_done({"All": 5.0}, 64, [{"All": 5.0}]) == pytest.approx(20.0)
