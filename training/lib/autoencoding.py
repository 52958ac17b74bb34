"""Training data of the autoencoder, and sheets of its reconstructions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from scenes.examples import examples
from scenes.renderer import render
from scenes.scene import Scene, sample_scene
from training.lib.images import grid, to_images, to_pixels

CROP = 64


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKLQwenImage, seed: int, path: Path) -> None:
    """Write a PNG file of 16 scenes, drawn by `seed`, each above its reconstruction."""
    truth = [image for image, _ in islice(examples(seed), 16)]
    decoded = to_images(vae.decode(vae.encode(to_pixels(truth).to(vae.device)).latent_dist.mode()).sample)
    grid(truth[:8] + decoded[:8] + truth[8:] + decoded[8:], 8).save(path)


def _crop(scene: Scene, image: Image.Image, rng: Random) -> Image.Image:
    """Crop a square of side `CROP` around one of the objects; a crop of background alone would teach nothing."""
    thing = rng.choice(scene.objects)
    left = min(max(round(thing.x * image.width - rng.uniform(0.2, 0.8) * CROP), 0), image.width - CROP)
    top = min(max(round(thing.y * image.height - rng.uniform(0.2, 0.8) * CROP), 0), image.height - CROP)
    return image.crop((left, top, left + CROP, top + CROP))


def crops(seed: int, count: int) -> torch.Tensor:
    """Render and crop new scenes: (count, 3, 1, CROP, CROP) in float32, -1 to 1."""
    rng = Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return to_pixels([_crop(scene, render(scene, rng), rng) for scene in scenes])
