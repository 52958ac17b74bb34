"""How the router shares a plan out."""

from __future__ import annotations

import pytest
from plans import PLANS

from deployments.hops import next_hop
from deployments.messages import Hop
from deployments.settings import ServedStage
from stages.plan import Plan

SPREAD: dict[ServedStage, str] = {
    "encode": "Text",
    "base": "Base",
    "bridge": "Bridge",
    "distilled": "Distilled",
    "decode": "Pixels",
}
TOGETHER = dict.fromkeys(SPREAD, "All")
PART: dict[ServedStage, str] = {
    "encode": "First",
    "base": "First",
    "bridge": "Rest",
    "distilled": "Rest",
    "decode": "Pixels",
}
CACHE = {"kind": "first_block", "threshold": 0.1}


def plan_of(*steps: int, cached: bool = False) -> Plan:
    """Parts of base with so many steps, and a distilled stage with the last."""
    sigmas = [1 - number / len(steps) for number in range(len(steps) + 1)]
    stages = [
        {"name": "base", "sigma_start": start, "sigma_end": end, "steps": count, "cache": CACHE if cached else None}
        for start, end, count in zip(sigmas, sigmas[1:], steps, strict=False)
    ]
    return Plan.model_validate({"stages": [*stages[:-1], {**stages[-1], "name": "distilled", "cache": None}]})


def hops(
    plan: Plan, deployments: dict[ServedStage, str], partial_images: int = 0, checkpoint_steps: int | None = None
) -> list[Hop]:
    """All of an image whose hops all come to their end."""
    found: list[Hop] = []
    done = None
    while not found or not found[-1].decodes:
        found.append(
            next_hop(
                plan, deployments, done=done, partial_images=partial_images, checkpoint_steps=checkpoint_steps
            )
        )  # fmt: skip
        done = sum(stage.steps for stage in plan.stages[: found[-1].end])
    return found


@pytest.mark.parametrize(
    ("deployments", "partial_images", "legs"),
    [
        (SPREAD, 0, ["Text to 0", "Base to 3", "Bridge to 4", "Distilled to 5", "Pixels to 5 decodes"]),
        (SPREAD, 1, ["Text to 0", "Base to 3 after 3", "Bridge to 4", "Distilled to 5", "Pixels to 5 decodes"]),
        (SPREAD, 3, ["Text to 0", "Base to 3 after 1, 3, 4", "Bridge to 4", "Distilled to 5", "Pixels to 5 decodes"]),
        (
            SPREAD,
            9,
            ["Text to 0", "Base to 3 after 1, 2, 3, 4", "Bridge to 4 after 5", "Distilled to 5", "Pixels to 5 decodes"],
        ),
        (PART, 0, ["First to 3", "Rest to 5", "Pixels to 5 decodes"]),
        (PART, 2, ["First to 3 after 2, 4", "Rest to 5", "Pixels to 5 decodes"]),
        (TOGETHER, 0, ["All to 5 decodes"]),
        (TOGETHER, 1, ["All to 5 after 3 decodes"]),
        (TOGETHER, 3, ["All to 5 after 1, 3, 4 decodes"]),
    ],
)
def test_stages_of_one_deployment_are_one_call_that_sends_previews_at_equal_shares_of_the_plans_steps(
    deployments: dict[ServedStage, str], partial_images: int, legs: list[str]
) -> None:
    """The hybrid plan's base comes in three parts of four steps, bridge and distilled take one each."""
    assert [str_of(leg) for leg in hops(PLANS["hybrid"], deployments, partial_images)] == legs


def str_of(leg: Hop) -> str:
    previews = f" after {', '.join(map(str, leg.previews))}" if leg.previews else ""
    return f"{leg.deployment} to {leg.end}{previews}{' decodes' * leg.decodes}"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_as_many_previews_as_asked_where_the_steps_allow(steps: int, asked: int) -> None:
    plan = Plan.model_validate({"stages": [{"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": steps}]})
    previews = [step for leg in hops(plan, SPREAD, asked) for step in leg.previews]
    assert len(set(previews)) == min(asked, steps - 1)
    assert previews == sorted(previews)
    assert all(0 < step < steps for step in previews)


def test_a_hops_work_is_what_is_left_of_it() -> None:
    """Base takes a step, a guided one and two more."""
    hybrid = PLANS["hybrid"]
    assert [hop.work for hop in hops(hybrid, SPREAD)] == [0, 5, 1, 1, 0]
    assert [hop.work for hop in hops(hybrid, TOGETHER)] == [7]
    for done, nfe, end in ((1, 4, 3), (2, 2, 3), (3, 1, 3), (4, 1, 4), (5, 1, 5)):
        hop = next_hop(hybrid, SPREAD, done=done)
        assert (hop.work, hop.end) == (nfe, end)
    assert next_hop(hybrid, SPREAD, done=6) == Hop(deployment="Pixels", end=5, decodes=True)
    assert next_hop(hybrid, TOGETHER, done=6) == Hop(deployment="All", end=5, decodes=True)


def test_an_image_that_is_resumed_is_shown_nothing_twice() -> None:
    plan = plan_of(10, 2)
    assert next_hop(plan, TOGETHER, partial_images=3).previews == (3, 6, 9)
    assert next_hop(plan, TOGETHER, done=4, partial_images=3).previews == (6, 9)
    assert next_hop(plan, TOGETHER, done=4, partial_images=3, shown=6).previews == (9,)


@pytest.mark.parametrize(
    ("plan", "every", "checkpoints"),
    [
        (plan_of(50, 4), None, [(), (), (), ()]),
        (plan_of(50, 4), 10, [(), (10, 20, 30, 40), (), ()]),
        (plan_of(50, 4), 20, [(), (20, 40), (), ()]),
        (plan_of(50, 4), 50, [(), (), (), ()]),
        (plan_of(10, 11), 10, [(), (), (20,), ()]),
        (plan_of(4, 4, 4, 4), 5, [(), (5, 10), (), ()]),
        (plan_of(50, 4, cached=True), 10, [(), (), (), ()]),
        (plan_of(4, 8, 4, cached=True), 3, [(), (4,), (15,), ()]),  # between two stages a cache is no more
    ],
)
def test_a_long_hop_hands_its_packet_back_every_so_many_steps_where_no_cache_has_a_state(
    plan: Plan, every: int | None, checkpoints: list[tuple[int, ...]]
) -> None:
    assert [hop.checkpoints for hop in hops(plan, SPREAD, checkpoint_steps=every)] == checkpoints


def test_checkpoints_are_counted_from_where_an_image_goes_on() -> None:
    plan = plan_of(50, 4)
    assert next_hop(plan, SPREAD, done=30, checkpoint_steps=10).checkpoints == (40,)
    assert next_hop(plan, SPREAD, done=33, checkpoint_steps=10).checkpoints == (43,)
    assert next_hop(plan_of(20, 30, cached=True), TOGETHER, checkpoint_steps=8).checkpoints == (20, 28, 36, 44)
