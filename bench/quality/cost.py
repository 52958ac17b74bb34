"""Latency of plans, measured in turns, because the speed of a shared machine drifts from minute to minute."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.pipeline import Pipeline, Prompted, Result
from stages.plan import Plan


@dataclass(frozen=True)
class Cost:
    """Cost of an image by one plan; times are medians.

    Attributes:
        nfe: network evaluations; blocks that a cache skipped are not counted.
        encode, denoise, decode: seconds of an image generated alone.
        denoise_batched: seconds per image of a batch.
        speed_up, speed_up_batched: the base plan's `denoise` and `denoise_batched` over this plan's.
    """

    nfe: float
    encode: float
    denoise: float
    decode: float
    denoise_batched: float
    speed_up: float
    speed_up_batched: float


def take_turns(
    pipeline: Pipeline, plans: Sequence[Plan], prompted: Sequence[Prompted], *, turns: int = 5, batch: int = 8
) -> list[Cost]:
    """Measure the cost of plans, which take turns: every plan generates an image before any generates its next.

    Args:
        pipeline: the model; its config must have a plan called `base`.
        plans: the plans to measure.
        prompted: the images to generate.
        turns: how many of the images each plan generates alone.
        batch: how many of the images form the batch.

    Returns:
        A cost for each plan, in the order of `plans`.
    """
    base = pipeline.config.plan("base")
    every = [*plans] if base in plans else [*plans, base]
    together = prompted[:batch]
    alone = _draw(pipeline, every, [[one] for one in prompted[:turns]])
    denoise = [_median(results, _denoises) for results in alone]
    batched = [_median(results, _denoises) / len(together) for results in _draw(pipeline, every, [together] * 3)]
    base_alone, base_batched = denoise[every.index(base)], batched[every.index(base)]
    return [
        Cost(
            nfe=statistics.fmean(result.nfe for result in alone[index]),
            encode=_median(alone[index], lambda stage: stage == "encode"),
            denoise=denoise[index],
            decode=_median(alone[index], lambda stage: stage == "decode"),
            denoise_batched=batched[index],
            speed_up=base_alone / denoise[index],
            speed_up_batched=base_batched / batched[index],
        )
        for index in range(len(plans))
    ]


def _draw(pipeline: Pipeline, plans: Sequence[Plan], batches: Sequence[Sequence[Prompted]]) -> list[list[Result]]:
    """Run every batch by every plan in turn, after a warm-up; return each plan's first result of every batch."""
    for plan in plans:
        pipeline.run_batch(plan, batches[0])
    rounds = [[pipeline.run_batch(plan, batch)[0] for plan in plans] for batch in batches]
    return [list(results) for results in zip(*rounds, strict=True)]


def _denoises(stage: str) -> bool:
    return stage not in ("encode", "decode")


def _median(results: Sequence[Result], of: Callable[[str], bool]) -> float:
    """Return the median, over results, of the seconds spent in the stages for whose names `of` is true."""
    return statistics.median(
        sum(span.end - span.start for span in result.spans if of(span.stage)) for result in results
    )
