"""Images outlive the replicas that they are in: the router over deployments that die, hang and stall as told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import pytest
from plans import PLANS
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from virtual_time import run_in_virtual_time

from deployments import ray_internals
from deployments.balancer import Balancer
from deployments.http.errors import APIError
from deployments.messages import (
    VERSION,
    Call,
    ImageReply,
    ImageRequest,
    PacketReply,
    RefusalReply,
    Route,
    StalledReply,
    StepReply,
    Wire,
)
from deployments.router import DecodedImage, Partial, Router
from deployments.settings import Placement, ServedStage, Settings
from stages.plan import Plan
from stages.spans import Span
from stages.wire import Version

T = TypeVar("T")

IMAGE = ImageReply(index=0, seed=7, text_tokens=1, image_tokens=1, spans=(Span("base", 1.0, 2.0, 30),))
DIED = ActorUnavailableError("gone", b"0" * 16)
SPREAD = {name: placement.stages for name, placement in Settings.model_fields["placement"].default.items()}
LONG = Plan.model_validate({
    "stages": [
        {"name": "base", "sigma_start": 1, "sigma_end": 0.5, "steps": 30},
        {"name": "distilled", "sigma_start": 0.5, "sigma_end": 0, "steps": 2},
    ]
})  # fmt: skip

# Called before each step of an image, and before it is encoded (step 0) and decoded (-1).
Before = Callable[[Call, int], Awaitable[None]]


async def _nothing(call: Call, step: int) -> None:
    pass


@dataclass
class Deployment:
    """A stand-in for a deployment's handle, whose packets are the numbers of steps done, as text.

    Attributes:
        name: name of the deployment.
        before: called before each step; what it raises ends the attempt, as it is.
        healthy: whether health checks pass.
        gone: whether all replicas are.
        attempts: image, first step and last step of each attempt.
        unary: how many of the calls were unary.
        cancelled: how many attempts were cancelled.
    """

    name: str
    before: Before = _nothing
    healthy: bool = True
    gone: bool = False
    attempts: list[tuple[str, int, int]] = field(default_factory=list)
    unary: int = 0
    cancelled: int = 0

    def __getattr__(self, method: str) -> _Method:
        return _Method(self, method)

    def options(self, *, stream: bool) -> Deployment:
        assert stream
        return self

    async def work(self, call: Call, packet: bytes) -> AsyncGenerator[Wire]:
        plan, hop = call.route.plan, call.hop
        assert hop.deployment == self.name
        done = int(packet) if packet else 0
        end = sum(stage.steps for stage in plan.stages[: hop.end])
        attempt = len(self.attempts)
        self.attempts.append((call.route.image.request_id, done, done))
        try:
            if not packet:
                await self.before(call, 0)
            while done < end:
                await asyncio.sleep(0.1)
                await self.before(call, done + 1)
                done += 1
                self.attempts[attempt] = (*self.attempts[attempt][:2], done)
                if hop.tells:
                    yield StepReply(kind="step", step=done).to_json(), b""
                if done in hop.previews:
                    yield StepReply(kind="preview", step=done).to_json(), b"%d" % end_of(plan)
                if done in hop.checkpoints:
                    yield StepReply(kind="checkpoint", step=done).to_json(), b"%d" % done
            if hop.decodes:
                await self.before(call, -1)
                yield IMAGE.to_json(), b"image after %d" % done
            else:
                yield PacketReply().to_json(), b"%d" % done
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@dataclass
class _Method:
    deployment: Deployment
    name: str

    def remote(self, *args: Any) -> Any:
        if self.name == "check_health":
            return self._check_health()
        call, packet = args
        wires = self.deployment.work(Call.from_json(call), packet)
        self.deployment.unary += self.name == "run"
        return _Unary(wires) if self.name == "run" else _Streamed(wires)

    async def _check_health(self) -> None:
        if not self.deployment.healthy:
            raise RuntimeError("stalled")


@dataclass
class _Unary:
    wires: AsyncGenerator[Wire]

    def __await__(self) -> Generator[Any, None, Wire]:
        return self._only().__await__()

    async def _only(self) -> Wire:
        (wire,) = [wire async for wire in self.wires]
        return wire

    def cancel(self) -> None:
        pass


@dataclass
class _Streamed:
    wires: AsyncGenerator[Wire]

    def __aiter__(self) -> AsyncIterator[Wire]:
        return self.wires

    def cancel(self) -> None:
        pass


def end_of(plan: Plan) -> int:
    return sum(stage.steps for stage in plan.stages)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in virtual time, by whose clock deployments are measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_internals, "lacks_replicas", lambda handle: handle.gone)
        return run_in_virtual_time(main)


class Cluster:
    """A router over stand-ins."""

    def __init__(self, placement: dict[str, Any] = SPREAD, checkpoint_steps: int | None = 10) -> None:
        """Stand in for deployments of these stages, each on a pool that is called as it is."""
        self.deployments = {name: Deployment(name) for name in placement}
        placed = {name: Placement(stages=stages, pool=name) for name, stages in placement.items()}
        self.pools = Balancer(placed, hang_factor=10.0, hang_floor_s=45.0)
        self.router = Router(self.deployments, self.pools, checkpoint_steps)

    def __getitem__(self, name: str) -> Deployment:
        return self.deployments[name]

    async def generate(
        self,
        name: str = "image",
        plan: Plan = LONG,
        partial_images: int = 0,
        timeout_s: float = 120.0,
        pools: dict[ServedStage, tuple[str, ...]] | None = None,
        tell: Callable[[int], object] | None = None,
    ) -> list[Partial | DecodedImage]:
        route = Route(
            image=ImageRequest(
                request_id=name, image_index=0, seed=7, size="128x128", prompt="a ring", negative_prompt=None
            ),
            plan=plan,
            preset=None,
            format="png",
            quality=90,
            partial_images=partial_images,
            deadline=time.time() + timeout_s,
            pools=pools or {},
        )
        async with aclosing(self.router.generate(route, tell)) as events:
            return [event async for event in events]

    async def image(self, name: str = "image", plan: Plan = LONG, timeout_s: float = 120.0) -> bytes:
        (done,) = await self.generate(name, plan, timeout_s=timeout_s)
        assert isinstance(done, DecodedImage)
        return done.data


def rpc_error(status: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata())


def failing(*failures: tuple[int, BaseException]) -> Before:
    """Fail before these steps, each once and in this order."""
    left = list(failures)

    async def before(call: Call, step: int) -> None:
        if left and left[0][0] == step:
            raise left.pop(0)[1]

    return before


def test_the_router_tells_of_each_step_and_from_where_a_lost_hop_goes_on() -> None:
    told: list[int] = []
    cluster = Cluster()
    cluster["Base"].before = failing((14, DIED))
    run(cluster.generate(tell=told.append))
    hop_ends = [0, 30, 32]
    assert [step for step in told if step in hop_ends] == [0, 30, 30, 32, 32]
    assert list(dict.fromkeys(told)) == list(range(33))
    assert told.count(13) == 2  # made again after the checkpoint at 10
    assert told.count(9) == 1


def test_an_undisturbed_image_takes_a_call_a_hop_and_those_without_checkpoints_are_unary() -> None:
    cluster = Cluster()
    assert run(cluster.image()) == b"image after 32"
    assert {name: deployment.unary for name, deployment in cluster.deployments.items()} == {
        "TextEncoder": 1, "Base": 0, "Bridge": 0, "Distilled": 1, "VAEDecoder": 1
    }  # fmt: skip
    assert cluster["Base"].attempts == [("image", 0, 30)]
    assert run(cluster.image(plan=PLANS["hybrid"])) == b"image after 6"
    assert cluster["Base"].unary == 1


@pytest.mark.parametrize(
    ("deployment", "step", "attempts"),
    [
        ("TextEncoder", 0, [("image", 0, 0), ("image", 0, 0)]),
        ("Base", 1, [("image", 0, 0), ("image", 0, 30)]),
        ("Base", 10, [("image", 0, 9), ("image", 0, 30)]),
        ("Base", 28, [("image", 0, 27), ("image", 20, 30)]),
        ("Distilled", 32, [("image", 30, 31), ("image", 30, 32)]),
        ("VAEDecoder", -1, [("image", 32, 32), ("image", 32, 32)]),
    ],
)
@pytest.mark.parametrize(
    "failure",
    [
        DIED,
        ActorDiedError(),
        rpc_error(grpc.StatusCode.INTERNAL),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hop_whose_replica_dies_is_called_again_from_the_last_packet(
    deployment: str, step: int, attempts: list[tuple[str, int, int]], failure: Exception
) -> None:
    cluster = Cluster()
    cluster[deployment].before = failing((step, failure))
    assert run(cluster.image()) == b"image after 32"
    assert cluster[deployment].attempts == attempts
    others = [other.attempts for name, other in cluster.deployments.items() if name not in (deployment, "Bridge")]
    assert all(len(attempts) == 1 for attempts in others)


def test_without_checkpoints_a_stage_begins_anew() -> None:
    cluster = Cluster(checkpoint_steps=None)
    cluster["Base"].before = failing((28, DIED))
    assert run(cluster.image()) == b"image after 32"
    assert cluster["Base"].attempts == [("image", 0, 27), ("image", 0, 30)]


def test_partial_images_are_neither_shown_twice_nor_out_of_order() -> None:
    """Previews after steps 8, 16 and 24; the second and the third attempt pass by the first two again."""
    cluster = Cluster(checkpoint_steps=None)
    cluster["Base"].before = failing((17, DIED))
    cluster["VAEDecoder"].before = failing((-1, DIED))  # of the first preview
    *partials, done = run(cluster.generate(partial_images=3))
    assert [partial.order for partial in partials if isinstance(partial, Partial)] == [0, 1, 2]
    assert isinstance(done, DecodedImage)
    assert done.data == b"image after 32"
    assert cluster["Base"].attempts == [("image", 0, 16), ("image", 0, 30)]
    assert len(cluster["VAEDecoder"].attempts) == 5


def test_two_deaths_without_progress_in_between_end_the_request() -> None:
    cluster = Cluster()
    cluster["Base"].before = failing(*[(15, DIED)] * 5)
    with pytest.raises(APIError) as caught:
        run(cluster.image())
    assert (caught.value.status, caught.value.code, caught.value.headers) == (503, "replica_lost", {"Retry-After": "1"})
    assert caught.value.body["error"]["type"] == "server_error"
    assert cluster["Base"].attempts == [("image", 0, 14), ("image", 10, 14)]


def test_an_image_that_got_further_since_is_not_blamed() -> None:
    cluster = Cluster()
    cluster["Base"].before = failing((15, DIED), (25, DIED))
    cluster["Distilled"].before = failing((31, DIED))
    cluster["VAEDecoder"].before = failing((-1, DIED))
    assert run(cluster.image()) == b"image after 32"
    assert cluster["Base"].attempts == [("image", 0, 14), ("image", 10, 24), ("image", 20, 30)]


class Poisoned:
    """A deployment's replica, of which there is always one, and in which all images die with the poison.

    Attributes:
        deaths: how many replicas died.
        most: most images that were ever in a replica.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._death = asyncio.Event()
        self._inside = 0
        self.deaths = self.most = 0

    async def before(self, call: Call, step: int) -> None:
        death = self._death
        self._inside += 1
        self.most = max(self.most, self._inside)
        await asyncio.sleep(0.1)
        self._inside -= 1
        if call.route.image.request_id == "poison" and step == self._step and not death.is_set():
            self.deaths += 1
            self._death = asyncio.Event()
            death.set()
        if death.is_set():
            raise DIED


