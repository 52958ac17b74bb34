"""One evaluation of the transformer, on rows that may each skip part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence

from stages.adapters import RowAdapters
from stages.caches import Evaluation, StepCache


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Sequence[torch.Tensor],
    grid: tuple[int, int],
) -> torch.Tensor:
    """One forward pass: velocities (batch, tokens, channels) in float32.

    Args:
        latents: (batch, tokens, channels).
        sigmas: (batch,), each row's noise level, which is also its timestep.
        embeds: prompt embeddings (length, width) a row; lengths may differ.
        grid: rows and columns of tokens, the same for all.
    """
    padded, mask = _pad(embeds, latents.device, transformer.dtype)
    velocity = transformer(
        hidden_states=latents.to(transformer.dtype),
        timestep=sigmas.to(latents.device, transformer.dtype),
        encoder_hidden_states=padded,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, *grid)]] * len(latents),
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
        adapter, adapter_scale: a LoRA, or None for the base model alone, and its strength.
        cache: what may answer in the network's place, if anything.
    """

    latent: torch.Tensor
    sigma: float
    embeds: torch.Tensor
    adapter: str | None = None
    adapter_scale: float = 1.0
    cache: StepCache | None = None


@dataclass
class Answer:
    """Of a query: the velocity (tokens, channels) in float32, and its cost, the share of a network evaluation.

    That is 1 for one in full, one block's share where a cache answered after the first, 0 where it answered before.
    """

    velocity: torch.Tensor
    cost: float


class Network:
    """The transformer with all its adapters, for one thread at a time."""

    def __init__(self, transformer: QwenImageTransformer2DModel, fused: str | None = None) -> None:
        """Args:
        fused: adapter that most queries will have, see `RowAdapters`.
        """
        self.transformer = transformer
        self._adapters = RowAdapters(transformer, fused)

    @property
    def adapters(self) -> list[str]:
        return self._adapters.names

    def evaluate(self, queries: Sequence[Query], grid: tuple[int, int]) -> list[Answer]:
        """Answers to queries of one grid (rows, columns of tokens), in one forward pass.

        Each goes only as far through the blocks as its cache makes it.
        """
        foreseen = [None if query.cache is None else query.cache.velocity() for query in queries]
        asked = [query for query, velocity in zip(queries, foreseen, strict=True) if velocity is None]
        computed: list[Answer] = []
        if asked:
            evaluate = self._evaluate_in_parts if any(query.cache for query in asked) else self._evaluate_at_once
            computed = evaluate(asked, grid)
        answers = iter(computed)
        return [next(answers) if velocity is None else Answer(velocity, 0.0) for velocity in foreseen]

    def _evaluate_at_once(self, queries: Sequence[Query], grid: tuple[int, int]) -> list[Answer]:
        latents, sigmas, embeds, gate = self._collate(queries)
        self._adapters.use(gate)
        return [Answer(velocity, 1.0) for velocity in predict_velocity(self.transformer, latents, sigmas, embeds, grid)]

    def _evaluate_in_parts(self, queries: Sequence[Query], grid: tuple[int, int]) -> list[Answer]:
        """The first block for all, the others for those whose cache has no answer then."""
        transformer = self.transformer
        entered = self._enter(queries, grid)
        first, *others = transformer.transformer_blocks
        begun = self._through([first], entered)
        heads = begun.image - entered.image
        tails = [
            None if query.cache is None else query.cache.tail(head) for query, head in zip(queries, heads, strict=True)
        ]
        missed = [row for row, tail in enumerate(tails) if tail is None]
        image = begun.image.clone()
        if missed:
            image[missed] = self._through(others, begun.rows(missed)).image
        for row, tail in enumerate(tails):
            if tail is not None:
                image[row] += tail
        velocities = transformer.proj_out(transformer.norm_out(image, entered.temb)).float()
        for row in missed:
            if (cache := queries[row].cache) is not None:
                cache.learn(Evaluation(heads[row], image[row] - begun.image[row], velocities[row]))
        share = 1 / len(transformer.transformer_blocks)
        return [
            Answer(velocity, 1.0 if tail is None else share) for velocity, tail in zip(velocities, tails, strict=True)
        ]

    def _collate(
        self, queries: Sequence[Query]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """Latents (batch, tokens, channels), sigmas (batch,), embeddings a row, gates of the adapters."""
        latents = torch.stack([query.latent for query in queries])
        sigmas = torch.tensor([query.sigma for query in queries])
        weights = [(query.adapter, query.adapter_scale) for query in queries]
        gate = self._adapters.gate(weights)
        if gate is not None:
            gate = gate.to(latents.device, self.transformer.dtype)
        return latents, sigmas, [query.embeds for query in queries], gate

    def _enter(self, queries: Sequence[Query], grid: tuple[int, int]) -> _Tokens:
        """What `QwenImageTransformer2DModel.forward` does before its first block."""
        transformer = self.transformer
        latents, sigmas, embeds, gate = self._collate(queries)
        device, dtype = latents.device, transformer.dtype
        padded, mask = _pad(embeds, device, dtype)
        image = transformer.img_in(latents.to(dtype))
        text = transformer.txt_in(transformer.txt_norm(padded))
        temb = transformer.time_text_embed(sigmas.to(device, dtype), image, None)
        rotary = transformer.pos_embed([[(1, *grid)]], max_txt_seq_len=padded.shape[1], device=device)
        return _Tokens(image, text, mask, temb, rotary, gate)

    def _through(self, blocks: Sequence[torch.nn.Module], tokens: _Tokens) -> _Tokens:
        self._adapters.use(tokens.gate)
        image, text = tokens.image, tokens.text
        for block in blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=tokens.mask,
                temb=tokens.temb,
                image_rotary_emb=tokens.rotary,
            )
        return replace(tokens, image=image, text=text)


@dataclass(frozen=True)
class _Tokens:
    """What goes through the blocks.

    Attributes:
        image: (batch, tokens, width).
        text: (batch, length, width).
        mask: (batch, length), or None where all texts have that length.
        temb: (batch, width).
        rotary: of image and text, for every row alike.
        gate: (batch, ranks), or None without adapters.
    """

    image: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    temb: torch.Tensor
    rotary: Any
    gate: torch.Tensor | None

    def rows(self, chosen: list[int]) -> _Tokens:
        if len(chosen) == len(self.image):
            return self
        mask, gate = (None if part is None else part[chosen] for part in (self.mask, self.gate))
        return _Tokens(self.image[chosen], self.text[chosen], mask, self.temb[chosen], self.rotary, gate)


def _pad(
    embeds: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings (batch, length, width) and the mask of those that are no padding, None if none is."""
    lengths = torch.tensor([len(embed) for embed in embeds])
    padded = pad_sequence(list(embeds), batch_first=True).to(device, dtype)
    if lengths.min() == lengths.max():
        return padded, None
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
