"""How the router shares a plan out."""

from __future__ import annotations

import pytest
from plans import PLANS

from deployments.route import Leg, split
from deployments.settings import ServedStage

SPREAD = {"encode": "Text", "base": "Base", "bridge": "Bridge", "distilled": "Distilled", "decode": "Pixels"}
TOGETHER = dict.fromkeys(SPREAD, "All")
PART = {"encode": "First", "base": "First", "bridge": "Rest", "distilled": "Rest", "decode": "Pixels"}


@pytest.mark.parametrize(
    ("deployments", "partial_images", "legs"),
    [
        (SPREAD, 0, ["Text 0", "Base 3", "Bridge 1", "Distilled 1", "Pixels 0 decodes"]),
        (SPREAD, 9, ["Text 0", "Base 3 preview", "Bridge 1 preview", "Distilled 1", "Pixels 0 decodes"]),
        (PART, 0, ["First 3", "Rest 2", "Pixels 0 decodes"]),
        (PART, 1, ["First 3 preview", "Rest 2", "Pixels 0 decodes"]),
        (PART, 2, ["First 3 preview", "Rest 1 preview", "Rest 1", "Pixels 0 decodes"]),
        (TOGETHER, 0, ["All 5 decodes"]),
        (TOGETHER, 1, ["All 3 preview", "All 2 decodes"]),
        (TOGETHER, 2, ["All 3 preview", "All 1 preview", "All 1 decodes"]),
    ],
)
def test_stages_of_one_deployment_are_one_call_unless_an_image_is_sent_between(
    deployments: dict[ServedStage, str], partial_images: int, legs: list[str]
) -> None:
    """The hybrid plan's base comes in three parts."""
    assert [str_of(leg) for leg in split(PLANS["hybrid"], deployments, partial_images)] == legs


def str_of(leg: Leg) -> str:
    return f"{leg.deployment} {leg.stages}{' preview' * leg.preview}{' decodes' * leg.decodes}"
