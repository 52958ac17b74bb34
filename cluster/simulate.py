"""A discrete-event simulation of the stages under load: latency, throughput and cost of pools of devices.

Images arrive at random (a Poisson process), pass the stages of a plan in order, and at each go to the replica where
they are expected to be done first: of equal ones, that with the fewest images. A replica works as
`stages.batching.StepBatcher` does: before each step it takes the images that are there, oldest first, up to its largest
batch, and all of them move on by one step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Annotated

import numpy as np
import simpy
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.costs import Device, StepCost

Positive = Annotated[float, Field(gt=0.0)]

_TURN = 0.004  # seconds; about the time slice that Linux gives a process


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(StepCost):
    """One stage of the plan on one type of device.

    Attributes:
        device: name of the device's type.
        steps: number of steps that an image takes here.
        replicas: number of replicas, or None if it is to be planned.
        shares: name of the stage whose images it shares, if it is one more pool of that.
    """

    device: str
    steps: Annotated[int, Field(ge=1)] = 1
    replicas: Annotated[int, Field(ge=1)] | None = None
    shares: str | None = None

    @property
    def alone(self) -> float:
        """Seconds of an image that is alone in a replica."""
        return self.steps * self.seconds(1)

    @property
    def rate(self) -> float:
        """Images a second that a replica does, in full batches."""
        return self.max_batch / (self.steps * self.seconds(self.max_batch))

    @property
    def count(self) -> int:
        """Number of replicas, 1 if none are planned yet."""
        return self.replicas or 1


class Scenario(_Strict):
    """A load, and the pools that serve it.

    Attributes:
        devices: types of device by name.
        stages: stages by name, in order.
        rate: images that arrive per second.
        megapixels: size of an image.
        deadline: seconds within which 95 % of the images must be done, for planning.
        hop: seconds that an image takes to reach a stage.
    """

    devices: dict[str, Device]
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    rate: Positive
    megapixels: Positive
    deadline: Positive
    hop: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _on_devices(self) -> Scenario:
        for name, stage in self.stages.items():
            if stage.device not in self.devices:
                raise ValueError(f"stages.{name}.device must be one of {sorted(self.devices)}, not {stage.device!r}")
        first = [name for name, stage in self.stages.items() if stage.shares is None]
        for name, stage in self.stages.items():
            if stage.shares not in (None, *first):
                raise ValueError(f"stages.{name}.shares must be one of {first}, not {stage.shares!r}")
            if stage.shares and stage.replicas is None:
                raise ValueError(f"stages.{name}.replicas must be given: only those of {stage.shares!r} can be planned")
        return self

    @property
    def pools(self) -> list[list[str]]:
        """Names of the stages in the order of the plan, of each with those that share its images."""
        return [
            [name, *(other for other, stage in self.stages.items() if stage.shares == name)]
            for name, stage in self.stages.items()
            if stage.shares is None
        ]

    @property
    def replicas(self) -> dict[str, int | None]:
        """Numbers of replicas by stage; None where they are to be planned."""
        return {name: stage.replicas for name, stage in self.stages.items()}

    @property
    def price(self) -> float:
        """Dollars per hour of all devices."""
        replicas = dict.fromkeys(self.devices, 0)
        for stage in self.stages.values():
            replicas[stage.device] += stage.count
        return sum((device.count or replicas[name]) * device.price for name, device in self.devices.items())

    def with_replicas(self, replicas: dict[str, int]) -> Scenario:
        """Return the scenario with these numbers of replicas, by stage."""
        stages = {
            name: stage.model_copy(update={"replicas": replicas[name]}) if name in replicas else stage
            for name, stage in self.stages.items()
        }
        return self.model_copy(update={"stages": stages})


@dataclass(frozen=True)
class Outcome:
    """The results of a simulation.

    Attributes:
        throughput: images per second, from the start to the last departure.
        mean, p50, p95, p99: seconds from arrival to departure.
        busy: share of the time that each stage's replicas worked, by stage.
        dollars_per_megapixel: price of a megapixel at this throughput.
    """

    throughput: float
    mean: float
    p50: float
    p95: float
    p99: float
    busy: dict[str, float]
    dollars_per_megapixel: float


@dataclass
class _Image:
    steps_left: int = 0
    done: simpy.Event | None = None


class _Devices:
    """The devices of one replica, or those that all replicas of a type share."""

    def __init__(
        self, environment: simpy.Environment, count: int = 1, contention: float = 1.0, turn: float = math.inf
    ) -> None:
        """Provide devices.

        Args:
            environment: the simulation's clock.
            count: number of devices.
            contention: see `Device`.
            turn: seconds of work after which a device goes to the next replica that waits.
        """
        self._environment = environment
        self._slots = simpy.Resource(environment, count)
        self._slowing = (contention - 1.0) / max(1, count - 1)  # per busy neighbour
        self._turn = turn

    def work(self, seconds: float) -> Generator[simpy.Event, None, float]:
        """Take turns until work of `seconds` (without busy neighbours) is done; return the seconds on a device."""
        held = 0.0
        while seconds > 0:
            share = min(seconds, self._turn)
            with self._slots.request() as granted:
                yield granted
                slowed = share * (1.0 + self._slowing * (self._slots.count - 1))
                yield self._environment.timeout(slowed)
            held += slowed
            seconds -= share
        return held


class _Replica:
    """One process, and the images in it, oldest first."""

    def __init__(self, environment: simpy.Environment, stage: Stage, devices: _Devices | None) -> None:
        self._environment = environment
        self._stage = stage
        self._devices = devices or _Devices(environment)
        self._work = simpy.Store(environment)  # wakes the device
        self.images: list[_Image] = []
        self.busy = 0.0
        environment.process(self._run())

    def expect(self) -> float:
        """Seconds until one more image is expected to be done."""
        images = len(self.images) + 1
        batch = min(images, self._stage.max_batch)
        return images * self._stage.steps * self._stage.seconds(batch) / batch

    def enter(self, image: _Image) -> simpy.Event:
        image.steps_left = self._stage.steps
        image.done = self._environment.event()
        self.images.append(image)
        self._work.put(None)
        return image.done

    def _run(self) -> Generator[simpy.Event, None, None]:
        while True:
            yield self._work.get()
            while self.images:
                batch = self.images[: self._stage.max_batch]
                self.busy += yield from self._devices.work(self._stage.seconds(len(batch)))
                for image in batch:
                    image.steps_left -= 1
                    if image.steps_left == 0 and image.done:
                        self.images.remove(image)
                        image.done.succeed()


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Generate the times of `count` events of a Poisson process with `rate` events per second, from time 0 on."""
    rng = Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


