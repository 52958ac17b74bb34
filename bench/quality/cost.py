"""What plans cost, measured side by side: on a shared machine one minute is slower than the next."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.pipeline import Pipeline, Prompted, Result
from stages.plan import Plan


@dataclass(frozen=True)
class Cost:
    """Of one plan; medians of seconds.

    Attributes:
        nfe: network evaluations of an image; what a cache skipped is not counted.
        encode, denoise, decode: seconds of one image alone.
        denoise_batched: seconds an image of a batch.
        speed_up, speed_up_batched: of `denoise` and `denoise_batched` over those of the base plan.
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
    """Costs of `plans`; each draws one image, and then a batch, before any draws its next.

    Args:
        prompted: what they draw, of which `turns` are drawn alone.
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
    """Plan by plan the first result of each batch; one before them, to warm up, is not told."""
    for plan in plans:
        pipeline.run_batch(plan, batches[0])
    rounds = [[pipeline.run_batch(plan, batch)[0] for plan in plans] for batch in batches]
    return [list(results) for results in zip(*rounds, strict=True)]


def _denoises(stage: str) -> bool:
    return stage not in ("encode", "decode")


def _median(results: Sequence[Result], of: Callable[[str], bool]) -> float:
    """Seconds of a result's stages `of` a kind, added up."""
    return statistics.median(
        sum(span.end - span.start for span in result.spans if of(span.stage)) for result in results
    )
