"""The way of a batch of rows through a transformer's blocks, each row with its own adapter and blocks to skip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from backends import Backend
from stages.adapters import RowAdapters
from stages.families.base import Tokens, Transformer
from stages.internals.torch import unrelated_dimensions
from stages.rows import ModelInput
from stages.text import collate


@dataclass(frozen=True)
class Batch:
    """Rows partway through the blocks.

    Attributes:
        tokens: output of the last block that was run.
        gate: (batch, width), see `RowAdapters`, or None without adapters.
        skips: for each row, indices of the blocks to skip.
    """

    tokens: Tokens
    gate: torch.Tensor | None
    skips: tuple[frozenset[int], ...]


class Walk(ABC):
    """Takes rows in, through any of the blocks, and out again.

    Attributes:
        device: where the rows' own tensors are: latents and embeddings, and what caches keep.
    """

    device: torch.device

    def __init__(self, transformer: Transformer, adapters: RowAdapters, backend: Backend) -> None:
        self._transformer = transformer
        self._adapters = adapters
        self._backend = backend

    def compile(self) -> None:
        """Set up the repeated block to be compiled on its next call."""
        for block in self._transformer.blocks:
            self._backend.compile(block)

    @abstractmethod
    def enter(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> Batch:
        """Run what precedes the first block, for rows of one grid (rows and columns of tokens)."""

    @abstractmethod
    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """Return the batch of some of the rows, at least one."""

    @abstractmethod
    def through(self, blocks: Iterable[int], batch: Batch) -> Batch:
        """Run these blocks, each for the rows that do not skip it."""

    @abstractmethod
    def image(self, batch: Batch) -> torch.Tensor:
        """Return the image tokens (rows, tokens, width) on the rows' device."""

    @abstractmethod
    def modulate(self, entered: Batch) -> torch.Tensor:
        """Return the image tokens (rows, tokens, width) as the first block's attention receives them, likewise."""

    @abstractmethod
    def with_image(self, batch: Batch, image: torch.Tensor) -> Batch:
        """Return the batch with other image tokens, which are as `image` returns them."""

    @abstractmethod
    def leave(self, batch: Batch) -> torch.Tensor:
        """Run what follows the last block: velocities (rows, tokens, channels) in float32 on the rows' device."""

    @abstractmethod
    def forms(self, rows: int, text: int) -> list[tuple[int, int]]:
        """List the number of rows and of text tokens of each batch that is compiled separately.

        Args:
            rows: most rows of a batch.
            text: most tokens of a text.
        """

    def warm_up(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> None:
        """Run a batch once in all ways that are compiled separately."""
        self.leave(self.through(range(len(self._transformer.blocks)), self.enter(rows, grid)))


class AnyShape(Walk):
    """Runs batches as they are, on a device where a new shape costs nothing."""

    def __init__(self, transformer: Transformer, adapters: RowAdapters, backend: Backend) -> None:
        super().__init__(transformer, adapters, backend)
        self.device = torch.device(backend.device)
        self._compiled = False

    def compile(self) -> None:
        """Set up the repeated block to be compiled.

        From then on every batch has a mask and gates, needed or not, so that one that needs them causes no
        recompilation.
        """
        super().compile()
        self._compiled = True

    def enter(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> Batch:
        dtype = self._transformer.dtype
        latents = torch.stack([row.latent for row in rows])
        sigmas = torch.tensor([row.sigma for row in rows])
        text = collate([row.embeds for row in rows], [row.negative for row in rows], latents.device, dtype)
        gate = self._adapters.gate([(row.adapter, row.adapter_scale) for row in rows])
        if self._compiled:
            text = replace(text, mask=text.full_mask())
            gate = torch.zeros(len(rows), self._adapters.width) if gate is None else gate
        gate = None if gate is None else gate.to(latents.device, dtype)
        with self._adapters.gated(gate):
            tokens = self._transformer.enter(latents, sigmas, text, grid)
        return Batch(tokens, gate, tuple(row.skip_blocks for row in rows))

    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        if len(rows) == len(batch.skips):
            return batch
        gate = None if batch.gate is None else batch.gate[rows]
        return Batch(batch.tokens[list(rows)], gate, tuple(batch.skips[row] for row in rows))

    def through(self, blocks: Iterable[int], batch: Batch) -> Batch:
        for index in blocks:
            chosen = [row for row, skipped in enumerate(batch.skips) if index not in skipped]
            if not chosen:
                continue
            subset = self.select(batch, chosen)
            with self._adapters.gated(subset.gate):
                tokens = self._transformer.run_block(index, subset.tokens)
            if len(chosen) < len(batch.skips):
                image, text = batch.tokens.image.clone(), batch.tokens.text.clone()
                image[chosen], text[chosen] = tokens.image, tokens.text
                tokens = replace(batch.tokens, image=image, text=text)
            batch = replace(batch, tokens=tokens)
        return batch

    def image(self, batch: Batch) -> torch.Tensor:
        return batch.tokens.image

    def modulate(self, entered: Batch) -> torch.Tensor:
        with self._adapters.gated(entered.gate):
            return self._transformer.modulate(entered.tokens)

    def with_image(self, batch: Batch, image: torch.Tensor) -> Batch:
        return replace(batch, tokens=replace(batch.tokens, image=image))

    def leave(self, batch: Batch) -> torch.Tensor:
        with self._adapters.gated(batch.gate):
            return self._transformer.leave(batch.tokens)

    def forms(self, rows: int, text: int) -> list[tuple[int, int]]:
        return [(3, 11), (1, 5)] if self._compiled else []

    def warm_up(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> None:
        with unrelated_dimensions():
            super().warm_up(rows, grid)
