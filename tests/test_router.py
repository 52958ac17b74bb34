"""How the router shares a plan out."""

from __future__ import annotations

import pytest
from plans import PLANS

from deployments.hops import plan_hops
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


@pytest.mark.parametrize(
    ("deployments", "partial_images", "legs"),
    [
        (SPREAD, 0, ["Text 0", "Base 3", "Bridge 1", "Distilled 1", "Pixels 0 decodes"]),
        (SPREAD, 1, ["Text 0", "Base 3 after 3", "Bridge 1", "Distilled 1", "Pixels 0 decodes"]),
        (SPREAD, 3, ["Text 0", "Base 3 after 1, 3, 4", "Bridge 1", "Distilled 1", "Pixels 0 decodes"]),
        (SPREAD, 9, ["Text 0", "Base 3 after 1, 2, 3, 4", "Bridge 1 after 1", "Distilled 1", "Pixels 0 decodes"]),
        (PART, 0, ["First 3", "Rest 2", "Pixels 0 decodes"]),
        (PART, 2, ["First 3 after 2, 4", "Rest 2", "Pixels 0 decodes"]),
        (TOGETHER, 0, ["All 5 decodes"]),
        (TOGETHER, 1, ["All 5 after 3 decodes"]),
        (TOGETHER, 3, ["All 5 after 1, 3, 4 decodes"]),
    ],
)
def test_stages_of_one_deployment_are_one_call_that_sends_previews_at_equal_shares_of_the_plans_steps(
    deployments: dict[ServedStage, str], partial_images: int, legs: list[str]
) -> None:
    """The hybrid plan's base comes in three parts of four steps, bridge and distilled take one each."""
    assert [str_of(leg) for leg in plan_hops(PLANS["hybrid"], deployments, partial_images)] == legs


def str_of(leg: Hop) -> str:
    previews = f" after {', '.join(map(str, leg.previews))}" if leg.previews else ""
    return f"{leg.deployment} {leg.stages}{previews}{' decodes' * leg.decodes}"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_as_many_previews_as_asked_where_the_steps_allow(steps: int, asked: int) -> None:
    plan = Plan.model_validate({"stages": [{"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": steps}]})
    previews = [step for leg in plan_hops(plan, SPREAD, asked) for step in leg.previews]
    assert len(set(previews)) == min(asked, steps - 1)
    assert previews == sorted(previews)
    assert all(0 < step < steps for step in previews)
