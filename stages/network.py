"""One evaluation of the transformer, on rows that may each skip part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
from torch.fx.experimental import _config as shapes_config

from backends import Backend
from stages.adapters import RowAdapters
from stages.caches import BlockInput, Evaluation, StepCache
from stages.config import ModelConfig
from stages.families.base import Tokens, Transformer
from stages.loading import load_adapters, load_transformer
from stages.lora_files import Lora
from stages.plan import AttentionGuidanceSpec
from stages.text import Negative, collate


@dataclass(frozen=True)
class ModelInput:
    """One row of an evaluation.

    Attributes:
        latent: (tokens, channels).
        sigma: noise level of `latent`.
        embeds: (length, width), without padding.
        negative: negative prompt that guides attention within the evaluation, or None.
        adapter, adapter_scale: name of a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to skip.
        cache: cache that may replace part of the evaluation, or None.
    """

    latent: torch.Tensor
    sigma: float
    embeds: torch.Tensor
    negative: Negative | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    skip_blocks: frozenset[int] = frozenset()
    cache: StepCache | None = None


@dataclass(frozen=True)
class Prediction:
    """The output of an evaluation for one row.

    Attributes:
        velocity: (tokens, channels) in float32.
        cost: share of the blocks that were run for the row.
    """

    velocity: torch.Tensor
    cost: float


class Network:
    """The transformer with all its adapters, for one thread at a time."""

    def __init__(
        self,
        transformer: Transformer,
        adapters: Mapping[str, Mapping[str, Lora]] | None = None,
        fused: str | None = None,
    ) -> None:
        """Give a transformer its adapters.

        Args:
            transformer: the transformer, without adapters.
            adapters: adapters by name, each as LoRAs by the name of the layer.
            fused: adapter that most rows will use, see `RowAdapters`.
        """
        self.transformer = transformer
        self._adapters = RowAdapters(transformer.module, adapters or {}, fused)
        self._compiled = False

    @classmethod
    def load(cls, config: ModelConfig, backend: Backend, fused: str | None = None) -> Self:
        """Load the config's transformer and adapters; raises `stages.weight_files.BadFile`."""
        transformer = load_transformer(config, backend)
        return cls(transformer, load_adapters(config, transformer.module), fused)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return self._adapters.names

    @property
    def blocks(self) -> int:
        """Number of the transformer's blocks."""
        return len(self.transformer.blocks)

    def compile(self, backend: Backend) -> None:
        """Compile the repeated block.

        From then on every pass has a mask and gates, needed or not, so that a batch that needs them causes no
        recompilation.
        """
        for block in self.transformer.blocks:
            backend.compile(block)
        self._compiled = True

    @torch.inference_mode()
    def warm_up(self, grid: tuple[int, int], *, guides_attention: bool) -> None:
        """Evaluate noise once in each form that is compiled separately.

        These are several rows and a single row and, if the transformer supports attention guidance, both with and
        without negative prompts.

        Args:
            grid: rows and columns of tokens.
            guides_attention: whether the transformer supports attention guidance.
        """
        generator = torch.Generator().manual_seed(0)
        transformer = self.transformer

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(transformer.module.device)

        latent = noise(grid[0] * grid[1], transformer.token_channels)
        text = [noise(length, transformer.text_width) for length in (5, 7, 11, 13)]
        plain = [ModelInput(latent, 1.0, embeds) for embeds in text[:3]]
        kinds = [plain]
        if guides_attention:
            negative = Negative(text[3], AttentionGuidanceSpec())
            kinds.append([replace(row, negative=negative) for row in plain])
        # Without this, torch.compile would assume that dimensions equal during warm-up (e.g. tokens and ranks) are
        # always equal.
        with shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            for rows in kinds:
                self.evaluate(rows, grid)
                self.evaluate(rows[:1], grid)

    def evaluate(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
        """Evaluate rows of one grid (rows and columns of tokens) in one forward pass.

        Only the blocks that a row's cache cannot replace are run for it.
        """
        cached = [None if row.cache is None else row.cache.velocity() for row in rows]
        missed = [row for row, velocity in zip(rows, cached, strict=True) if velocity is None]
        computed = iter(self._evaluate(missed, grid) if missed else ())
        return [next(computed) if velocity is None else Prediction(velocity, 0.0) for velocity in cached]

    def _evaluate(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
        gate = self._gate(rows)
        with self._adapters.gated(gate):
            entered = self._enter(rows, grid)
            if any(row.cache or row.skip_blocks for row in rows):
                return self._walk_with_caches(rows, grid, _Pass(entered, gate, tuple(row.skip_blocks for row in rows)))
            tokens = entered
            for index in range(self.blocks):
                tokens = self.transformer.run_block(index, tokens)
            velocities = self.transformer.leave(tokens.image, entered)
        return [Prediction(velocity, 1.0) for velocity in velocities]

    def _walk_with_caches(self, rows: Sequence[ModelInput], grid: tuple[int, int], entered: _Pass) -> list[Prediction]:
        """Run the first block for rows without cached blocks, and the others for rows without a cached tail either."""
        count = self.blocks
        image = entered.tokens.image.clone()

        @cache
        def modulated() -> torch.Tensor:
            return self.transformer.modulate(entered.tokens)

        def block_input(index: int) -> BlockInput:
            return BlockInput(rows[index].latent, grid, rows[index].sigma, lambda: modulated()[index])

        blocks = [None if row.cache is None else row.cache.blocks(block_input(index)) for index, row in enumerate(rows)]
        missed = _add(image, range(len(rows)), blocks)
        first = self._through(range(1), entered.rows(missed))
        heads = first.tokens.image - image[missed]
        image[missed] = first.tokens.image
        tails = [
            None if (step_cache := rows[index].cache) is None else step_cache.tail(head)
            for index, head in zip(missed, heads, strict=True)
        ]
        full = _add(image, missed, tails)
        after_first = image[full]
        rest = self._through(range(1, count), first.rows([missed.index(index) for index in full]))
        image[full] = rest.tokens.image
        velocities = self.transformer.leave(image, entered.tokens)

        costs = [0.0] * len(rows)
        for index in missed:
            run = set(range(count if index in full else 1))
            costs[index] = len(run - rows[index].skip_blocks) / count
        for index, tail in zip(full, image[full] - after_first, strict=True):
            if (step_cache := rows[index].cache) is not None:
                step_cache.learn(Evaluation(heads[missed.index(index)], tail, velocities[index]))
        return [Prediction(velocity, cost) for velocity, cost in zip(velocities, costs, strict=True)]

    def _gate(self, rows: Sequence[ModelInput]) -> torch.Tensor | None:
        """Return the rows' adapter gates on the device, or None if none are needed."""
        gate = self._adapters.gate([(row.adapter, row.adapter_scale) for row in rows])
        if gate is None:
            if not self._compiled:
                return None
            gate = torch.zeros(len(rows), self._adapters.width)
        return gate.to(rows[0].latent.device, self.transformer.dtype)

    def _enter(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> Tokens:
        latents = torch.stack([row.latent for row in rows])
        sigmas = torch.tensor([row.sigma for row in rows])
        embeds, negatives = [row.embeds for row in rows], [row.negative for row in rows]
        text = collate(embeds, negatives, latents.device, self.transformer.dtype)
        if self._compiled:
            text = replace(text, mask=text.full_mask())
        return self.transformer.enter(latents, sigmas, text, grid)

    def _through(self, indices: Iterable[int], rows: _Pass) -> _Pass:
        """Run these blocks, each for the rows that do not skip it."""
        for index in indices:
            chosen = [row for row, skipped in enumerate(rows.skips) if index not in skipped]
            if not chosen:
                continue
            subset = rows.rows(chosen)
            with self._adapters.gated(subset.gate):
                tokens = self.transformer.run_block(index, subset.tokens)
            if len(chosen) < len(rows.skips):
                image, text = rows.tokens.image.clone(), rows.tokens.text.clone()
                image[chosen], text[chosen] = tokens.image, tokens.text
                tokens = replace(rows.tokens, image=image, text=text)
            rows = replace(rows, tokens=tokens)
        return rows


@dataclass(frozen=True)
class _Pass:
    """Rows partway through the blocks.

    Attributes:
        tokens: output of the last block that was run.
        gate: (batch, width), see `RowAdapters`, or None without adapters.
        skips: for each row, indices of the blocks to skip.
    """

    tokens: Tokens
    gate: torch.Tensor | None
    skips: tuple[frozenset[int], ...]

    def rows(self, chosen: list[int]) -> _Pass:
        if len(chosen) == len(self.skips):
            return self
        gate = None if self.gate is None else self.gate[chosen]
        return _Pass(self.tokens[chosen], gate, tuple(self.skips[row] for row in chosen))


def _add(image: torch.Tensor, rows: Sequence[int], contributions: Sequence[torch.Tensor | None]) -> list[int]:
    """Add contributions (tokens, width) to these rows of `image`, in place; return the rows that have none."""
    for row, contribution in zip(rows, contributions, strict=True):
        if contribution is not None:
            image[row] += contribution
    return [row for row, contribution in zip(rows, contributions, strict=True) if contribution is None]
