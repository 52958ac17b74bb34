"""One evaluation of the transformer, on rows that may each skip part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Self

import torch

from backends import Backend, CPUBackend
from stages.adapters import RowAdapters
from stages.caches import BlockInput, Evaluation
from stages.config import ModelConfig
from stages.families.base import Transformer
from stages.loading import load_adapters, load_transformer
from stages.lora_files import Lora
from stages.plan import AttentionGuidanceSpec
from stages.rows import ModelInput, Prediction
from stages.static_walk import StaticWalk
from stages.text import Negative
from stages.walk import AnyShape, Batch, Walk


class Network:
    """The transformer with all its adapters, for one thread at a time."""

    def __init__(
        self,
        transformer: Transformer,
        adapters: Mapping[str, Mapping[str, Lora]] | None = None,
        fused: str | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Give a transformer its adapters.

        Args:
            transformer: the transformer, without adapters.
            adapters: adapters by name, each as LoRAs by the name of the layer.
            fused: adapter that most rows will use, see `RowAdapters`.
            backend: backend of the device that holds the transformer, by default the processor's.
        """
        self.transformer = transformer
        self._adapters = RowAdapters(transformer.module, adapters or {}, fused)
        self._walk = _make_walk(transformer, self._adapters, backend or CPUBackend())

    @classmethod
    def load(cls, config: ModelConfig, backend: Backend, fused: str | None = None) -> Self:
        """Load the config's transformer and adapters; raises `stages.sources.BadFile`."""
        transformer = load_transformer(config, backend)
        return cls(transformer, load_adapters(config, transformer.module), fused, backend)

    @property
    def device(self) -> torch.device:
        """Device of the rows' own tensors."""
        return self._walk.device

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return self._adapters.names

    @property
    def blocks(self) -> int:
        """Number of the transformer's blocks."""
        return len(self.transformer.blocks)

    def compile(self) -> None:
        """Compile the repeated block."""
        self._walk.compile()

    def forms(self, rows: int, text: int) -> list[tuple[int, int]]:
        """List the batches that `warm_up` must run, see `Walk.forms`."""
        return self._walk.forms(rows, text)

    def warm_up(self, form: tuple[int, int], grid: tuple[int, int], *, guides_attention: bool) -> None:
        """Evaluate noise once in each way that is compiled separately.

        Args:
            form: number of rows and of text tokens, see `forms`.
            grid: rows and columns of tokens.
            guides_attention: whether the transformer supports attention guidance.
        """
        generator = torch.Generator().manual_seed(0)
        count, length = form

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latent = noise(grid[0] * grid[1], self.transformer.token_channels)
        embeds = noise(length, self.transformer.text_width)
        # Texts of different lengths, so that a compiler sees padding.
        rows = [ModelInput(latent, 1.0, embeds[row % 2 :]) for row in range(count)]
        self._walk.warm_up(rows, grid)
        if guides_attention:
            negative = Negative(embeds, AttentionGuidanceSpec())
            self._walk.warm_up([replace(row, negative=negative) for row in rows], grid)

    def evaluate(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
        """Evaluate rows of one grid (rows and columns of tokens) in one forward pass.

        Only the blocks that a row's cache cannot replace are run for it.
        """
        cached = [None if row.cache is None else row.cache.velocity() for row in rows]
        missed = [row for row, velocity in zip(rows, cached, strict=True) if velocity is None]
        computed = iter(self._evaluate(missed, grid) if missed else ())
        return [next(computed) if velocity is None else Prediction(velocity, 0.0) for velocity in cached]

    def _evaluate(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
        walk, blocks = self._walk, self.blocks
        entered = walk.enter(rows, grid)
        if any(row.cache for row in rows):
            return self._walk_with_caches(rows, grid, entered)
        velocities = walk.leave(walk.through(range(blocks), entered))
        return [
            Prediction(velocity, len(set(range(blocks)) - row.skip_blocks) / blocks)
            for row, velocity in zip(rows, velocities, strict=True)
        ]

    def _walk_with_caches(self, rows: Sequence[ModelInput], grid: tuple[int, int], entered: Batch) -> list[Prediction]:
        """Run the first block for rows without cached blocks, and the others for rows without a cached tail either."""
        walk, count = self._walk, self.blocks
        image = walk.image(entered).clone()

        @cache
        def modulated() -> torch.Tensor:
            return walk.modulate(entered)

        def block_input(index: int) -> BlockInput:
            return BlockInput(rows[index].latent, grid, rows[index].sigma, lambda: modulated()[index])

        caches = [row.cache for row in rows]
        blocks = [None if cached is None else cached.blocks(block_input(row)) for row, cached in enumerate(caches)]
        missed = _add(image, range(len(rows)), blocks)
        heads: dict[int, torch.Tensor] = {}
        tails: dict[int, torch.Tensor] = {}
        if missed:
            first = walk.through(range(1), walk.select(entered, missed))
            after_first = walk.image(first)
            heads = dict(zip(missed, after_first - image[missed], strict=True))
            image[missed] = after_first
            known = [None if (cached := caches[row]) is None else cached.tail(heads[row]) for row in missed]
            full = _add(image, missed, known)
            if full:
                rest = walk.through(range(1, count), walk.select(first, [missed.index(row) for row in full]))
                after_rest = walk.image(rest)
                tails = dict(zip(full, after_rest - image[full], strict=True))
                image[full] = after_rest
        velocities = walk.leave(walk.with_image(entered, image))

        for row, tail in tails.items():
            if (cached := caches[row]) is not None:
                cached.learn(Evaluation(heads[row], tail, velocities[row]))
        predictions = []
        for row, velocity in enumerate(velocities):
            run = set(range(count if row in tails else 1 if row in heads else 0))
            predictions.append(Prediction(velocity, len(run - rows[row].skip_blocks) / count))
        return predictions


def _make_walk(transformer: Transformer, adapters: RowAdapters, backend: Backend) -> Walk:
    if backend.shapes is None:
        return AnyShape(transformer, adapters, backend)
    return StaticWalk(transformer, adapters, backend, backend.shapes)


def _add(image: torch.Tensor, rows: Sequence[int], contributions: Sequence[torch.Tensor | None]) -> list[int]:
    """Add contributions (tokens, width) to these rows of `image`, in place; return the rows that have none."""
    for row, contribution in zip(rows, contributions, strict=True):
        if contribution is not None:
            image[row] += contribution
    return [row for row, contribution in zip(rows, contributions, strict=True) if contribution is None]
