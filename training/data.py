"""Scenes as latents: rendered and encoded once per size, captioned anew at every draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from safetensors.torch import load_file, save_file

from stages.vae import convolve_images
from training.scenes import Scene, caption, render, sample_scene
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


class SceneLatents:
    """Scenes of one size with their latents, made on first use and kept in `directory`."""

    def __init__(self, vae: AutoencoderKLQwenImage, size: SizeShare, directory: Path, seed: int) -> None:
        rng = Random(f"{seed} {size.width}x{size.height}")
        self.size = size
        self.scenes = [sample_scene(rng) for _ in range(size.count)]
        path = directory / f"latents-{size.width}x{size.height}.safetensors"
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            save_file({"latents": self._encode(vae, rng)}, path)
        self.latents = load_file(path)["latents"]

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKLQwenImage, rng: Random) -> torch.Tensor:
        def encode(scenes: list[Scene]) -> torch.Tensor:
            pixels = to_pixels([render(scene, rng, self.size.width, self.size.height) for scene in scenes])
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
            return pack(normalise(vae, posterior.mode().float())).bfloat16()

        vae = convolve_images(vae)
        return torch.cat([encode(self.scenes[start : start + 32]) for start in range(0, len(self.scenes), 32)])

    def draw(self, rng: Random, count: int) -> tuple[torch.Tensor, list[str]]:
        """Tokens (count, tokens, 4 * C) in float32 and their captions."""
        rows = [rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.latents[rows].float(), [caption(self.scenes[row], rng) for row in rows]


class SceneBatches:
    """Batches over several sizes; a batch has one size and about the same number of tokens as any other."""

    def __init__(self, vae: AutoencoderKLQwenImage, sizes: list[SizeShare], directory: Path, seed: int) -> None:
        self._sets = [SceneLatents(vae, size, directory, seed) for size in sizes]
        self._shares = [size.share for size in sizes]
        self._patch = vae.spatial_compression_ratio * 2

    def draw(self, rng: Random, tokens: int) -> tuple[torch.Tensor, list[str], tuple[int, int, int]]:
        """About `tokens` image tokens: rows, captions and the shape (1, h / 2, w / 2) for rotary embeddings."""
        chosen = rng.choices(self._sets, self._shares)[0]
        shape = (1, chosen.size.height // self._patch, chosen.size.width // self._patch)
        rows, captions = chosen.draw(rng, max(1, tokens // (shape[1] * shape[2])))
        return rows, captions, shape
