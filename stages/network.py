"""One evaluation of the transformer, on rows that may each skip part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import torch
from diffusers import QwenImageTransformer2DModel
from torch.fx.experimental import _config as shapes_config

from backends import Backend
from stages.adapters import RowAdapters
from stages.attention import Avoided, Negative, collate_text, guide_attention
from stages.caches import Entrance, Evaluation, StepCache
from stages.lora_files import Lora
from stages.model import ModelConfig, load_adapters, load_transformer
from stages.plan import AttentionGuidanceSpec


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
    negatives: Sequence[Negative | None] = (),
) -> torch.Tensor:
    """One forward pass: velocities (batch, tokens, channels) in float32.

    Args:
        latents: (batch, tokens, channels).
        sigmas: (batch,), each row's noise level, which is also its timestep.
        embeds: prompt embeddings (length, width) a row; lengths may differ.
        grid: rows and columns of tokens, the same for all.
        negatives: what each row avoids within the evaluation, if any does; the transformer must know how, see
            `guide_attention`.
    """
    dtype = _dtype(transformer)
    text, mask, avoided = collate_text(embeds, negatives, latents.device, dtype)
    velocity = transformer(
        hidden_states=latents.to(dtype),
        timestep=sigmas.to(latents.device, dtype),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, *grid)]] * len(latents),
        attention_kwargs=_attention_kwargs(avoided),
        return_dict=False,
    )[0]
    return velocity.float()


@dataclass(frozen=True)
class Query:
    """A row of an evaluation.

    Attributes:
        latent: (tokens, channels).
        sigma: its noise level.
        embeds: (length, width), without padding.
        negative: what to avoid within the evaluation, if anything.
        adapter, adapter_scale: a LoRA, or None for the base model alone, and its strength.
        skip_blocks: indices of blocks to do without.
        cache: what may answer in the network's place, if anything.
    """

    latent: torch.Tensor
    sigma: float
    embeds: torch.Tensor
    negative: Negative | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    skip_blocks: frozenset[int] = frozenset()
    cache: StepCache | None = None


@dataclass
class Answer:
    """Of a query: the velocity (tokens, channels) in float32, and its cost, the share of a network evaluation.

    That is the share of the blocks that it went through.
    """

    velocity: torch.Tensor
    cost: float


class Network:
    """The transformer with all its adapters, for one thread at a time."""

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        adapters: Mapping[str, Mapping[str, Lora]] | None = None,
        fused: str | None = None,
    ) -> None:
        """Args:
        adapters: by name, what each adds to the transformer's layers by their names.
        fused: adapter that most queries will have, see `RowAdapters`.
        """
        self.transformer = transformer
        guide_attention(transformer)
        self._adapters = RowAdapters(transformer, adapters or {}, fused)
        self._compiled = False

    @classmethod
    def load(cls, config: ModelConfig, backend: Backend, fused: str | None = None) -> Self:
        """The config's transformer and adapters; raises `stages.weight_files.BadFile`."""
        transformer = load_transformer(config, backend)
        return cls(transformer, load_adapters(config, transformer), fused)

    @property
    def adapters(self) -> list[str]:
        return self._adapters.names

    @property
    def blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    def compile(self, backend: Backend) -> None:
        """Compile the repeated block.

        From here on every pass has a mask and gates, needed or not: what they hold may then change from pass to pass
        without another compilation.
        """
        for block in self.transformer.transformer_blocks:
            backend.compile(block)
        self._compiled = True

    @torch.inference_mode()
    def warm_up(self, grid: tuple[int, int]) -> None:
        """Evaluate noise, in all the ways that are compiled apart from each other.

        These are several rows and a single one, with something to avoid and without.
        """
        config = self.transformer.config
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.transformer.device)

        latent = noise(grid[0] * grid[1], config.in_channels)
        text = [noise(length, config.joint_attention_dim) for length in (5, 7, 11, 13)]
        plain = [Query(latent, 1.0, embeds) for embeds in text[:3]]
        avoiding = [replace(query, negative=Negative(text[3], AttentionGuidanceSpec())) for query in plain]
        # Or dimensions that happen to be equal here, tokens and ranks say, would have to be so for ever.
        with shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            for queries in (plain, avoiding):
                self.evaluate(queries, grid)
                self.evaluate(queries[:1], grid)

    def evaluate(self, queries: Sequence[Query], grid: tuple[int, int]) -> list[Answer]:
        """Answers to queries of one grid (rows, columns of tokens), in one forward pass.

        Each goes only as far through the blocks as its cache makes it.
        """
        foreseen = [None if query.cache is None else query.cache.velocity() for query in queries]
        asked = [query for query, velocity in zip(queries, foreseen, strict=True) if velocity is None]
        computed: list[Answer] = []
        if asked:
            in_parts = self._compiled or any(query.cache or query.skip_blocks for query in asked)
            gate = self._gate(asked)
            with self._adapters.gated(gate):
                if in_parts:
                    computed = self._evaluate_in_parts(asked, grid, gate)
                else:
                    computed = self._evaluate_at_once(asked, grid)
        answers = iter(computed)
        return [next(answers) if velocity is None else Answer(velocity, 0.0) for velocity in foreseen]

    def _evaluate_at_once(self, queries: Sequence[Query], grid: tuple[int, int]) -> list[Answer]:
        latents, sigmas = self._collate(queries)
        embeds, negatives = [query.embeds for query in queries], [query.negative for query in queries]
        velocities = predict_velocity(self.transformer, latents, sigmas, embeds, grid, negatives)
        return [Answer(velocity, 1.0) for velocity in velocities]

    def _evaluate_in_parts(
        self, queries: Sequence[Query], grid: tuple[int, int], gate: torch.Tensor | None
    ) -> list[Answer]:
        """The first block for all whose cache has no answer yet, the others for those that have none then either."""
        transformer = self.transformer
        count = self.blocks
        entered = self._enter(queries, grid, gate)
        image = entered.image.clone()

        @cache
        def modulated() -> torch.Tensor:
            return self._modulate(entered)

        def entrance(row: int) -> Entrance:
            return Entrance(queries[row].latent, grid, queries[row].sigma, lambda: modulated()[row])

        blocks = [
            None if query.cache is None else query.cache.blocks(entrance(row)) for row, query in enumerate(queries)
        ]
        begin = _add(image, range(len(queries)), blocks)
        begun = self._through(range(1), entered.rows(begin))
        heads = begun.image - image[begin]
        image[begin] = begun.image
        tails = [
            None if (known := queries[row].cache) is None else known.tail(head)
            for row, head in zip(begin, heads, strict=True)
        ]
        go_on = _add(image, begin, tails)
        after = image[go_on]
        image[go_on] = self._through(range(1, count), begun.rows([begin.index(row) for row in go_on])).image
        velocities = transformer.proj_out(transformer.norm_out(image, entered.temb)).float()

        costs = [0.0] * len(queries)
        for row in begin:
            run = set(range(count if row in go_on else 1))
            costs[row] = len(run - queries[row].skip_blocks) / count
        for row, tail in zip(go_on, image[go_on] - after, strict=True):
            if (known := queries[row].cache) is not None:
                known.learn(Evaluation(heads[begin.index(row)], tail, velocities[row]))
        return [Answer(velocity, cost) for velocity, cost in zip(velocities, costs, strict=True)]

    def _gate(self, queries: Sequence[Query]) -> torch.Tensor | None:
        """Of the adapters, on the device."""
        gate = self._adapters.gate([(query.adapter, query.adapter_scale) for query in queries])
        if gate is None:
            if not self._compiled:
                return None
            gate = torch.zeros(len(queries), self._adapters.width)
        return gate.to(queries[0].latent.device, _dtype(self.transformer))

    def _collate(self, queries: Sequence[Query]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch, tokens, channels), sigmas (batch,)."""
        return torch.stack([query.latent for query in queries]), torch.tensor([query.sigma for query in queries])

    def _enter(self, queries: Sequence[Query], grid: tuple[int, int], gate: torch.Tensor | None) -> _Tokens:
        """What `QwenImageTransformer2DModel.forward` does before its first block."""
        transformer = self.transformer
        latents, sigmas = self._collate(queries)
        device, dtype = latents.device, _dtype(transformer)
        embeds, negatives = [query.embeds for query in queries], [query.negative for query in queries]
        padded, mask, avoided = collate_text(embeds, negatives, device, dtype)
        if self._compiled:
            mask = torch.ones(padded.shape[:2], dtype=torch.bool, device=device) if mask is None else mask
        image = transformer.img_in(latents.to(dtype))
        text = transformer.txt_in(transformer.txt_norm(padded))
        temb = transformer.time_text_embed(sigmas.to(device, dtype), image, None)
        rotary = transformer.pos_embed([[(1, *grid)]], max_txt_seq_len=padded.shape[1], device=device)
        skips = tuple(query.skip_blocks for query in queries)
        return _Tokens(image, text, mask, avoided, temb, rotary, gate, skips)

    def _modulate(self, entered: _Tokens) -> torch.Tensor:
        """Image tokens (batch, tokens, width) as the first block's attention sees them."""
        block = self.transformer.transformer_blocks[0]
        shift, scale = block.img_mod(entered.temb)[:, None].chunk(6, dim=-1)[:2]
        return block.img_norm1(entered.image) * (1 + scale) + shift

    def _through(self, indices: Iterable[int], tokens: _Tokens) -> _Tokens:
        """Tokens after these blocks; rows pass by those that they skip."""
        for index in indices:
            rows = [row for row, skipped in enumerate(tokens.skips) if index not in skipped]
            if not rows:
                continue
            if len(rows) == len(tokens.image):
                tokens = self._through_block(index, tokens)
            else:
                image, text = tokens.image.clone(), tokens.text.clone()
                part = self._through_block(index, tokens.rows(rows))
                image[rows], text[rows] = part.image, part.text
                tokens = replace(tokens, image=image, text=text)
        return tokens

    def _through_block(self, index: int, tokens: _Tokens) -> _Tokens:
        with self._adapters.gated(tokens.gate):
            text, image = self.transformer.transformer_blocks[index](
                hidden_states=tokens.image,
                encoder_hidden_states=tokens.text,
                encoder_hidden_states_mask=tokens.mask,
                temb=tokens.temb,
                image_rotary_emb=tokens.rotary,
                joint_attention_kwargs=_attention_kwargs(tokens.avoided),
            )
        return replace(tokens, image=image, text=text)


