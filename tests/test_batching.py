"""Requests that share a device, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import pytest
import torch
from plans import PLANS

from stages.batching import StepBatcher
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.plan import (
    AttentionGuidanceSpec,
    CacheSpec,
    FirstBlockSpec,
    MagCacheSpec,
    Plan,
    SeaCacheSpec,
    StageSpec,
    TaylorSeerSpec,
    TeaCacheSpec,
)
from stages.stage import StageRun

TOLERANCE = 1e-5  # of the latent's largest value: float32 orders its sums by the shape of the batch
SMALL, LARGE = "64x64", "128x128"  # 16 and 64 tokens


STAGE = StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=1)


def plan_of(
    steps: int, *, guidance_scale: float = 1.0, adapter: str | None = None, cache: CacheSpec | None = None
) -> Plan:
    own = {"steps": steps, "guidance_scale": guidance_scale, "adapter": adapter, "cache": cache}
    return Plan(stages=(STAGE.model_copy(update=own),))


GUIDED = plan_of(3, guidance_scale=4.0)
CACHED = plan_of(5, guidance_scale=4.0, cache=TaylorSeerSpec(interval=2, warmup=2))


def packet_of(pipeline: Pipeline, seed: int, size: str = SMALL, prompt: str = "a red ring") -> LatentPacket:
    return pipeline.encoder.begin(f"request {seed}", 0, seed, size, prompt, "blue")


@pytest.fixture
def batcher(pipeline: Pipeline) -> StepBatcher:
    return StepBatcher(pipeline.denoiser, max_tokens=128)


def steps(batcher: StepBatcher) -> list[list[int]]:
    """Seeds of each batch until there is nothing left to do."""
    return [[packet.seed for packet in batch] for batch in iter(batcher.step, [])]


def test_a_packet_joins_and_leaves_between_steps(pipeline: Pipeline, batcher: StepBatcher) -> None:
    first = batcher.submit(packet_of(pipeline, 1), plan_of(3))
    assert [packet.seed for packet in batcher.step()] == [1]
    second = batcher.submit(packet_of(pipeline, 2, prompt="a large furry star on a white background"), GUIDED)
    assert steps(batcher) == [[1, 2], [1, 2], [2]]
    assert first.done()
    assert second.result(0).sigma == 0.0


def test_an_image_does_not_depend_on_its_batch_mates(pipeline: Pipeline, batcher: StepBatcher) -> None:
    """Other plans, stages, adapters, prompts, guidance and caches, joining at other steps."""
    hybrid = PLANS["hybrid"]
    jobs: list[tuple[LatentPacket, Plan]] = [
        (packet_of(pipeline, seed, prompt=prompt), plan)
        for seed, (plan, prompt) in enumerate(
            [(GUIDED, "a star"), (CACHED, "a small striped heart on the left"), (PLANS["distilled"], "a moon")],
            start=3,  # from 0 the first latent ends so near zero that rounding alone is 1e-5 of it
        )
    ]
    (bridged,) = pipeline.denoiser.denoise([packet_of(pipeline, 9)], hybrid)
    jobs += [(bridged, hybrid), (packet_of(pipeline, 10), hybrid)]
    futures = []
    for packet, plan in jobs:
        futures.append(batcher.submit(packet, plan))
        batcher.step()
    steps(batcher)
    for (packet, plan), future in zip(jobs, futures, strict=True):
        (alone,) = pipeline.denoiser.denoise([packet], plan)
        together = future.result(0)
        assert (together.latent - alone.latent).abs().max() < TOLERANCE * alone.latent.abs().max()
        assert together.spans[-1].nfe == alone.spans[-1].nfe
        assert (together.sigma, together.position) == (alone.sigma, alone.position)


def test_a_batch_is_bounded_by_image_tokens_and_guided_images_count_twice(
    pipeline: Pipeline, batcher: StepBatcher
) -> None:
    for seed in range(10):
        batcher.submit(packet_of(pipeline, seed), plan_of(1))
    assert steps(batcher) == [list(range(8)), [8, 9]]
    for seed in range(6):
        batcher.submit(packet_of(pipeline, seed), plan_of(1, guidance_scale=2.0))
    assert steps(batcher) == [[0, 1, 2, 3], [4, 5]]
    batcher.submit(packet_of(pipeline, 0, "256x256"), plan_of(1))  # 256 tokens, more than a batch may have
    assert steps(batcher) == [[0]]


def test_sizes_do_not_share_a_batch_and_the_oldest_goes_first(pipeline: Pipeline, batcher: StepBatcher) -> None:
    for seed, size in enumerate((LARGE, SMALL, LARGE, SMALL)):
        batcher.submit(packet_of(pipeline, seed, size), plan_of(2))
    assert steps(batcher) == [[0, 2], [0, 2], [1, 3], [1, 3]]


def test_a_stream_of_newcomers_does_not_starve_an_older_packet_of_another_size(
    pipeline: Pipeline, batcher: StepBatcher
) -> None:
    batcher.submit(packet_of(pipeline, 0), plan_of(2))
    waiting = batcher.submit(packet_of(pipeline, 1, LARGE), plan_of(1))
    for seed in range(2, 12):
        batcher.submit(packet_of(pipeline, seed), plan_of(2))
        batcher.step()
        if waiting.done():
            break
    assert seed < 6


def test_the_earliest_deadline_goes_first(pipeline: Pipeline, batcher: StepBatcher) -> None:
    batcher.submit(packet_of(pipeline, 0, LARGE), plan_of(2), deadline=200.0)
    batcher.step()
    batcher.submit(packet_of(pipeline, 1), plan_of(1), deadline=100.0)
    assert steps(batcher) == [[1], [0]]


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_cancelled_packet_takes_no_further_step(
    pipeline: Pipeline, batcher: StepBatcher, blocks_run: list[int], done: int
) -> None:
    future = batcher.submit(packet_of(pipeline, 0), plan_of(5))
    other = batcher.submit(packet_of(pipeline, 1), plan_of(4))
    for _ in range(done):
        batcher.step()
    future.cancel()
    assert steps(batcher) == [[1]] * (4 - done)
    assert len(blocks_run) == 4
    assert other.result(0).seed == 1


def test_a_packet_that_cannot_enter_fails_alone(pipeline: Pipeline, batcher: StepBatcher) -> None:
    (late,) = pipeline.denoiser.denoise([packet_of(pipeline, 0)], PLANS["hybrid"])
    base = StageSpec(name="base", sigma_start=1.0, sigma_end=0.5, steps=1)
    bridge = StageSpec(name="bridge", sigma_start=0.5, sigma_end=0.0, steps=1)
    bad = batcher.submit(late, Plan(stages=(base, bridge)))
    good = batcher.submit(packet_of(pipeline, 1), plan_of(1))
    steps(batcher)
    with pytest.raises(ValueError, match=r"packet at sigma 0\.965 cannot enter bridge at 0\.5"):
        bad.result(0)
    assert good.result(0).seed == 1


def test_an_adapter_that_is_not_here_fails_its_own_packet_alone(pipeline: Pipeline, batcher: StepBatcher) -> None:
    bad = batcher.submit(packet_of(pipeline, 0), plan_of(1, adapter="refiner"))
    good = batcher.submit(packet_of(pipeline, 1), plan_of(1))
    steps(batcher)
    with pytest.raises(ValueError, match=r"adapter must be one of \['bridge', 'distilled', 'finish'\], not 'refiner'"):
        bad.result(0)
    assert good.result(0).seed == 1


def test_a_step_that_fails_fails_its_batch_and_no_other(pipeline: Pipeline, batcher: StepBatcher) -> None:
    failing = batcher.submit(packet_of(pipeline, 0), plan_of(1))
    broken = packet_of(pipeline, 1)
    object.__setattr__(broken, "prompt_embeds", torch.zeros(3, 7))  # of another width than the model's
    also = batcher.submit(broken, plan_of(1))
    later = batcher.submit(packet_of(pipeline, 2, LARGE), plan_of(1))
    steps(batcher)
    assert isinstance(failing.exception(0), RuntimeError)
    assert isinstance(also.exception(0), RuntimeError)
    assert later.result(0).seed == 2


def test_an_image_whose_preview_or_checkpoint_cannot_be_handed_out_fails_alone(
    pipeline: Pipeline, batcher: StepBatcher
) -> None:
    def refuse(step: int, packet: LatentPacket) -> None:
        raise OSError("nobody listens")

    failing = [
        batcher.submit(packet_of(pipeline, 0), plan_of(3), previews={1}, show=refuse),
        batcher.submit(packet_of(pipeline, 1), plan_of(3), checkpoints={2}, keep=refuse),
    ]
    whole = batcher.submit(packet_of(pipeline, 2), plan_of(3))
    assert steps(batcher) == [[0, 1, 2], [1, 2], [2]]
    for future in failing:
        with pytest.raises(OSError, match="nobody listens"):
            future.result(0)
    assert whole.result(0).seed == 2


@pytest.fixture
def running(batcher: StepBatcher) -> Iterator[StepBatcher]:
    thread = Thread(target=batcher.run)
    thread.start()
    yield batcher
    batcher.close()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_the_devices_thread_serves_many_callers_and_ends_when_closed(pipeline: Pipeline, running: StepBatcher) -> None:
    futures = [running.submit(packet_of(pipeline, seed), plan_of(2)) for seed in range(5)]
    time.sleep(0.05)
    futures += [running.submit(packet_of(pipeline, seed), GUIDED) for seed in range(5, 8)]
    assert [future.result(30).seed for future in futures] == list(range(8))
    running.close()
    with pytest.raises(RuntimeError, match="takes no more work"):
        running.submit(packet_of(pipeline, 0), GUIDED)


def test_a_packet_goes_through_several_stages_in_one_go(pipeline: Pipeline, batcher: StepBatcher) -> None:
    hybrid = PLANS["hybrid"]
    packet = expected = packet_of(pipeline, 3)
    future = batcher.submit(packet, hybrid, stages=4)
    assert steps(batcher) == [[3]] * 5
    for _ in range(4):
        (expected,) = pipeline.denoiser.denoise([expected], hybrid)
    done = future.result(0)
    assert (done.position, done.sigma) == (4, 0.5)
    assert torch.equal(done.latent, expected.latent)


@pytest.mark.parametrize(
    "cache",
    [
        None,
        FirstBlockSpec(threshold=0.5),
        TaylorSeerSpec(interval=2, warmup=2),
        TeaCacheSpec(threshold=0.5),
        MagCacheSpec(threshold=0.5, ratios=(1.0, 1.0)),
        SeaCacheSpec(threshold=0.5),
    ],
    ids=lambda cache: cache and cache.kind,
)
def test_previews_of_steps_leave_the_image_and_its_caches_as_they_were(
    pipeline: Pipeline, batcher: StepBatcher, cache: CacheSpec | None
) -> None:
    plan, packet = plan_of(7, guidance_scale=4.0, cache=cache), packet_of(pipeline, 3)
    previews: list[LatentPacket] = []
    future = batcher.submit(packet, plan, previews=(2, 5), show=lambda step, preview: previews.append(preview))
    steps(batcher)
    alone = batcher.submit(packet, plan)
    steps(batcher)
    assert torch.equal(future.result(0).latent, alone.result(0).latent)
    assert future.result(0).spans[-1].nfe == alone.result(0).spans[-1].nfe
    task = pipeline.denoiser.begin(packet, plan)
    for preview, count in zip(previews, (2, 3), strict=True):
        for _ in range(count):
            pipeline.denoiser.step([task])
        assert torch.equal(preview.latent, task.state.denoised)


class Handed(list[tuple[int, LatentPacket]]):
    """What a batcher hands out during its steps, each with its step of the plan."""

    def __call__(self, step: int, packet: LatentPacket) -> None:
        self.append((step, packet))


def test_steps_of_previews_are_counted_over_the_plan(pipeline: Pipeline, batcher: StepBatcher) -> None:
    """The hybrid plan's base takes a step, a guided one and two more."""
    seen, later = Handed(), Handed()
    packet = packet_of(pipeline, 3)
    future = batcher.submit(packet, PLANS["hybrid"], stages=4, previews=(1, 3, 5), show=seen)
    steps(batcher)
    assert [(step, preview.position, preview.sigma) for step, preview in seen] == [(1, 5, 0), (3, 5, 0), (5, 5, 0)]
    assert future.result(0).position == 4
    (bridged,) = pipeline.denoiser.denoise([packet], PLANS["hybrid"])
    batcher.submit(bridged, PLANS["hybrid"], stages=3, previews=(1, 3, 5), show=later)
    steps(batcher)
    assert [step for step, _ in later] == [3, 5]
    assert torch.equal(later[0][1].latent, seen[1][1].latent)


