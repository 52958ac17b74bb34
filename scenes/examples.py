"""Training examples for a text-to-image model: images of scenes and their captions."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from PIL import Image

from scenes.captions import caption
from scenes.renderer import render
from scenes.scene import sample_scene


def examples(seed: int, width: int = 128, height: int = 128) -> Iterator[tuple[Image.Image, str]]:
    """Yield pairs of an RGB image and its caption without end; the same seed gives the same pairs."""
    rng = Random(seed)
    while True:
        scene = sample_scene(rng)
        yield render(scene, rng, width, height), caption(scene, rng)
