"""Which deployment does a stage of an image, where several run it, and how long it may take."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from cluster.costs import MeasuredCost
from deployments.attempts import Lost
from deployments.settings import DECODE, ENCODE, Placement, ServedStage
from stages.plan import Plan


@dataclass(frozen=True)
class Share:
    """How an image is shared out.

    Attributes:
        deployments: the deployment of each of its stages.
        work: network evaluations of a megapixel that each deployment does; encoding and decoding count as one.
    """

    deployments: dict[ServedStage, str]
    work: dict[str, float]


class Balancer:
    """Assigns each image's stages to the deployments that are expected to be done with them first.

    What a deployment takes is measured here, as seconds for a network evaluation of a megapixel. Encoding and decoding
    count as one evaluation.

    A deployment that lost an attempt is avoided where another runs the stage, until it has done an image or was
    readmitted. One of a later preference gets images while all before it are avoided or have too long a wait.
    """

    def __init__(
        self,
        placement: Mapping[str, Placement],
        hang_factor: float,
        hang_floor_s: float,
        overflow_wait_s: float | None = None,
    ) -> None:
        """Start without measurements.

        Args:
            placement: the deployments by name.
            hang_factor: times as long as expected that an attempt may take.
            hang_floor_s: seconds that an attempt may take in any case.
            overflow_wait_s: expected wait past which images go to deployments of the next preference; None for never.
        """
        self._hang_factor, self._hang_floor_s = hang_factor, hang_floor_s
        self._overflow_wait_s = math.inf if overflow_wait_s is None else overflow_wait_s
        self._placement = placement
        self._running: dict[ServedStage, list[str]] = defaultdict(list)
        for name, placed in placement.items():
            for stage in placed.stages:
                self._running[stage].append(name)
        self._costs = {name: MeasuredCost() for name in placement}
        self._avoided: set[str] = set()
        self._losses: Counter[str] = Counter()

    def avoids(self, deployment: str) -> bool:
        """Whether the deployment lost an attempt and has not proved since that it works."""
        return deployment in self._avoided

    def readmit(self, deployment: str) -> None:
        """Avoid a deployment no longer."""
        self._avoided.discard(deployment)

    @contextmanager
    def assign(
        self,
        plan: Plan,
        megapixels: float,
        done: int | None = None,
        pools: Mapping[ServedStage, Collection[str]] = MappingProxyType({}),
    ) -> Iterator[dict[ServedStage, str]]:
        """Choose a deployment for every stage that is left of an image, whose work they expect until the block ends.

        For the arguments see `share`.
        """
        share = self.share(plan, megapixels, done, pools)
        with self.promised(share.work):
            yield share.deployments

    def share(
        self,
        plan: Plan,
        megapixels: float,
        done: int | None = None,
        pools: Mapping[ServedStage, Collection[str]] = MappingProxyType({}),
    ) -> Share:
        """Share out what is left of an image; it stays in a deployment that also runs its next stage.

        Args:
            plan: the image's plan.
            megapixels: size of the image.
            done: number of the plan's steps that are done; None before encoding.
            pools: names of the pools that a stage may run on, where these are not all.
        """
        evaluations: dict[ServedStage, float] = {ENCODE: 1.0} if done is None else {}
        for stage, steps in zip(plan.stages, plan.steps_left(done or 0), strict=True):
            if steps:
                evaluations[stage.name] = evaluations.get(stage.name, 0) + steps * stage.step_work
        evaluations[DECODE] = 1.0
        deployments: dict[ServedStage, str] = {}
        expected: dict[str, float] = defaultdict(float)
        here = ""
        for name, amount in evaluations.items():
            candidates, work = self._candidates(name, pools.get(name)), megapixels * amount
            if here not in candidates:
                here = min(candidates, key=lambda each: (self._costs[each].expect(work), self._costs[each].expected))
            deployments[name] = here
            expected[here] += work
        return Share(deployments, dict(expected))

    @contextmanager
    def promised(self, work: Mapping[str, float]) -> Iterator[None]:
        """Let deployments expect this work, see `Share`, until the block ends."""
        for deployment, units in work.items():
            self._costs[deployment].promise(units)
        try:
            yield
        finally:
            for deployment, units in work.items():
                self._costs[deployment].release(units)

    def seconds_until_done(
        self, work: Mapping[str, float], in_service: int, overtaken: Iterable[Mapping[str, float]] = ()
    ) -> float:
        """Estimate the seconds until an image is done that was promised after all others.

        That is the time until its busiest deployment is done with what it expects, and the time in the other ones among
        the images that move along with it.

        Args:
            work: the image's work, see `Share`.
            in_service: most images that all deployments together have at once.
            overtaken: work of images that were promised and come after this one.
        """
        expected = {deployment: self._costs[deployment].expected for deployment in work}
        for later in overtaken:
            for deployment, units in later.items():
                if deployment in expected:
                    expected[deployment] -= units
        waits, moves = {}, {}
        for deployment, units in work.items():
            cost = self._costs[deployment]
            seconds = cost.seconds_among(min(max(1, cost.images), in_service))
            waits[deployment] = expected[deployment] * seconds
            moves[deployment] = min(expected[deployment], in_service * units) * seconds
        busiest = max(waits, key=lambda deployment: waits[deployment] - moves[deployment])
        return waits[busiest] + sum(moves.values()) - moves[busiest]

    def pace(self, work: Mapping[str, float], in_service: int) -> float:
        """Estimate the seconds between two such images while so many are made at once."""
        return max(units * self._costs[name].seconds_among(in_service) for name, units in work.items())

    def seconds_alone(self, work: Mapping[str, float]) -> float:
        """Estimate the seconds that an image takes if nothing else is there, the least that it may take."""
        return sum(units * self._costs[deployment].seconds_among(1) for deployment, units in work.items())

    def _candidates(self, stage: ServedStage, pools: Collection[str] | None) -> list[str]:
        """List the deployments that share a stage's images now.

        From those on the pools, the ones that are avoided are left out, unless all are. From the others, all but those
        of the first preference in which a wait is short enough; where none is, nobody is left out.
        """
        permitted = [
            deployment
            for deployment in self._running[stage]
            if pools is None or self._placement[deployment].pool in pools
        ]
        working = [deployment for deployment in permitted if not self.avoids(deployment)] or permitted
        roomy = [deployment for deployment in working if self._costs[deployment].wait <= self._overflow_wait_s]
        first = min((self._placement[deployment].preference for deployment in roomy), default=None)
        return [deployment for deployment in working if first in (None, self._placement[deployment].preference)]

    @contextmanager
    def at_work(self, deployment: str, work: float) -> Iterator[float | None]:
        """Count `work`, in evaluations of a megapixel, as in flight at a deployment within the block, an attempt.

        It is measured unless the deployment was avoided or lost an attempt meanwhile: Serve may have held the call
        until there was a replica, which says nothing about the work.

        Yields:
            Seconds after which the attempt hangs. None for a deployment that nobody has measured or that is avoided: it
            may have no replica yet, so that only the deadline of the image counts.
        """
        cost = self._costs[deployment]
        begun, measured = cost.begin(work), False
        avoided, losses = self.avoids(deployment), self._losses[deployment]
        known = cost.seconds > 0 and not avoided
        try:
            yield max(self._hang_floor_s, self._hang_factor * cost.in_flight * cost.seconds) if known else None
            measured = not avoided and self._losses[deployment] == losses
            self.readmit(deployment)
        except Lost as lost:
            self._avoided.add(deployment)
            self._losses[deployment] += 1
            # What hung takes at least as long, so a slow deployment gets fewer images from now on.
            measured = lost.reason == "hung"
            raise
        finally:
            cost.end(begun, measured=measured)
