"""How the router shares a plan out."""

from __future__ import annotations

import pytest

from deployments.router import Leg, split
from stages.plan import presets

SPREAD = {"base": "Base", "bridge": "Bridge", "distilled": "Distilled"}
TOGETHER = dict.fromkeys(SPREAD, "Transformer")
HALF = {"base": "Base", "bridge": "Rest", "distilled": "Rest"}


@pytest.mark.parametrize(
    ("transformers", "partial_images", "legs"),
    [
        (SPREAD, 0, [Leg("Base", 1, False), Leg("Bridge", 1, False), Leg("Distilled", 1, False)]),
        (SPREAD, 9, [Leg("Base", 1, True), Leg("Bridge", 1, True), Leg("Distilled", 1, False)]),
        (HALF, 0, [Leg("Base", 1, False), Leg("Rest", 2, False)]),
        (HALF, 1, [Leg("Base", 1, True), Leg("Rest", 2, False)]),
        (TOGETHER, 0, [Leg("Transformer", 3, False)]),
        (TOGETHER, 1, [Leg("Transformer", 1, True), Leg("Transformer", 2, False)]),
        (TOGETHER, 2, [Leg("Transformer", 1, True), Leg("Transformer", 1, True), Leg("Transformer", 1, False)]),
    ],
)
def test_stages_of_one_transformer_are_one_call_unless_an_image_is_sent_between(
    transformers: dict[str, str], partial_images: int, legs: list[Leg]
) -> None:
    assert split(presets()["hybrid"], transformers, partial_images) == legs
