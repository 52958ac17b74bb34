"""Step caches: what one image keeps between its steps, for one side of guidance, to skip later evaluations.

Diffusers' hooks keep one state for a whole forward pass. Here every row of a batch has its own, so rows of different
requests can share a forward pass, and only rows whose cache misses are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import factorial

import torch

from stages.latents import unpack
from stages.plan import CacheSpec, FirstBlockSpec, MagCacheSpec, SeaCacheSpec, TaylorSeerSpec, TeaCacheSpec


@dataclass(frozen=True)
class BlockInput:
    """The input of the first block for one row.

    Attributes:
        latent: (tokens, channels).
        grid: (rows, columns) of tokens.
        sigma: noise level.
        modulated: returns the image tokens (tokens, width) as the first block's attention receives them.
    """

    latent: torch.Tensor
    grid: tuple[int, int]
    sigma: float
    modulated: Callable[[], torch.Tensor]


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

    @property
    def blocks(self) -> torch.Tensor:
        """What all blocks added, (tokens, width)."""
        return self.head + self.tail


class StepCache:
    """A cache that is queried at each step, in the order of its methods; the first result ends the evaluation."""

    def velocity(self) -> torch.Tensor | None:
        """Return the velocity (tokens, channels) without any evaluation, or None."""
        return None

    def blocks(self, block_input: BlockInput) -> torch.Tensor | None:
        """Return what all blocks would add to the image tokens, (tokens, width), or None."""
        return None

    def tail(self, head: torch.Tensor) -> torch.Tensor | None:
        """Return what the blocks after the first would add, (tokens, width), or None; the first has added `head`."""
        return None

    def learn(self, evaluation: Evaluation) -> None:
        """Store a full evaluation, which was run because none of the above returned a result."""
        raise NotImplementedError


def _change(now: torch.Tensor, before: torch.Tensor) -> float:
    """Relative change: mean absolute difference over mean magnitude."""
    return float((now - before).abs().mean() / before.abs().mean())


class FirstBlock(StepCache):
    """First-Block Cache: reuses the tail while the head stays, deciding as diffusers' `FirstBlockCacheConfig` does."""

    def __init__(self, spec: FirstBlockSpec) -> None:
        self._threshold = spec.threshold
        self._last: Evaluation | None = None

    def tail(self, head: torch.Tensor) -> torch.Tensor | None:
        if self._last is None or _change(head, self._last.head) > self._threshold:
            return None
        return self._last.tail

    def learn(self, evaluation: Evaluation) -> None:
        self._last = evaluation


