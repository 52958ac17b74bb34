"""Images as tensors and back, and sheets of them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """RGB images as (B, 3, 1, H, W) float32 in -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, 1, H, W) in -1..1 as RGB images."""
    array = ((pixels.squeeze(2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row, with a gap of 2 pixels."""
    width, height = images[0].width + 2, images[0].height + 2
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