@pytest.mark.parametrize("step", [1, 7, 10, 11, 25, 30])
@pytest.mark.parametrize("poisons", [1, 2])
def test_what_kills_is_given_up_after_two_deaths_and_takes_no_third_replica_nor_another_image(
    step: int, poisons: int
) -> None:
    """Images in the same replicas go on: of those that were there at a death, one at a time is tried again."""

    async def play() -> tuple[Poisoned, dict[str, list[bytes | BaseException]]]:
        cluster, poisoned = Cluster(), Poisoned(step)
        cluster["Base"].before = poisoned.before
        names = ["poison"] * poisons + [f"innocent {number}" for number in range(7)]
        answers = await asyncio.gather(*(cluster.image(name) for name in names), return_exceptions=True)
        results: dict[str, list[bytes | BaseException]] = {}
        for name, answer in zip(names, answers, strict=True):
            results.setdefault(name, []).append(answer)
        return poisoned, results

    poisoned, results = run(play())
    blamed = results.pop("poison")
    assert [answer.code if isinstance(answer, APIError) else answer for answer in blamed] == ["replica_lost"] * poisons
    assert all(answers == [b"image after 32"] for answers in results.values()), results
    assert poisoned.deaths == 1 + poisons  # the first of them with all, and one for each that is found out
    assert poisoned.most == 7 + poisons


