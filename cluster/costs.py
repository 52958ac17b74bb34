"""What work costs: seconds of a step by device and batch, and dollars. Simulator and router count by these."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Attempt:
    """Units of one image that have begun.

    Attributes:
        units: how many.
        begun: when, by the monotonic clock.
        unit_seconds, image_seconds: of all that was in flight at the deployment until then.
    """

    units: float
    begun: float
    unit_seconds: float
    image_seconds: float


@dataclass
class MeasuredCost:
    """Seconds of a unit of work on a deployment while nothing else is there, as a running mean.

    Units that are in flight together share the deployment: each takes as many times as long as there are units.

    A deployment that was slow gets no images, and so would count as slow for good. Hence a measurement counts for less
    with time: of two deployments, an idle one that was ten times as slow is tried again after seven minutes.

    The more images are there, the larger are the batches, in which a unit costs less. So there is also a running mean
    for each doubling of their number.

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
    _images_in_flight: int = 0
    _unit_seconds: float = 0.0  # integrals of what is in flight, until the last change
    _image_seconds: float = 0.0
    _changed: float = 0.0
    _by_load: dict[int, float] = field(default_factory=dict)  # seconds of a unit, by the doublings of images in flight

    def promise(self, units: float) -> None:
        """Count an image's units as to come."""
        self.expected += units
        self.images += 1

    def release(self, units: float) -> None:
        """Count them no more."""
        self.expected -= units
        self.images -= 1

    def seconds_among(self, images: int) -> float:
        """Seconds of a unit while so many images are there, at least one; those of the load measured next to that."""
        doublings = images.bit_length()
        nearest = min(self._by_load, key=lambda known: (abs(known - doublings), known), default=None)
        return 0.0 if nearest is None else self._by_load[nearest]

    @property
    def wait(self) -> float:
        """Seconds until all that is there or will come would be done."""
        return self.expected * self.seconds

    def expect(self, units: float) -> float:
        """Seconds until `units` more would be done; fewer where nothing has been done for some time."""
        trust = 1.0 if self.images else self._trust(time.monotonic())
        return (self.expected + units) * self.seconds * trust

    def begin(self, units: float) -> Attempt:
        """Add an image's units to what is in flight."""
        now = self._advance()
        self.in_flight += units
        self._images_in_flight += 1
        return Attempt(units, now, self._unit_seconds, self._image_seconds)

    def end(self, attempt: Attempt, *, measured: bool = True) -> None:
        """Take units away again, and measure them unless they did not come to their end."""
        now = self._advance()
        self.in_flight -= attempt.units
        self._images_in_flight -= 1
        elapsed = now - attempt.begun
        if not measured or elapsed <= 0:
            return
        seconds = elapsed**2 / (self._unit_seconds - attempt.unit_seconds)  # over the mean of units in flight
        images = round((self._image_seconds - attempt.image_seconds) / elapsed)
        self.seconds += (1 - (1 - _FORGETTING) * self._trust(attempt.begun)) * (seconds - self.seconds)
        known = self._by_load.setdefault(images.bit_length(), seconds)
        self._by_load[images.bit_length()] += _FORGETTING * (seconds - known)
        self.measured = now

    def _advance(self) -> float:
        now = time.monotonic()
        self._unit_seconds += self.in_flight * (now - self._changed)
        self._image_seconds += self._images_in_flight * (now - self._changed)
        self._changed = now
        return now

    def _trust(self, now: float) -> float:
        """Share that the last measurement still counts for."""
        return 0.5 ** (max(0.0, now - self.measured) / _TRUST_HALVES_S)
