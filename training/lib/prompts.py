"""Prompts for distillation: captions of scenes, or for any other model the lines of a file."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Self

from scenes.captions import caption, draw_value
from scenes.scene import sample_scene
from stages.families.qwen_image import EMPTY_PROMPT


def _draw_list(rng: Random) -> str:
    """Draw a negative prompt for a scene: one to three values, as words or captions."""
    return ", ".join(draw_value(rng) for _ in range(rng.choice((1, 1, 2, 3))))


def _told(text: str) -> set[str]:
    """Return the words of a prompt that specify something."""
    return {word.strip(",.!") for word in text.lower().split()} - {"a", "an", "and", "on", "shape", "background"}


class Prompts:
    """A source of random prompts and negative prompts."""

    def __init__(self, lines: list[str] | None = None, negative_lines: list[str] | None = None) -> None:
        """Take the prompts to draw from.

        Args:
            lines: prompts, or None to draw captions of scenes.
            negative_lines: negative prompts, or None to draw values of scenes, or none at all if there are `lines`.
        """
        self._lines = lines
        self._negative_lines = negative_lines

    @classmethod
    def read(cls, config: dict[str, Any]) -> Self:
        """Read the files that a config's `prompts` and `negative_prompts` name, with a prompt on each line."""
        files = [config.get(key) for key in ("prompts", "negative_prompts")]
        return cls(*(Path(file).read_text().splitlines() if file else None for file in files))

    def draw(self, rng: Random, count: int) -> list[str]:
        """Draw `count` prompts."""
        if self._lines is not None:
            return rng.choices(self._lines, k=count)
        return [caption(sample_scene(rng), rng) for _ in range(count)]

    def draw_negative(self, rng: Random, prompt: str, share: float) -> str:
        """Draw a negative prompt, or return the empty one.

        Args:
            rng: source of randomness.
            prompt: the image's prompt; a negative prompt that shares a word with it is replaced by the empty one.
            share: probability of a negative prompt.
        """
        if rng.random() >= share:
            return EMPTY_PROMPT
        if self._negative_lines:
            avoided = rng.choice(self._negative_lines)
        elif self._lines is None and self._negative_lines is None:
            avoided = _draw_list(rng)
        else:
            return EMPTY_PROMPT
        return EMPTY_PROMPT if _told(avoided) & _told(prompt) else avoided
