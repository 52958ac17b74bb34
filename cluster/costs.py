"""What work costs: seconds of a step by device and batch, and dollars. Simulator and router count by these."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_FORGETTING = 0.2  # weight of the newest measurement among others of the same time
_TRUST_HALVES_S = 120.0  # in which the last measurement loses half of its weight


class Device(BaseModel):
    """A type of accelerator.

    Attributes:
        price: dollars an hour.
        count: how many there are, on which all replicas of the type take turns, a slice of time each, as processes do
            on a machine's cores; None where each replica has its own.
        contention: times as long that work takes while all `count` are busy, which share caches and memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    price: Annotated[float, Field(ge=0.0)] = 0.0
    count: Annotated[int, Field(ge=1)] | None = None
    contention: Annotated[float, Field(ge=1.0)] = 1.0


class StepCost(BaseModel):
    """Seconds of a stage's step on a type of device: `fixed` + `per_image` for each image of its batch.

    Attributes:
        fixed, per_image: seconds.
        max_batch: most images of a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed: Annotated[float, Field(ge=0.0)] = 0.0
    per_image: Annotated[float, Field(gt=0.0)]
    max_batch: Annotated[int, Field(ge=1)] = 1

    def seconds(self, batch: int) -> float:
        """Seconds of a step of `batch` images."""
        return self.fixed + self.per_image * batch


@dataclass
class MeasuredCost:
    """Seconds of a unit of work on a deployment while nothing else is there, as a running mean.

    Units that are in flight together share the deployment: each takes as many times as long as there are units.

    A deployment that was slow gets no images, and so would count as slow for good. Hence a measurement counts for less
    with time: of two deployments, an idle one that was ten times as slow is tried again after seven minutes.

    Attributes:
        in_flight: units that are there now.
        expected: units that are there or will come.
        images: number of images that these units are of.
        seconds: of a unit alone; 0 before the first one is done, so that a new deployment is tried.
        measured: when that was, by the monotonic clock.
    """

    in_flight: float = 0.0
    expected: float = 0.0
    images: int = 0
    seconds: float = 0.0
    measured: float = -math.inf

    def promise(self, units: float) -> None:
        """Count an image's units as to come."""
        self.expected += units
        self.images += 1

    def release(self, units: float) -> None:
        """Count them no more."""
        self.expected -= units
        self.images -= 1

    @property
    def wait(self) -> float:
        """Seconds until all that is there or will come would be done."""
        return self.expected * self.seconds

    def expect(self, units: float) -> float:
        """Seconds until `units` more would be done; fewer where nothing has been done for some time."""
        trust = 1.0 if self.images else self._trust(time.monotonic())
        return (self.expected + units) * self.seconds * trust

    def begin(self, units: float) -> float:
        """Add units to what is in flight; return all of it."""
        self.in_flight += units
        return self.in_flight

    def end(self, units: float, *, elapsed: float | None, together: float) -> None:
        """Take units away again.

        Args:
            units: as they began.
            elapsed: seconds that they took, or None if they did not come to their end.
            together: what was in flight when they began, themselves included.
        """
        mean = (together + self.in_flight) / 2
        self.in_flight -= units
        if elapsed is not None and mean > 0:
            now = time.monotonic()
            self.seconds += (1 - (1 - _FORGETTING) * self._trust(now - elapsed)) * (elapsed / mean - self.seconds)
            self.measured = now

    def _trust(self, now: float) -> float:
        """Share that the last measurement still counts for."""
        return 0.5 ** (max(0.0, now - self.measured) / _TRUST_HALVES_S)
