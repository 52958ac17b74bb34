"""A replica in this process: what it hands out on the way, and what it does when its device stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from threading import Event
from typing import Any, Protocol, TypeVar

import pytest
import torch
from plans import PLANS

from deployments.messages import Call, Hop, ImageRequest, Reply, Route, StalledReply, Start, Wire, read_reply
from deployments.replica import StageReplica
from deployments.settings import SERVED_STAGES, Placement
from deployments.workers import DecodeWorker
from stages.config import ModelConfig
from stages.packet import LatentPacket
from stages.plan import Plan

T = TypeVar("T")

ALL = Placement(stages=SERVED_STAGES)
LONG = Plan.model_validate({"stages": [{"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": 6}]})


class Run(Protocol):
    def __call__(self, coro: Coroutine[Any, Any, T], /) -> T: ...


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs in the one event loop of a replica's life."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def replica(config: ModelConfig) -> Iterator[StageReplica]:
    decode_batch = DecodeWorker._to_pixels.__wrapped__  # Serve batches calls only in its own processes

    async def decode_one(self: DecodeWorker, latent: tuple[torch.Tensor, tuple[int, int]]) -> Any:
        (image,) = await decode_batch(self, [latent])
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeWorker, "_to_pixels", decode_one)
        yield StageReplica(Start(model=config, placement=ALL, stall_timeout_s=30.0).to_json())


def call_of(hop: Hop, plan: Plan = LONG, seed: int = 3) -> str:
    image = ImageRequest(
        request_id="r", image_index=0, seed=seed, size="64x64", prompt="a ring", negative_prompt="blue"
    )  # fmt: skip
    route = Route(
        image=image, plan=plan, preset=None, format="png", quality=90, partial_images=0, deadline=time.time() + 600
    )
    return Call(route=route, hop=hop).to_json()


async def stream(replica: StageReplica, call: str, packet: bytes = b"") -> list[tuple[Reply, bytes]]:
    return [(read_reply(header), data) async for header, data in replica.stream(call, packet)]


def test_an_image_that_goes_on_from_a_checkpoint_ends_as_the_same_file(replica: StageReplica, run: Run) -> None:
    hop = Hop(deployment="All", end=1, previews=(2, 5), checkpoints=(2, 4), decodes=True)
    *during, (last, file) = run(stream(replica, call_of(hop)))
    handed = [(reply.kind, reply.step) for reply, _ in during if reply.kind in ("preview", "checkpoint")]
    assert handed == [("preview", 2), ("checkpoint", 2), ("checkpoint", 4), ("preview", 5)]
    for _, preview in (during[0], during[3]):
        shown, _ = run(replica.run(call_of(Hop(deployment="All", end=1, decodes=True)), preview))
        assert read_reply(shown).kind == "image"
        assert not LatentPacket.from_bytes(preview).prompt_embeds.numel()
    for _, packet in during[1:3]:
        assert LatentPacket.from_bytes(packet).step in (2, 4)
        resumed, same_file = run(replica.run(call_of(hop), packet))
        assert read_reply(resumed).kind == last.kind == "image"
        assert same_file == file
    final = run(stream(replica, call_of(hop), during[1][1]))
    assert [reply.kind for reply, _ in final] == ["checkpoint", "preview", "image"]


def test_a_hop_that_is_to_tell_of_its_steps_tells_of_each(replica: StageReplica, run: Run) -> None:
    hop = Hop(deployment="All", end=1, checkpoints=(2,), decodes=True, tells=True)
    *during, (last, _) = run(stream(replica, call_of(hop)))
    handed = [(reply.kind, reply.step, bool(data)) for reply, data in during if reply.kind in ("step", "checkpoint")]
    steps = [("step", step, False) for step in range(1, 7)]
    assert handed == [*steps[:2], ("checkpoint", 2, True), *steps[2:]]
    assert last.kind == "image"


def test_a_hop_ends_where_its_stages_do(replica: StageReplica, run: Run) -> None:
    encoded = run(replica.run(call_of(Hop(deployment="All"), PLANS["hybrid"]), b""))[1]
    assert LatentPacket.from_bytes(encoded).position == 0
    based = run(replica.run(call_of(Hop(deployment="All", end=3), PLANS["hybrid"]), encoded))[1]
    assert LatentPacket.from_bytes(based).position == 3
    done = run(replica.run(call_of(Hop(deployment="All", end=5), PLANS["hybrid"]), based))[1]
    assert LatentPacket.from_bytes(done).position == 5


class Gate:
    """Stops what passes through it until it is opened."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self.entered, self.opened = Event(), Event()

    def __call__(self, *args: Any) -> Any:
        self.entered.set()
        assert self.opened.wait(600)
        return self._work(*args)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Call it to let seconds pass, as a pulse sees them."""
    now, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + passed[0])

    def pass_seconds(seconds: float) -> None:
        passed[0] += seconds

    return pass_seconds


@pytest.mark.parametrize("at", ["encoder", "transformer", "decoder"])
def test_a_replica_whose_device_stands_still_fails_its_health_check_and_takes_no_work(
    replica: StageReplica, run: Run, at: str, monkeypatch: pytest.MonkeyPatch, pass_time: Callable[[float], None]
) -> None:
    assert replica._components.encoder
    assert replica._components.transformer
    assert replica._components.decoder
    owner, name = {
        "encoder": (replica._components.encoder._encoder, "begin"),
        "transformer": (replica._components.transformer._batcher._denoiser, "step"),
        "decoder": (replica._components.decoder._decoder, "decode"),
    }[at]
    gate = Gate(getattr(owner, name))
    monkeypatch.setattr(owner, name, gate)
    call = call_of(Hop(deployment="All", end=1, decodes=True))

    async def play() -> tuple[Wire, Wire]:
        held = asyncio.create_task(replica.run(call, b""))
        await asyncio.to_thread(gate.entered.wait, 600)
        await replica.check_health()
        pass_time(29.0 - replica_pulse(replica))
        await replica.check_health()
        pass_time(2.0)
        with pytest.raises(RuntimeError, match="at one piece of work for longer than 30 s"):
            await replica.check_health()
        handed_back = await held
        refused = await replica.run(call, b"")
        assert await stream(replica, call) == [(StalledReply(begun=False), b"")]
        gate.opened.set()
        return refused, handed_back

    refused, handed_back = run(play())
    assert (read_reply(refused[0]), refused[1]) == (StalledReply(begun=False), b"")
    assert (read_reply(handed_back[0]), handed_back[1]) == (StalledReply(begun=True), b"")
    while replica_pulse(replica):  # what the device is still at is for nobody
        time.sleep(0.001)
    run(replica.check_health())
    assert read_reply(run(replica.run(call, b""))[0]).kind == "image"


def replica_pulse(replica: StageReplica) -> float:
    """Seconds of the piece of work at hand."""
    workers = (replica._components.encoder, replica._components.transformer, replica._components.decoder)
    return max(worker.pulse.seconds for worker in workers if worker)


def test_a_device_that_has_nothing_to_do_does_not_stall(
    replica: StageReplica, run: Run, pass_time: Callable[[float], None]
) -> None:
    pass_time(3600.0)
    run(replica.check_health())
    assert read_reply(run(replica.run(call_of(Hop(deployment="All")), b""))[0]).kind == "packet"
