"""Conversion of images to tensors and back, and sheets of images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Convert RGB images to (batch, 3, 1, height, width) in float32, -1 to 1."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert pixels (batch, 3, 1, height, width), -1 to 1, to RGB images."""
    array = ((pixels.squeeze(2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Arrange images of one size in rows of `columns`, with a gap of 2 pixels."""
    width, height = images[0].width + 2, images[0].height + 2
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