def test_a_suspect_makes_room_for_the_next_as_soon_as_it_got_further() -> None:
    """Four images die in their fifth step; each is then alone up to the tenth, its first checkpoint, and no longer."""
    cluster = Cluster()
    died, steps = set(), {}
    young, old = [], []

    async def before(call: Call, step: int) -> None:
        name = call.route.image.request_id
        if name not in died:
            if step == 5:
                died.add(name)
                raise DIED
            return
        steps[name] = step
        young.append(sum(1 <= each <= 10 for each in steps.values()))
        old.append(sum(11 <= each < 30 for each in steps.values()))

    async def play() -> list[bytes]:
        cluster["Base"].before = before
        return await asyncio.gather(*(cluster.image(f"image {number}") for number in range(4)))

    assert run(play()) == [b"image after 32"] * 4
    assert (max(young), max(old)) == (1, 2)


def test_another_deployment_of_the_stage_takes_over() -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",)})
    cluster["Base"].before = cluster["Second"].before = failing((15, DIED))
    assert run(cluster.image()) == b"image after 32"
    assert sorted(cluster["Base"].attempts + cluster["Second"].attempts) == [("image", 0, 14), ("image", 10, 30)]
    assert len(cluster["Base"].attempts) == 1


@pytest.mark.parametrize(
    ("pools", "where"),
    [(("Base",), ["Base", "Base"]), (("Base", "Third"), ["Base", "Third"]), (("Second",), ["Second"])],
)
def test_what_is_lost_goes_on_where_the_request_lets_it(pools: tuple[str, ...], where: list[str]) -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",), "Third": ("base",)})
    cluster["Base"].before = failing((15, DIED))
    (done,) = run(cluster.generate(pools={"base": pools}))
    assert isinstance(done, DecodedImage)
    assert done.data == b"image after 32"
    attempts = [(name, *attempt) for name in ("Base", "Second", "Third") for attempt in cluster[name].attempts]
    assert [name for name, *_ in attempts] == where
    assert attempts[-1][2:] == ((10, 30) if len(where) == 2 else (0, 30))


