"""What load on a server asks for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from scenes.cases import Cases
from stages.pipeline import Prompted


def mixed(cases: Cases) -> list[Prompted]:
    """Prompts of several kinds, some with a negative one, in turn."""
    prompted = [*cases.negative[::4][:16], *cases.accuracy[:16], *cases.accuracy[-16:]]
    return [case for _, case in sorted(enumerate(prompted), key=lambda pair: pair[0] * 7 % len(prompted))]


def body(prompted: Prompted) -> dict[str, Any]:
    """Of a request."""
    made = {"prompt": prompted.prompt, "seed": prompted.seed}
    return made | ({"negative_prompt": prompted.negative_prompt} if prompted.negative_prompt else {})


def vary(requests: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Two of three by the hybrid plan, one by the distilled, without its negative prompt; sizes in turn."""
    varied = []
    for index, (request, size) in enumerate(zip(requests, itertools.cycle(sizes), strict=False)):
        plan = "distilled" if index % 3 == 2 else "hybrid"
        kept = {key: value for key, value in request.items() if plan == "hybrid" or key != "negative_prompt"}
        varied.append({**kept, "plan": plan, "size": size})
    return varied
