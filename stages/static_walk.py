"""A walk for devices that compile for every shape: the device runs pure functions of few shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from backends import Backend, StaticShapes
from stages.adapters import RowAdapters
from stages.families.base import Transformer
from stages.rows import ModelInput
from stages.text import collate
from stages.walk import Batch, Walk


class StaticWalk(Walk):
    """Pads batches and texts to buckets, and keeps rows on the host.

    What differs from row to row is decided on the host, where caches keep what they know, or is data of the device's
    functions: those who skip a block run it and keep what they had. A batch's padding repeats its last row. The host
    reads the device at a step's end and, where rows have caches, after the first block.
    """

    device = torch.device("cpu")

    def __init__(self, transformer: Transformer, adapters: RowAdapters, backend: Backend, shapes: StaticShapes) -> None:
        super().__init__(transformer, adapters, backend)
        self._shapes = shapes
        self._truths = lru_cache(maxsize=256)(partial(_upload, backend.device))  # a bound method would be a cycle

    def enter(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> Batch:
        device, dtype = self._backend.device, self._transformer.dtype
        padded = [*rows, *[rows[-1]] * (self._shapes.batch.fit(len(rows)) - len(rows))]
        longest = max(len(text.embeds) for row in rows for text in (row, row.negative) if text is not None)
        text = collate(
            [row.embeds for row in padded],
            [row.negative for row in padded],
            self.device,
            dtype,
            length=self._shapes.text.fit(longest),
        )
        gate = self._adapters.gate([(row.adapter, row.adapter_scale) for row in padded])
        if gate is None:
            gate = torch.zeros(len(padded), self._adapters.width)
        gate = gate.to(dtype).to(device)
        latents = torch.stack([row.latent for row in padded]).to(device)
        sigmas = torch.tensor([row.sigma for row in padded]).to(device)
        with self._adapters.gated(gate):
            tokens = self._transformer.enter(latents, sigmas, replace(text, mask=text.full_mask()).to(device), grid)
        self._backend.end_graph()
        return Batch(tokens, gate, tuple(row.skip_blocks for row in rows))

    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        if len(rows) == len(batch.skips):
            return batch
        padded = [*rows, *[rows[-1]] * (self._shapes.batch.fit(len(rows)) - len(rows))]
        index = torch.tensor(padded).to(self._backend.device)  # as constants, each choice of rows would be compiled
        assert batch.gate is not None
        selected = Batch(batch.tokens[index], batch.gate[index], tuple(batch.skips[row] for row in rows))
        self._backend.end_graph()
        return selected

    def through(self, blocks: Iterable[int], batch: Batch) -> Batch:
        padding = len(batch.tokens.image) - len(batch.skips)
        for index in blocks:
            stays = self._truths(tuple(index in skips for skips in batch.skips) + (False,) * padding)
            before = batch.tokens
            with self._adapters.gated(batch.gate):
                after = self._transformer.run_block(index, before)
            image = torch.where(stays, before.image, after.image)
            text = torch.where(stays, before.text, after.text)
            batch = replace(batch, tokens=replace(after, image=image, text=text))
            self._backend.end_graph()
        return batch

    def image(self, batch: Batch) -> torch.Tensor:
        return self._read(batch.tokens.image, batch)

    def modulate(self, entered: Batch) -> torch.Tensor:
        with self._adapters.gated(entered.gate):
            return self._read(self._transformer.modulate(entered.tokens), entered)

    def with_image(self, batch: Batch, image: torch.Tensor) -> Batch:
        before = batch.tokens.image
        padding = image[-1:].expand(len(before) - len(image), -1, -1)
        uploaded = torch.cat([image, padding]).to(before.dtype).to(self._backend.device)
        return replace(batch, tokens=replace(batch.tokens, image=uploaded))

    def leave(self, batch: Batch) -> torch.Tensor:
        with self._adapters.gated(batch.gate):
            return self._read(self._transformer.leave(batch.tokens), batch)

    def forms(self, rows: int, text: int) -> list[tuple[int, int]]:
        shapes = self._shapes
        return [(count, length) for length in shapes.text.up_to(text) for count in shapes.batch.up_to(rows)]

    def warm_up(self, rows: Sequence[ModelInput], grid: tuple[int, int]) -> None:
        entered = self.enter(rows, grid)
        after = self.through(range(len(self._transformer.blocks)), entered)
        self.leave(self.with_image(after, self.image(after)))
        self.modulate(entered)
        for fewer in self._shapes.batch.up_to(len(rows) - 1) if len(rows) > 1 else ():
            self.select(entered, range(fewer))  # as where caches hit

    def _read(self, tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Bring the rows of (batch, tokens, width) to the host in float32, without their padding."""
        return tensor.cpu().float()[: len(batch.skips)]


def _upload(device: str, rows: tuple[bool, ...]) -> torch.Tensor:
    """Put a truth value for each row on the device, (batch, 1, 1)."""
    return torch.tensor(rows)[:, None, None].to(device)