def plan_like(**own: Any) -> Plan:
    return Plan(stages=(StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=6, **own),))


LONG = {
    "plain": plan_of(6),
    "guided": plan_of(6, guidance_scale=4.0),
    "guided by attention": plan_like(attention_guidance=AttentionGuidanceSpec()),
    "reading the negative prompt": plan_like(adapter="bridge", reads_negative=True),
    "by a student": plan_like(adapter="distilled", shift=3.0, skip_blocks=frozenset({1})),
}


@pytest.mark.parametrize("plan", LONG.values(), ids=LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_that_goes_on_from_a_checkpoint_is_bit_for_bit_the_same(
    pipeline: Pipeline, batcher: StepBatcher, plan: Plan, dtype: torch.dtype
) -> None:
    """Whatever the packets' dtype, since a checkpoint is in float32 as the steps are; and more than once."""
    packet, kept = packet_of(pipeline, 3), Handed()
    assert packet.negative_embeds is not None
    packet = replace(
        packet,
        latent=packet.latent.to(dtype),
        prompt_embeds=packet.prompt_embeds.to(dtype),
        negative_embeds=packet.negative_embeds.to(dtype),
    )
    future = batcher.submit(packet, plan, checkpoints=(2, 4), keep=kept)
    steps(batcher)
    whole = future.result(0)
    assert [(step, checkpoint.step, checkpoint.position) for step, checkpoint in kept] == [(2, 2, 0), (4, 4, 0)]
    again = Handed()
    resumed = batcher.submit(LatentPacket.from_bytes(kept[0][1].to_bytes()), plan, checkpoints=(4,), keep=again)
    assert steps(batcher) == [[3]] * 4
    once_more = batcher.submit(LatentPacket.from_bytes(again[0][1].to_bytes()), plan)
    assert steps(batcher) == [[3]] * 2
    for done in (resumed.result(0), once_more.result(0)):
        assert torch.equal(done.latent, whole.latent)
        assert done.latent.dtype == dtype
        assert (done.sigma, done.position, done.step) == (0.0, 1, 0)
        assert sum(span.nfe for span in done.spans) == whole.spans[-1].nfe


def test_a_checkpoint_after_a_stage_is_the_packet_of_the_next_one(pipeline: Pipeline, batcher: StepBatcher) -> None:
    """The hybrid plan's first part of base has one step; a cache that has done its work is in nobody's way."""
    packet, kept = packet_of(pipeline, 3), Handed()
    future = batcher.submit(packet, PLANS["hybrid"], stages=4, checkpoints=(1, 3), keep=kept)
    steps(batcher)
    assert [(step, checkpoint.position, checkpoint.step) for step, checkpoint in kept] == [(1, 1, 0), (3, 2, 1)]
    for _, checkpoint in kept:
        resumed = batcher.submit(checkpoint, PLANS["hybrid"], stages=4 - checkpoint.position)
        steps(batcher)
        assert torch.equal(resumed.result(0).latent, future.result(0).latent)
    first = STAGE.model_copy(update={"sigma_end": 0.5, "steps": 5, "cache": CACHED.stages[0].cache})
    cached = Plan(stages=(first, STAGE.model_copy(update={"sigma_start": 0.5, "steps": 2})))
    batcher.submit(packet, cached, stages=2, checkpoints=(5,), keep=kept)
    steps(batcher)
    assert (kept[-1][1].position, kept[-1][1].step) == (1, 0)


def test_a_cache_has_no_checkpoints_since_a_packet_does_not_hold_its_state(
    pipeline: Pipeline, batcher: StepBatcher
) -> None:
    asked = batcher.submit(packet_of(pipeline, 0), CACHED, checkpoints=(2,))
    amid = batcher.submit(replace(packet_of(pipeline, 1), step=2), CACHED)
    steps(batcher)
    with pytest.raises(ValueError, match="base has a cache, and no checkpoints"):
        asked.result(0)
    with pytest.raises(ValueError, match="packet at step 2 cannot enter base"):
        amid.result(0)


def test_a_packet_enters_a_stage_only_at_the_noise_level_of_its_step(pipeline: Pipeline, batcher: StepBatcher) -> None:
    packet, kept = packet_of(pipeline, 0), Handed()
    batcher.submit(packet, plan_of(5), checkpoints=(2,), keep=kept)
    steps(batcher)
    ((_, checkpoint),) = kept
    other = batcher.submit(replace(checkpoint, step=3), plan_of(5))
    past = batcher.submit(replace(checkpoint, step=5), plan_of(5))
    steps(batcher)
    with pytest.raises(ValueError, match=r"packet at sigma 0\.\d+ cannot enter base at 0\.\d+"):
        other.result(0)
    with pytest.raises(ValueError, match="packet at step 5 cannot enter base"):
        past.result(0)


def test_the_pulse_tells_how_long_a_step_has_taken(
    pipeline: Pipeline, running: StepBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, entered, released = [100.0], Event(), Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    step = pipeline.denoiser.step

    def stops(runs: Sequence[StageRun]) -> None:
        entered.set()
        assert released.wait(60)
        step(runs)

    monkeypatch.setattr(pipeline.denoiser, "step", stops)
    assert running.pulse.seconds == 0
    future = running.submit(packet_of(pipeline, 0), plan_of(1))
    assert entered.wait(60)
    now[0] = 142.0
    assert running.pulse.seconds == 42
    released.set()
    future.result(60)
    running.close()
    while running.pulse.seconds:
        time.sleep(0.001)
