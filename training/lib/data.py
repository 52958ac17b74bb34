"""Latents of scenes, which are rendered and encoded once and captioned anew in every batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from scenes.captions import caption
from scenes.renderer import render
from scenes.scene import COLORS, FILLS, SHAPES, Scene, sample_scene
from stages.families.qwen_image.autoencoder import convolve_images, moments
from stages.latents import pack
from training.lib.images import to_pixels


@dataclass(frozen=True)
class SizeShare:
    """Scenes of one size.

    Attributes:
        width, height: pixels.
        count: number of scenes.
        share: weight with which a batch has this size.
    """

    width: int
    height: int
    count: int
    share: float


def normalise(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Normalise latents (batch, channels, 1, height, width) to zero mean and unit deviation, as the transformer has."""
    mean, std = moments(vae, latents.device)
    return (latents - mean) / std


# Turns texts into tokens and their mask, see `training.lib.text.tokenize`.
Tokenize = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]

# The attributes of `object_labels`, and their numbers of values.
LABELS = {"shape": len(SHAPES), "color": len(COLORS), "fill": len(FILLS)}
NO_OBJECT = -1


def object_labels(scenes: list[Scene], size: SizeShare, patch: int) -> torch.Tensor:
    """Label each image token with the attributes of the object that it shows.

    A token shows an object if its square touches the object's circumscribed circle.

    Args:
        scenes: the scenes.
        size: their size.
        patch: side of a token's square in pixels.

    Returns:
        int64 (scenes, tokens, 3): indices of values in the order of LABELS, or NO_OBJECT.
    """
    tops = torch.arange(0, size.height, patch)[:, None]
    lefts = torch.arange(0, size.width, patch)[None, :]

    def gap(start: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        points = points[:, None, None]
        return (start - points).clamp(min=0) + (points - start - patch).clamp(min=0)

    labels = torch.full((len(scenes), len(tops), lefts.shape[1], len(LABELS)), NO_OBJECT)
    # All first objects, then all second ones, and so on, because a scene's later objects are on top.
    for things in itertools.zip_longest(*(scene.objects for scene in scenes)):
        shown = [(row, thing) for row, thing in enumerate(things) if thing is not None]
        rows = torch.tensor([row for row, _ in shown])
        x, y, radius = torch.tensor([(thing.x, thing.y, thing.radius) for _, thing in shown]).unbind(1)
        across, down = gap(lefts, x * size.width), gap(tops, y * size.height)
        at, row, column = torch.nonzero(
            torch.hypot(across, down) < radius[:, None, None] * min(size.width, size.height), as_tuple=True
        )
        indices = [(SHAPES.index(t.shape), list(COLORS).index(t.color), FILLS.index(t.fill)) for _, t in shown]
        labels[rows[at], row, column] = torch.tensor(indices)[at]
    return labels.flatten(1, 2)


@dataclass(frozen=True)
class Captions:
    """A batch of captioned scenes of one size.

    Attributes:
        chosen: index of the size.
        rows: int64 (batch,), indices of the scenes among those of that size.
        tokens: int64 (batch, length), their captions in the prompt template, see `training.lib.text.tokenize`.
        mask: bool (batch, length), False for padding.
    """

    chosen: int
    rows: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


class _Renders(Dataset[Image.Image]):
    """Renders of scenes."""

    def __init__(self, scenes: list[Scene], size: SizeShare, seed: int) -> None:
        self._scenes, self._size, self._seed = scenes, size, seed

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Image.Image:
        rng = Random(f"{self._seed} {index}")
        return render(self._scenes[index], rng, self._size.width, self._size.height)


class SceneLatents:
    """Scenes of one size with their latents, which are computed on first use and then read from a file.

    Attributes:
        size: the size.
        patch: side of a token's square in pixels.
        scenes: the scenes.
        latents: (scenes, tokens, channels) in bfloat16, normalised.
        labels: int8 (scenes, tokens, 3), see `object_labels`.
        grid: rows and columns of tokens.
    """

    def __init__(
        self, vae: AutoencoderKLQwenImage, size: SizeShare, directory: Path, seed: int, workers: int = 0
    ) -> None:
        """Draw the scenes, and read or compute their latents.

        Args:
            vae: the autoencoder.
            size: size and number of the scenes.
            directory: where the latents are kept.
            seed: seed of scenes and renders.
            workers: number of processes that render, or 0 to render in this one.
        """
        rng = Random(f"{seed} {size.width}x{size.height}")
        self.size = size
        self.patch = vae.spatial_compression_ratio * 2
        self.scenes = [sample_scene(rng) for _ in range(size.count)]
        # The name has seed and count, because with others these latents would belong to other scenes.
        path = directory / f"latents-{size.width}x{size.height}-{size.count}-seed-{seed}.safetensors"
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            renders = DataLoader(
                _Renders(self.scenes, size, seed), batch_size=32, num_workers=workers, collate_fn=to_pixels
            )
            save_file({"latents": _encode(vae, renders)}, path)
        self.latents = load_file(path)["latents"]
        self.labels = object_labels(self.scenes, size, self.patch).to(torch.int8)
        self.grid = (size.height // self.patch, size.width // self.patch)


@torch.no_grad()
def _encode(vae: AutoencoderKLQwenImage, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Encode batches of images (batch, 3, 1, height, width) as normalised tokens, in bfloat16 on the CPU."""
    convolve_images(vae)
    return torch.cat(
        [
            pack(normalise(vae, vae.encode(pixels.to(vae.device)).latent_dist.mode())[:, :, 0]).bfloat16().cpu()
            for pixels in batches
        ]
    )


class SceneBatches(Dataset[Captions]):
    """Batches of captioned scenes by index; each has one size, and all have about the same number of image tokens."""

    def __init__(self, sets: Sequence[SceneLatents], tokens: int, seed: int, tokenize: Tokenize) -> None:
        """Take scenes of several sizes.

        Args:
            sets: the scenes of each size.
            tokens: approximate number of image tokens in a batch.
            seed: seed of the choice of scenes and of their captions.
            tokenize: tokenizer of the captions.
        """
        self._scenes = [scenes.scenes for scenes in sets]
        self._shares = [scenes.size.share for scenes in sets]
        self._counts = [max(1, tokens // (scenes.grid[0] * scenes.grid[1])) for scenes in sets]
        self._seed, self._tokenize = seed, tokenize

    def __getitem__(self, index: int) -> Captions:
        rng = Random(f"{self._seed} {index}")
        (chosen,) = rng.choices(range(len(self._scenes)), self._shares)
        scenes = self._scenes[chosen]
        rows = rng.choices(range(len(scenes)), k=self._counts[chosen])
        return Captions(chosen, torch.tensor(rows), *self._tokenize([caption(scenes[row], rng) for row in rows]))


def in_order(batches: SceneBatches, workers: int) -> Callable[[int], Captions]:
    """Return a function that draws `batches[index]` for consecutive indices.

    Args:
        batches: the batches.
        workers: number of processes that draw batches ahead of time, or 0 to draw in this one.
    """
    ahead: Iterator[Captions] | None = None

    def draw(index: int) -> Captions:
        nonlocal ahead
        if ahead is None:
            loader = DataLoader(batches, batch_size=None, sampler=itertools.count(index), num_workers=workers)
            ahead = iter(loader)
        return next(ahead)

    return draw
