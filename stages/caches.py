"""Step caches: what one image, on one side of guidance, remembers between its steps, and may skip by it.

Diffusers' hooks keep one state for a whole forward pass. Here every row of a batch has its own, so that rows of
different requests can share a pass and only those that must be computed are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Protocol

import torch

from stages.plan import CacheSpec, FirstBlockSpec, TaylorSeerSpec


@dataclass(frozen=True)
class Evaluation:
    """One row's full pass through the transformer.

    Attributes:
        head: (tokens, width), what the first block added to the image tokens.
        tail: (tokens, width), what the other blocks added.
        velocity: (tokens, channels).
    """

    head: torch.Tensor
    tail: torch.Tensor
    velocity: torch.Tensor


class StepCache(Protocol):
    """Asked in this order at each step; the first answer saves the rest of the evaluation."""

    def velocity(self) -> torch.Tensor | None:
        """(tokens, channels), without any evaluation."""

    def tail(self, head: torch.Tensor) -> torch.Tensor | None:
        """(tokens, width), what the blocks after the first would add, once that one has added `head`."""

    def learn(self, evaluation: Evaluation) -> None:
        """A full evaluation, made because neither of the above answered."""


class FirstBlock:
    """First-Block Cache, decisions as in diffusers' `FirstBlockCacheConfig`: keeps the tail while the head stays."""

    def __init__(self, spec: FirstBlockSpec) -> None:
        self._threshold = spec.threshold
        self._last: Evaluation | None = None

    def velocity(self) -> None:
        return None

    def tail(self, head: torch.Tensor) -> torch.Tensor | None:
        if self._last is None:
            return None
        change = (head - self._last.head).abs().mean() / self._last.head.abs().mean()
        return self._last.tail if change.item() <= self._threshold else None

    def learn(self, evaluation: Evaluation) -> None:
        self._last = evaluation


class TaylorSeer:
    """TaylorSeer (arXiv 2503.06923) on the velocity, steps as in diffusers' `TaylorSeerCacheConfig` in lite mode.

    Between evaluations, the velocity is extrapolated by the finite differences of those before.
    """

    def __init__(self, spec: TaylorSeerSpec) -> None:
        self._spec = spec
        self._step = -1
        self._learnt = 0  # the step of the last evaluation
        self._factors: list[torch.Tensor] = []

    def velocity(self) -> torch.Tensor | None:
        self._step += 1
        beyond = self._step - self._spec.warmup
        if beyond < 0 or (beyond - 1) % self._spec.interval == 0:
            return None
        ahead = self._step - self._learnt
        return sum(factor * (ahead**order / factorial(order)) for order, factor in enumerate(self._factors))

    def tail(self, head: torch.Tensor) -> None:
        return None

    def learn(self, evaluation: Evaluation) -> None:
        factors = [evaluation.velocity]
        for before in self._factors[: self._spec.order]:
            factors.append((factors[-1] - before) / (self._step - self._learnt))
        self._factors, self._learnt = factors, self._step


def make_cache(spec: CacheSpec) -> StepCache:
    """A cache that remembers nothing yet."""
    return FirstBlock(spec) if isinstance(spec, FirstBlockSpec) else TaylorSeer(spec)
