"""Prompts to distil on: scene captions, or the lines of a file for any other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
from diffusers import QwenImagePipeline

from stages.encode import EMPTY_PROMPT
from training.scenes import ATTRIBUTES, caption, describe_value, name_value, sample_scene


def _draw_value(rng: Random) -> str:
    """As a word or as a caption; each attribute as often, however many values it has."""
    attribute = rng.choice(list(ATTRIBUTES))
    return rng.choice((name_value, describe_value))(attribute, rng.choice(ATTRIBUTES[attribute]))


@dataclass(frozen=True)
class Texts:
    """What the images of a batch are drawn for.

    Attributes:
        embeds, negatives: of the prompts and of what to avoid, (length, width) an image.
        avoids: whether there is something to avoid, or the negative prompt is the empty one.
    """

    embeds: list[torch.Tensor]
    negatives: list[torch.Tensor]
    avoids: list[bool]


class Prompts:
    """Draws prompts and embeds them with a frozen text encoder."""

    def __init__(
        self, pipeline: QwenImagePipeline, lines: list[str] | None = None, negative_lines: list[str] | None = None
    ) -> None:
        """Args:
        lines: to draw from, or None for scenes' captions.
        negative_lines: the same for what to avoid; with `lines` but none of these, nothing is.
        """
        self._pipeline = pipeline
        self._lines = lines
        self._negative_lines = negative_lines

    @classmethod
    def read(cls, pipeline: QwenImagePipeline, config: dict[str, Any]) -> Self:
        """From the files that a config's `prompts` and `negative_prompts` name, a prompt a line."""
        files = [config.get(key) for key in ("prompts", "negative_prompts")]
        return cls(pipeline, *(Path(file).read_text().splitlines() if file else None for file in files))

    def draw(self, rng: Random, count: int) -> list[str]:
        if self._lines is not None:
            return rng.choices(self._lines, k=count)
        return [caption(sample_scene(rng), rng) for _ in range(count)]

    def draw_negative(self, rng: Random, prompt: str, share: float) -> str:
        """For a share of the prompts something to avoid, which `prompt` does not ask for; else the empty one."""
        if rng.random() >= share:
            return EMPTY_PROMPT
        if self._negative_lines:
            avoided = rng.choice(self._negative_lines)
        elif self._lines is None and self._negative_lines is None:
            avoided = _draw_value(rng)
        else:
            return EMPTY_PROMPT
        return EMPTY_PROMPT if avoided in prompt else avoided

    def texts(self, prompts: list[str], negative_prompts: list[str]) -> Texts:
        """Both embedded."""
        avoids = [negative != EMPTY_PROMPT for negative in negative_prompts]
        return Texts(self.embed(prompts), self.embed(negative_prompts), avoids)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> list[torch.Tensor]:
        """Embeddings (length, width) a prompt, without padding."""
        embeds, mask = self._pipeline.encode_prompt(prompts, device=self._pipeline.text_encoder.device)
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