class TaylorSeer(StepCache):
    """TaylorSeer (arXiv 2503.06923) on the velocity.

    It evaluates the same steps as diffusers' `TaylorSeerCacheConfig` in lite mode. Between them, the velocity is
    extrapolated by finite differences of the earlier ones.
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

    def learn(self, evaluation: Evaluation) -> None:
        factors = [evaluation.velocity]
        for before in self._factors[: self._spec.order]:
            factors.append((factors[-1] - before) / (self._step - self._learnt))
        self._factors, self._learnt = factors, self._step


class TeaCache(StepCache):
    """TeaCache (arXiv 2411.19108): reuses the blocks' contribution while the first block's input changes little.

    The first and the last step are always evaluated.
    """

    def __init__(self, spec: TeaCacheSpec, steps: int) -> None:
        self._spec = spec
        self._last_step = steps - 1
        self._step = -1
        self._change = 0.0  # since the last evaluation
        self._entered: torch.Tensor | None = None
        self._blocks: torch.Tensor | None = None

    def blocks(self, block_input: BlockInput) -> torch.Tensor | None:
        self._step += 1
        before, self._entered = self._entered, block_input.modulated()
        if before is not None and self._step < self._last_step:
            change = _change(self._entered, before)
            self._change += sum(c * change**power for power, c in enumerate(reversed(self._spec.coefficients)))
            if self._change < self._spec.threshold:
                return self._blocks
        self._change = 0.0
        return None

    def learn(self, evaluation: Evaluation) -> None:
        self._blocks = evaluation.blocks


class MagCache(StepCache):
    """MagCache (arXiv 2506.09045), deciding as diffusers' `MagCacheConfig` does.

    It reuses the blocks' contribution while its magnitude, which is estimated from ratios measured once for the model,
    strays little from that of the last one computed.
    """

    def __init__(self, spec: MagCacheSpec, steps: int) -> None:
        self._spec = spec
        known = torch.tensor(spec.ratios)
        nearest = torch.linspace(0, len(known) - 1, steps).round().long() if steps > 1 else torch.tensor([-1])
        self._ratios = known[nearest]
        self._retained = int(spec.retention * steps + 0.5)
        self._step = -1
        self._blocks: torch.Tensor | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._ratio, self._error, self._skipped = torch.tensor(1.0), torch.tensor(0.0), 0

    def blocks(self, block_input: BlockInput) -> torch.Tensor | None:
        self._step += 1
        if self._step < self._retained or self._blocks is None:
            return None
        self._ratio = self._ratio * self._ratios[self._step]
        self._error = self._error + (1.0 - self._ratio).abs()
        self._skipped += 1
        if self._error <= self._spec.threshold and self._skipped <= self._spec.most_skipped:
            return self._blocks
        self._start_over()
        return None

    def learn(self, evaluation: Evaluation) -> None:
        self._blocks = evaluation.blocks


class SeaCache(StepCache):
    """SeaCache (arXiv 2602.18993), deciding as diffusers' `SeaCacheConfig` does for a single image.

    It reuses or extrapolates the blocks' contribution while the latent's signal changes little: what passes a Wiener
    filter for the noise level and the usual spectrum of images. The first and the last step are always evaluated.
    """

    def __init__(self, spec: SeaCacheSpec, steps: int) -> None:
        self._spec = spec
        self._last_step = steps - 1
        self._step = -1
        self._change = 0.0  # since the last evaluation
        self._skipped = 0
        self._signal: torch.Tensor | None = None
        self._history: list[tuple[int, torch.Tensor]] = []

    def blocks(self, block_input: BlockInput) -> torch.Tensor | None:
        self._step += 1
        before, self._signal = self._signal, _signal(block_input)
        if before is not None and self._step < self._last_step and self._skipped < self._spec.most_skipped:
            self._change += _change(self._signal, before)
            if self._change < self._spec.threshold:
                self._skipped += 1
                return self._predict()
        self._change, self._skipped = 0.0, 0
        return None

    def learn(self, evaluation: Evaluation) -> None:
        self._history = [*self._history[-1:], (self._step, evaluation.blocks)]

    def _predict(self) -> torch.Tensor:
        step, blocks = self._history[-1]
        for (first, earlier), (second, later) in pairwise(self._history if self._spec.order else []):
            blocks = later + (later - earlier) * ((self._step - step) / (second - first))
        return blocks


_SPECTRUM_EXPONENT = 3.0  # with which an image's power falls with frequency, in SeaCache


def _signal(block_input: BlockInput) -> torch.Tensor:
    """Apply the paper's filter (eq. 7) to the latent: (2 * rows, 2 * columns, channels)."""
    rows, columns = block_input.grid
    latent = unpack(block_input.latent.float()[None], block_input.grid)[0].permute(1, 2, 0)
    sigma = min(max(block_input.sigma, 1e-6), 1 - 1e-6)

    def gain(length: int) -> torch.Tensor:
        power = 1 / (torch.fft.fftfreq(length, device=latent.device).abs() ** _SPECTRUM_EXPONENT + 1e-16)
        return (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2 + 1e-16)

    gains = torch.outer(gain(2 * rows), gain(2 * columns))[..., None]
    spectrum = torch.fft.fftn(latent, dim=(0, 1)) * (gains / gains.mean())
    return torch.fft.ifftn(spectrum, dim=(0, 1)).real


def make_cache(spec: CacheSpec, steps: int) -> StepCache:
    """Make an empty cache for a stage of `steps` steps."""
    match spec:
        case FirstBlockSpec():
            return FirstBlock(spec)
        case TaylorSeerSpec():
            return TaylorSeer(spec)
        case TeaCacheSpec():
            return TeaCache(spec, steps)
        case MagCacheSpec():
            return MagCache(spec, steps)
        case SeaCacheSpec():
            return SeaCache(spec, steps)
