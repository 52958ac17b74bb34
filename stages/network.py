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
    """A row of an evaluation.

    Attributes:
        latent: (tokens, channels).
        sigma: its noise level.
        embeds: (length, width), without padding.
        negative: what to avoid within the evaluation, if anything.
        adapter, adapter_scale: a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to do without.
        cache: what may stand in for the network, if anything.
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
    """What an evaluation gives for a row.

    Attributes:
        velocity: (tokens, channels) in float32.
        cost: share of the blocks that the row went through.
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
            transformer: with the layers' own weights.
            adapters: by name, what each adds to the transformer's layers by their names.
            fused: adapter that most rows will have, see `RowAdapters`.
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
        return self._adapters.names

    @property
    def blocks(self) -> int:
        return len(self.transformer.blocks)

    def compile(self, backend: Backend) -> None:
        """Compile the repeated block.

        From here on every pass has a mask and gates, needed or not: what they hold may then change from pass to pass
        without another compilation.
        """
        for block in self.transformer.blocks:
            backend.compile(block)
        self._compiled = True

    @torch.inference_mode()
    def warm_up(self, grid: tuple[int, int], *, guides_attention: bool) -> None:
        """Evaluate noise, in all the ways that are compiled apart from each other.

        These are several rows and a single one and, of a transformer that guides attention, both with negative prompts
        and without.

        Args:
            grid: rows and columns of tokens.
            guides_attention: whether the transformer can.
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
        # Without this, torch.compile would assume that dimensions which are equal here (tokens and ranks, say) always
        # are.
        with shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            for rows in kinds:
                self.evaluate(rows, grid)
                self.evaluate(rows[:1], grid)

    def evaluate(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
        """Evaluate rows of one grid (rows and columns of tokens) in one forward pass.

        Each goes only as far through the blocks as its cache makes it.
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
        """Run the first block for rows whose cache missed so far, the others for those whose cache then still does."""
        count = self.blocks
        image = entered.tokens.image.clone()

        @cache
        def modulated() -> torch.Tensor:
            return self.transformer.modulate(entered.tokens)

        def block_input(index: int) -> BlockInput:
            return BlockInput(rows[index].latent, grid, rows[index].sigma, lambda: modulated()[index])

        blocks = [None if row.cache is None else row.cache.blocks(block_input(index)) for index, row in enumerate(rows)]
        begin = _add(image, range(len(rows)), blocks)
        begun = self._through(range(1), entered.rows(begin))
        heads = begun.tokens.image - image[begin]
        image[begin] = begun.tokens.image
        tails = [
            None if (step_cache := rows[index].cache) is None else step_cache.tail(head)
            for index, head in zip(begin, heads, strict=True)
        ]
        go_on = _add(image, begin, tails)
        after = image[go_on]
        rest = self._through(range(1, count), begun.rows([begin.index(index) for index in go_on]))
        image[go_on] = rest.tokens.image
        velocities = self.transformer.leave(image, entered.tokens)

        costs = [0.0] * len(rows)
        for index in begin:
            run = set(range(count if index in go_on else 1))
            costs[index] = len(run - rows[index].skip_blocks) / count
        for index, tail in zip(go_on, image[go_on] - after, strict=True):
            if (step_cache := rows[index].cache) is not None:
                step_cache.learn(Evaluation(heads[begin.index(index)], tail, velocities[index]))
        return [Prediction(velocity, cost) for velocity, cost in zip(velocities, costs, strict=True)]

    def _gate(self, rows: Sequence[ModelInput]) -> torch.Tensor | None:
        """The rows' gates of the adapters, on the device."""
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
        """Run these blocks; rows pass by those that they skip."""
        for index in indices:
            chosen = [row for row, skipped in enumerate(rows.skips) if index not in skipped]
            if not chosen:
                continue
            part = rows.rows(chosen)
            with self._adapters.gated(part.gate):
                tokens = self.transformer.run_block(index, part.tokens)
            if len(chosen) < len(rows.skips):
                image, text = rows.tokens.image.clone(), rows.tokens.text.clone()
                image[chosen], text[chosen] = tokens.image, tokens.text
                tokens = replace(rows.tokens, image=image, text=text)
            rows = replace(rows, tokens=tokens)
        return rows


@dataclass(frozen=True)
class _Pass:
    """Rows on their way through the blocks.

    Attributes:
        tokens: as the last block left them.
        gate: (batch, width), see `RowAdapters`, or None without adapters.
        skips: indices of blocks that a row does without.
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
