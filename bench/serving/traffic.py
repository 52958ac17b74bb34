"""Requests that the load consists of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from scenes.cases import Cases
from stages.pipeline import Prompted


def mixed(cases: Cases) -> list[Prompted]:
    """Return 16 cases each with a negative prompt, with one object and with two, in a mixed order."""
    prompted = [*cases.negative[::4][:16], *cases.accuracy[:16], *cases.accuracy[-16:]]
    return [case for _, case in sorted(enumerate(prompted), key=lambda pair: pair[0] * 7 % len(prompted))]


def body(prompted: Prompted) -> dict[str, Any]:
    """Return the body of a request for an image, without its plan and size."""
    made = {"prompt": prompted.prompt, "seed": prompted.seed}
    return made | ({"negative_prompt": prompted.negative_prompt} if prompted.negative_prompt else {})


def vary(requests: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Vary plans and sizes: every third request is distilled, without a negative prompt, the others are hybrid."""
    varied = []
    for index, (request, size) in enumerate(zip(requests, itertools.cycle(sizes), strict=False)):
        plan = "distilled" if index % 3 == 2 else "hybrid"
        kept = {key: value for key, value in request.items() if plan == "hybrid" or key != "negative_prompt"}
        varied.append({**kept, "plan": plan, "size": size})
    return varied