@dataclass(frozen=True)
class _Tokens:
    """What goes through the blocks.

    Attributes:
        image: (batch, tokens, width).
        text: (batch, length, width).
        mask: (batch, length), or None where all texts have that length.
        avoided: negative prompts at the end of the texts, or None where no row has one.
        temb: (batch, width).
        rotary: of image and text, for every row alike.
        gate: (batch, width), see `RowAdapters`, or None without adapters.
        skips: indices of blocks that a row does without.
    """

    image: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    avoided: Avoided | None
    temb: torch.Tensor
    rotary: Any
    gate: torch.Tensor | None
    skips: tuple[frozenset[int], ...]

    def rows(self, chosen: list[int]) -> _Tokens:
        if len(chosen) == len(self.image):
            return self
        mask, gate = (None if part is None else part[chosen] for part in (self.mask, self.gate))
        avoided = self.avoided.rows(chosen) if self.avoided else None
        skips = tuple(self.skips[row] for row in chosen)
        return _Tokens(
            self.image[chosen], self.text[chosen], mask, avoided, self.temb[chosen], self.rotary, gate, skips
        )


def _dtype(transformer: QwenImageTransformer2DModel) -> torch.dtype:
    """Of the layers around the blocks; diffusers' own property visits every module, which takes 2 ms of a step."""
    return next(transformer.parameters()).dtype


def _add(image: torch.Tensor, rows: Sequence[int], contributions: Sequence[torch.Tensor | None]) -> list[int]:
    """Add contributions (tokens, width) to these rows of `image`, in place; the rows that have none."""
    for row, contribution in zip(rows, contributions, strict=True):
        if contribution is not None:
            image[row] += contribution
    return [row for row, contribution in zip(rows, contributions, strict=True) if contribution is None]


def _attention_kwargs(avoided: Avoided | None) -> dict[str, Any]:
    """What `GuidedAttention` takes beside diffusers' own arguments."""
    return {} if avoided is None else {"avoided": avoided}
