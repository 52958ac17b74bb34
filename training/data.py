"""Scenes as latents: rendered and encoded once per size, captioned anew at every draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from safetensors.torch import load_file, save_file

from stages.vae import convolve_images
from training.scenes import COLORS, FILLS, SHAPES, Scene, caption, render, sample_scene
from training.vae import to_pixels


@dataclass(frozen=True)
class SizeShare:
    """`count` scenes of `width` x `height` pixels, drawn with probability `share`."""

    width: int
    height: int
    count: int
    share: float


def normalise(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Autoencoder latents (B, C, 1, h, w) to the zero mean and unit deviation that the transformer sees."""
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, h, w) to the transformer's tokens (B, h * w / 4, 4 * C)."""
    batch, channels, _, height, width = latents.shape
    return QwenImagePipeline._pack_latents(latents, batch, channels, height, width)


# What `object_labels` tells of a token, and how many values each has.
LABELS = {"shape": len(SHAPES), "color": len(COLORS), "fill": len(FILLS)}
NO_OBJECT = -1


def object_labels(scenes: list[Scene], size: SizeShare, patch: int) -> torch.Tensor:
    """Which object each image token shows: indices (B, tokens, 3) in the order of LABELS, or NO_OBJECT.

    A token is a square of `patch` pixels, and shows an object when it touches the circle around it.
    """
    tops = torch.arange(0, size.height, patch)[:, None]
    lefts = torch.arange(0, size.width, patch)[None, :]

    def gap(start: torch.Tensor, point: float) -> torch.Tensor:
        return (start - point).clamp(min=0) + (point - start - patch).clamp(min=0)

    labels = torch.full((len(scenes), len(tops), lefts.shape[1], len(LABELS)), NO_OBJECT)
    for row, scene in zip(labels, scenes, strict=True):
        for thing in scene.objects:
            across, down = gap(lefts, thing.x * size.width), gap(tops, thing.y * size.height)
            touched = torch.hypot(across, down) < thing.radius * min(size.width, size.height)
            indices = SHAPES.index(thing.shape), list(COLORS).index(thing.color), FILLS.index(thing.fill)
            row[touched] = torch.tensor(indices)
    return labels.flatten(1, 2)


@dataclass(frozen=True)
class Examples:
    """A batch of one size.

    Attributes:
        latents: float32 (B, tokens, 4 * C).
        captions: B texts.
        labels: int64 (B, tokens, 3), see `object_labels`.
        shape: (1, h / 2, w / 2) of the latents, for rotary embeddings.
    """

    latents: torch.Tensor
    captions: list[str]
    labels: torch.Tensor
    shape: tuple[int, int, int]


class SceneLatents:
    """Scenes of one size with their latents, made on first use and kept in `directory`."""

    def __init__(self, vae: AutoencoderKLQwenImage, size: SizeShare, directory: Path, seed: int) -> None:
        rng = Random(f"{seed} {size.width}x{size.height}")
        self.size = size
        self.patch = vae.spatial_compression_ratio * 2
        self.scenes = [sample_scene(rng) for _ in range(size.count)]
        # Another seed or count is other scenes: their captions must not meet these latents.
        path = directory / f"latents-{size.width}x{size.height}-{size.count}-seed-{seed}.safetensors"
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            save_file({"latents": self._encode(vae, rng)}, path)
        self.latents = load_file(path)["latents"]

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKLQwenImage, rng: Random) -> torch.Tensor:
        def encode(scenes: list[Scene]) -> torch.Tensor:
            pixels = to_pixels([render(scene, rng, self.size.width, self.size.height) for scene in scenes])
            posterior = vae.encode(pixels).latent_dist
            return pack(normalise(vae, posterior.mode())).bfloat16()

        vae = convolve_images(vae)
        return torch.cat([encode(self.scenes[start : start + 32]) for start in range(0, len(self.scenes), 32)])

    def draw(self, rng: Random, count: int) -> Examples:
        """`count` scenes, captioned anew."""
        rows = [rng.randrange(len(self.scenes)) for _ in range(count)]
        scenes = [self.scenes[row] for row in rows]
        return Examples(
            self.latents[rows].float(),
            [caption(scene, rng) for scene in scenes],
            object_labels(scenes, self.size, self.patch),
            (1, self.size.height // self.patch, self.size.width // self.patch),
        )


class SceneBatches:
    """Batches over several sizes; a batch has one size and about the same number of tokens as any other."""

    def __init__(self, vae: AutoencoderKLQwenImage, sizes: list[SizeShare], directory: Path, seed: int) -> None:
        self._sets = [SceneLatents(vae, size, directory, seed) for size in sizes]
        self._shares = [size.share for size in sizes]

    def draw(self, rng: Random, tokens: int) -> Examples:
        """As many scenes as have about `tokens` image tokens together."""
        chosen = rng.choices(self._sets, self._shares)[0]
        return chosen.draw(rng, max(1, tokens * chosen.patch**2 // (chosen.size.width * chosen.size.height)))
