"""A perceptual embedding of scenes, by a small network trained on renders.

`python -m bench embedding scenes/embedding.safetensors` trains it, in a few minutes on two cores. Distances between
sets of images are usually computed from Inception's features, but Inception was trained on photographs; and LPIPS needs
torchvision. This network likewise learns features from recognition, but in the domain itself: it predicts the shape,
colour, fill and size of the objects in each cell of the image, the background and the blur. The layer before the
outputs is the embedding.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn

from scenes.renderer import render
from scenes.scene import ATTRIBUTES, BACKGROUNDS, Scene, sample_scene

_SIDE = 128
WEIGHTS = Path(__file__).with_suffix(".safetensors")
_GRID = 4  # cells along each side; in each the network predicts an object's attributes, or none
_BLURS = (0.0, 0.6, 1.0, 1.6)  # standard deviations in pixels
_HEADS = {name: ATTRIBUTES[name] for name in ("shape", "color", "fill", "size")}


class SceneEmbedding(nn.Module):
    """A network that maps images (batch, 3, 128, 128), -1 to 1, to embeddings (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(96, 16, 1), nn.Flatten(), nn.Linear(16 * 64, 64))
        outputs = len(BACKGROUNDS) + len(_BLURS) + _GRID**2 * sum(len(values) + 1 for values in _HEADS.values())
        self.head = nn.Linear(64, outputs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.features(pixels)

    def loss(self, pixels: torch.Tensor, scenes: Sequence[Scene], blurs: Sequence[int]) -> torch.Tensor:
        """Return the summed cross entropy of all predictions.

        Args:
            pixels: images (batch, 3, 128, 128), -1 to 1.
            scenes: the scene of each image.
            blurs: each image's blur, as an index into `_BLURS`.
        """
        outputs = self.head(F.silu(self(pixels)))
        background, blur = outputs[:, : len(BACKGROUNDS)], outputs[:, len(BACKGROUNDS) :][:, : len(_BLURS)]
        cells = outputs[:, len(BACKGROUNDS) + len(_BLURS) :]
        grounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        losses = [F.cross_entropy(background, grounds), F.cross_entropy(blur, torch.tensor(blurs))]
        truth = torch.zeros(len(scenes), _GRID, _GRID, len(_HEADS), dtype=torch.long)
        for row, scene in zip(truth, scenes, strict=True):
            for thing in scene.objects:
                values = (thing.shape, thing.color, thing.fill, thing.size)
                row[int(_GRID * thing.y), int(_GRID * thing.x)] = torch.tensor(
                    [1 + names.index(value) for names, value in zip(_HEADS.values(), values, strict=True)]
                )
        parts = cells.unflatten(1, (-1, _GRID**2)).split([len(values) + 1 for values in _HEADS.values()], dim=1)
        losses += [F.cross_entropy(part, truth[..., i].flatten(1)) for i, part in enumerate(parts)]
        return torch.stack(losses).sum()


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Convert RGB images to (batch, 3, 128, 128) in float32, -1 to 1; images of other sizes are resized."""
    sized = [image if image.size == (_SIDE, _SIDE) else image.resize((_SIDE, _SIDE)) for image in images]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in sized]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def _trained() -> SceneEmbedding:
    network = SceneEmbedding().eval()
    network.load_state_dict(load_file(WEIGHTS))
    return network


@torch.inference_mode()
def embed(images: Sequence[Image.Image], batch: int = 64) -> NDArray[np.float64]:
    """Embed RGB images by the trained network, at most `batch` at a time: (images, 64)."""
    parts = [_trained()(to_tensor(images[start : start + batch])) for start in range(0, len(images), batch)]
    return torch.cat(parts).double().numpy()


def train(steps: int, batch: int = 32) -> SceneEmbedding:
    """Train the network on new renders for a number of steps, and print the loss."""
    torch.manual_seed(0)
    rng, network = Random(0), SceneEmbedding()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for index in range(steps):
        scenes = [sample_scene(rng) for _ in range(batch)]
        blurs = [rng.randrange(len(_BLURS)) for _ in scenes]
        images = [
            render(scene, rng, _SIDE, _SIDE).filter(ImageFilter.GaussianBlur(_BLURS[blur]))
            for scene, blur in zip(scenes, blurs, strict=True)
        ]
        loss = network.loss(to_tensor(images), scenes, blurs)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if index % 100 == 99:
            print(f"step {index + 1}: loss {loss.item():.3f}", flush=True)
    return network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("output", type=Path, help="safetensors file of the weights")
    parser.add_argument("--steps", type=int, default=1500)


def run(arguments: argparse.Namespace) -> None:
    """Train the network and write its weights in float16."""
    save_file(train(arguments.steps).half().state_dict(), arguments.output)
