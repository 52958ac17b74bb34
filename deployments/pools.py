"""Which deployment does a stage of an image, where several run it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.costs import MeasuredCost
from deployments.settings import DECODE, ENCODE, Placement, ServedStage
from stages.plan import Plan


class Pools:
    """Assigns each image's stages to the deployments that are expected to be done with them first.

    What a deployment takes is measured here, as seconds for a network evaluation of a megapixel. Encoding and decoding
    count as one evaluation.
    """

    def __init__(self, placement: Mapping[str, Placement]) -> None:
        self._running: dict[ServedStage, list[str]] = defaultdict(list)
        for name, placed in placement.items():
            for stage in placed.stages:
                self._running[stage].append(name)
        self._costs = {name: MeasuredCost() for name in placement}

    @contextmanager
    def assign(self, plan: Plan, megapixels: float) -> Iterator[dict[ServedStage, str]]:
        """Choose a deployment for every stage of an image, whose work they expect until the block ends.

        An image stays in a deployment that also runs its next stage.
        """
        assigned: dict[ServedStage, str] = {}
        expected: dict[str, float] = defaultdict(float)
        here = ""
        for stage in (ENCODE, *dict.fromkeys(part.name for part in plan.stages), DECODE):
            candidates = self._running[stage]
            work = megapixels * (sum(part.work for part in plan.stages if part.name == stage) or 1)
            if here not in candidates:
                here = min(candidates, key=lambda name: (self._costs[name].expect(work), self._costs[name].expected))
            assigned[stage] = here
            expected[here] += work
        for name, work in expected.items():
            self._costs[name].expected += work
        try:
            yield assigned
        finally:
            for name, work in expected.items():
                self._costs[name].expected -= work

    @contextmanager
    def at_work(self, deployment: str, work: float) -> Iterator[None]:
        """Count `work`, in evaluations of a megapixel, as in flight at a deployment within the block."""
        cost = self._costs[deployment]
        together, start, elapsed = cost.begin(work), time.monotonic(), None
        try:
            yield
            elapsed = time.monotonic() - start
        finally:
            cost.end(work, elapsed=elapsed, together=together)