def test_what_is_left_of_a_plan_is_shared_out_anew() -> None:
    """Also where the deployments that are left divide it otherwise."""
    together = {"Text": ("encode",), "All": ("base", "bridge", "distilled", "decode")}
    cluster = Cluster({**together, "Tail": ("distilled",), "Pixels": ("decode",)}, checkpoint_steps=1)
    cluster["All"].before = failing((32, DIED))
    assert run(cluster.image()) == b"image after 32"
    attempts = {name: deployment.attempts for name, deployment in cluster.deployments.items() if name != "Text"}
    assert attempts == {"All": [("image", 0, 31)], "Tail": [("image", 31, 32)], "Pixels": [("image", 32, 32)]}


def test_with_no_replica_yet_only_the_deadline_counts() -> None:
    """Serve holds a call until there is a replica."""
    cluster = Cluster()
    held = asyncio.Event()

    async def before(call: Call, step: int) -> None:
        if len(cluster["Base"].attempts) == 1:
            raise DIED
        await held.wait()

    cluster["Base"].before = before
    with pytest.raises(APIError) as caught:
        run(cluster.image(timeout_s=300.0))
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    assert len(cluster["Base"].attempts) == 2


def test_where_all_replicas_are_gone_another_deployment_takes_over() -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",)})

    async def play() -> list[bytes]:
        done = [await cluster.image(f"measured {number}") for number in range(2)]  # one in each
        cluster["Base"].gone, cluster["Base"].healthy = True, False
        done += await asyncio.gather(*(cluster.image(f"image {number}") for number in range(4)))
        assert (len(cluster["Base"].attempts), len(cluster["Second"].attempts)) == (1, 5)
        cluster["Base"].gone, cluster["Base"].healthy = False, True
        while cluster.pools.avoids("Base"):
            await asyncio.sleep(0.1)
        return done + await asyncio.gather(*(cluster.image(f"both {number}") for number in range(4)))

    assert run(play()) == [b"image after 32"] * 10
    assert len(cluster["Base"].attempts) > 1


