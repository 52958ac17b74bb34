"""Prompts to distil on: scene captions, or the lines of a file for any other model."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from diffusers import QwenImagePipeline

from training.scenes import caption, sample_scene


class Prompts:
    """Draws prompts and embeds them with a frozen text encoder."""

    def __init__(self, pipeline: QwenImagePipeline, file: Path | None) -> None:
        self._pipeline = pipeline
        self._lines = file.read_text().splitlines() if file else None

    def draw(self, rng: Random, count: int) -> list[str]:
        if self._lines is not None:
            return rng.choices(self._lines, k=count)
        return [caption(sample_scene(rng), rng) for _ in range(count)]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> list[torch.Tensor]:
        """Embeddings (length, width) a prompt, without padding."""
        embeds, mask = self._pipeline.encode_prompt(prompts, device=self._pipeline.text_encoder.device)
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