class _System:
    """All replicas of a scenario, with their own clock; a stage without `replicas` has one."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._latencies: list[float] = []
        self.environment = environment = simpy.Environment()
        shared = {
            name: _Devices(environment, device.count, device.contention, _TURN)
            for name, device in scenario.devices.items()
            if device.count
        }
        self._replicas = {
            name: [_Replica(environment, stage, shared.get(stage.device)) for _ in range(stage.count)]
            for name, stage in scenario.stages.items()
        }
        self._stages = [[replica for name in pools for replica in self._replicas[name]] for pools in scenario.pools]

    def generate(self) -> Generator[simpy.Event, None, None]:
        """Pass one image through the stages, from now on."""
        image = _Image()
        arrived = self.environment.now
        for replicas in self._stages:
            if self._scenario.hop:
                yield self.environment.timeout(self._scenario.hop)
            yield min(replicas, key=_Replica.expect).enter(image)
        self._latencies.append(self.environment.now - arrived)

    def run(self, *sources: Generator[simpy.Event, None, None]) -> Outcome:
        """Run until every image that `sources` start is done."""
        for source in sources:
            self.environment.process(source)
        self.environment.run()
        p50, p95, p99 = np.percentile(self._latencies, [50, 95, 99])
        elapsed = self.environment.now
        throughput = len(self._latencies) / elapsed
        return Outcome(
            throughput=throughput,
            mean=float(np.mean(self._latencies)),
            p50=float(p50),
            p95=float(p95),
            p99=float(p99),
            busy={
                name: sum(each.busy for each in replicas) / len(replicas) / elapsed
                for name, replicas in self._replicas.items()
            },
            dollars_per_megapixel=self._scenario.price / 3600 / (throughput * self._scenario.megapixels),
        )


def simulate(scenario: Scenario, images: int = 2000, seed: int = 0) -> Outcome:
    """Simulate `images` random arrivals (`poisson_arrivals`) until the last image is done."""
    return replay(scenario, poisson_arrivals(scenario.rate, images, seed))


def replay(scenario: Scenario, arrivals: Sequence[float]) -> Outcome:
    """Simulate an arrival at each of these times, in seconds, until the last image is done."""
    system = _System(scenario)

    def arrive() -> Generator[simpy.Event, None, None]:
        for arrival in arrivals:
            yield system.environment.timeout(max(0.0, arrival - system.environment.now))
            system.environment.process(system.generate())

    return system.run(arrive())


def circulate(scenario: Scenario, concurrency: int, images: int = 200) -> Outcome:
    """Simulate `concurrency` clients that each request one image after another, about `images` in total."""
    system = _System(scenario)

    def client() -> Generator[simpy.Event, None, None]:
        for _ in range(math.ceil(images / concurrency)):
            yield system.environment.process(system.generate())

    return system.run(*(client() for _ in range(concurrency)))


def plan_replicas(scenario: Scenario, most: int = 1000) -> Scenario:
    """Give every stage the fewest replicas with which 95 % of the images meet the deadline.

    Planning starts from the fewest replicas that can sustain the load, and repeatedly adds one to the stage where it
    shortens the 95th percentile of latency most for its price.

    Raises:
        ValueError: `most` replicas in total do not suffice, or no number would, since even an idle system is too slow.
    """
    stages = scenario.stages
    alone = sum(min(stages[name].alone for name in pools) + scenario.hop for pools in scenario.pools)
    if alone > scenario.deadline:
        raise ValueError(f"deadline is {scenario.deadline} s, but one image alone takes {alone:.2f} s")
    planned = scenario.with_replicas(
        {
            name: stages[name].replicas or math.floor(_left(scenario, others) / stages[name].rate) + 1
            for name, *others in scenario.pools
        }
    )
    free = [name for name, stage in scenario.stages.items() if stage.replicas is None]
    latency = simulate(planned).p95
    while latency > scenario.deadline:
        if not free or sum(stage.count for stage in planned.stages.values()) >= most:
            raise ValueError(f"95 % of the images take {latency:.2f} s with {planned.replicas}")
        grown = [planned.with_replicas({name: planned.stages[name].count + 1}) for name in free]
        latencies = [simulate(candidate).p95 for candidate in grown]
        gains = [
            (latency - shorter) / (candidate.price - planned.price or 1.0)
            for candidate, shorter in zip(grown, latencies, strict=True)
        ]
        best = gains.index(max(gains))
        planned, latency = grown[best], latencies[best]
    return planned


def _left(scenario: Scenario, others: Sequence[str]) -> float:
    """Images a second that are left of the load beside these stages, whose replicas are given."""
    stages = [scenario.stages[name] for name in others]
    return max(0.0, scenario.rate - sum(stage.count * stage.rate for stage in stages))