def test_a_deployment_that_never_had_a_replica_is_passed_over() -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",)})
    cluster["Base"].gone, cluster["Base"].healthy = True, False

    async def play() -> list[bytes]:
        done = await asyncio.gather(*(cluster.image(f"image {number}") for number in range(4)))
        assert (len(cluster["Base"].attempts), len(cluster["Second"].attempts)) == (0, 4)
        cluster["Base"].gone, cluster["Base"].healthy = False, True
        while cluster.pools.avoids("Base"):
            await asyncio.sleep(0.1)
        return done + await asyncio.gather(*(cluster.image(f"both {number}") for number in range(4)))

    assert run(play()) == [b"image after 32"] * 8
    assert cluster["Base"].attempts


@pytest.mark.parametrize("measured", [True, False])
def test_where_all_replicas_of_the_only_deployment_are_gone_serve_holds_the_image(measured: bool) -> None:
    cluster = Cluster()

    async def play() -> bytes:
        if measured:
            await cluster.image("measured")
        cluster["Base"].gone = True
        return await cluster.image()

    assert run(play()) == b"image after 32"  # as the stand-in begins at once
    assert cluster["Base"].attempts[measured:] == [("image", 0, 30)]


@pytest.mark.parametrize("images", [1, 8])
def test_a_time_without_replicas_does_not_count_as_work(images: int) -> None:
    """The first image comes before anyone knows that none is left, and is held as the others are."""
    cluster = Cluster()
    back = asyncio.Event()

    async def held(call: Call, step: int) -> None:
        cluster["Base"].gone = not back.is_set()
        await back.wait()

    async def play() -> None:
        await cluster.image("measured")
        cost = cluster.pools._costs["Base"]
        before = cost.seconds, cost.seconds_among(images)
        cluster["Base"].before = held
        async with asyncio.TaskGroup() as waiting:
            for number in range(images):
                waiting.create_task(cluster.image(f"image {number}"))
                await asyncio.sleep(1.0)
            await asyncio.sleep(60.0)
            back.set()
        assert (cost.seconds, cost.seconds_among(images)) == before
        await cluster.image("after")  # is measured again
        assert cost.seconds != before[0]
        assert cost.seconds == pytest.approx(before[0], rel=0.1)

    run(play())


def test_an_attempt_that_hangs_is_cancelled_and_made_elsewhere() -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",)})

    async def play() -> list[bytes]:
        done = [await cluster.image(f"measured {number}") for number in range(2)]  # one in each
        hung = cluster["Base"]
        hung.healthy = False

        async def stops(call: Call, step: int) -> None:
            if step == 25:
                await asyncio.Event().wait()

        hung.before = stops
        return done + await asyncio.gather(*(cluster.image(f"image {number}") for number in range(4)))

    assert run(play()) == [b"image after 32"] * 6
    hung = [attempt for attempt in cluster["Base"].attempts if attempt[2] == 24]
    assert hung
    assert cluster["Base"].cancelled == len(hung)
    for name, _, _ in hung:
        assert (name, 20, 30) in cluster["Second"].attempts


def test_a_hang_is_blamed_on_nobody_since_it_may_have_been_a_queue() -> None:
    """It stays a suspect of a single death, and in a deployment without others it is tried again there."""
    cluster = Cluster()

    async def before(call: Call, step: int) -> None:
        if step == 5 and len(cluster["Base"].attempts) == 2:
            await asyncio.Event().wait()
        if step == 5 and len(cluster["Base"].attempts) == 3:
            raise DIED

    async def play() -> bytes:
        await cluster.image("measured")
        cluster["Base"].before = before
        return await cluster.image()

    assert run(play()) == b"image after 32"
    assert cluster["Base"].attempts == [("measured", 0, 30), ("image", 0, 4), ("image", 0, 4), ("image", 0, 30)]
    assert cluster["Base"].cancelled == 1


def test_a_stall_is_blamed_as_a_death_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    stalls = 0

    async def stalls_twice(call: Call, packet: bytes) -> AsyncGenerator[Wire]:
        nonlocal stalls
        stalls += 1
        yield StalledReply(begun=stalls <= 2).to_json(), b""

    monkeypatch.setattr(cluster["Base"], "work", stalls_twice)
    with pytest.raises(APIError) as caught:
        run(cluster.image())
    assert caught.value.code == "replica_lost"
    assert stalls == 2


@pytest.mark.parametrize("reply", ["stalled", "unavailable"])
def test_a_deployment_that_takes_no_work_is_asked_again(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More often than replicas may die, since nothing was begun."""
    cluster = Cluster()
    work, refusals = cluster["Base"].work, 5

    async def refuses(call: Call, packet: bytes) -> AsyncGenerator[Wire]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            if reply == "unavailable":
                raise DeploymentUnavailableError("Base")
            yield StalledReply(begun=False).to_json(), b""
            return
        async for wire in work(call, packet):
            yield wire

    monkeypatch.setattr(cluster["Base"], "work", refuses)
    assert run(cluster.image()) == b"image after 32"
    assert (refusals, len(cluster["Base"].attempts)) == (0, 1)


def test_a_deployment_is_avoided_until_a_health_check_passes() -> None:
    cluster = Cluster({**SPREAD, "Second": ("base",)})
    for name in ("Base", "Second"):
        cluster[name].healthy = False
    cluster["Base"].before = cluster["Second"].before = failing((5, DIED))

    async def play() -> None:
        await cluster.image()
        (bad,) = [name for name in ("Base", "Second") if cluster.pools.avoids(name)]
        for number in range(5):
            await cluster.image(f"avoiding {number}")  # which takes seconds, in which it is asked
        assert len(cluster[bad].attempts) == 1
        assert cluster.pools.avoids(bad)
        cluster[bad].healthy = True
        while cluster.pools.avoids(bad):
            await asyncio.sleep(0.1)
        await asyncio.gather(*(cluster.image(f"both {number}") for number in range(4)))
        assert len(cluster[bad].attempts) > 1
        assert not cluster.router._probes

    run(play())


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (RuntimeError("a bug"), 500, "internal_error"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 503, "overloaded"),
        (TimeoutError("the replica's own"), 504, "deadline_exceeded"),
        (rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED), 500, "internal_error"),  # a packet that is too long anywhere
    ],
)
def test_other_failures_are_final(failure: Exception, status: int, code: str) -> None:
    cluster = Cluster()
    cluster["Base"].before = failing((5, failure))
    with pytest.raises(APIError) as caught:
        run(cluster.image())
    assert (caught.value.status, caught.value.code) == (status, code)
    assert len(cluster["Base"].attempts) == 1


def test_a_refusal_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()

    async def refuses(call: Call, packet: bytes) -> AsyncGenerator[Wire]:
        yield RefusalReply(code="not_finite", message="the image is not finite").to_json(), b""

    monkeypatch.setattr(cluster["Base"], "work", refuses)
    with pytest.raises(APIError, match="not finite"):
        run(cluster.image())


def test_a_reply_of_another_major_version_is_refused_by_the_deployments_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()

    async def answers(call: Call, packet: bytes) -> AsyncGenerator[Wire]:
        yield PacketReply(version=Version(VERSION.major + 1, 0)).to_json(), b""

    monkeypatch.setattr(cluster["Base"], "work", answers)
    sentence = (
        f"Base and the router are of versions that do not go together: "
        f"a message of version {VERSION.major + 1}.0, where version {VERSION} is read"
    )
    with pytest.raises(APIError, match=f"^{sentence}$") as caught:
        run(cluster.image())
    assert (caught.value.status, caught.value.code) == (500, "other_version")


def test_a_client_that_goes_away_cancels_what_was_resumed() -> None:
    cluster = Cluster()
    resumed = asyncio.Event()

    async def before(call: Call, step: int) -> None:
        if len(cluster["Base"].attempts) == 1 and step == 5:
            raise DIED
        if len(cluster["Base"].attempts) == 2:
            resumed.set()
            await asyncio.Event().wait()

    async def play() -> None:
        cluster["Base"].before = before
        image = asyncio.create_task(cluster.image())
        await resumed.wait()
        image.cancel()
        await asyncio.wait([image])
        assert image.cancelled()
        assert not cluster.router._suspects["Base"].locked()

    run(play())
    assert cluster["Base"].cancelled == 1
