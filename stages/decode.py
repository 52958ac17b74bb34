"""From latents to pixels, and from pixels to files."""

from __future__ import annotations

from io import BytesIO

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from backends import Backend
from stages.config import ModelConfig
from stages.errors import NotFinite
from stages.image import ImageFormat
from stages.loading import load_autoencoder


class Decoder:
    """The autoencoder's decoder on a device."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._autoencoder = load_autoencoder(config, backend)
        self._backend = backend

    def decode(self, latents: torch.Tensor, grid: tuple[int, int]) -> list[Image.Image | NotFinite]:
        """Decode latents (batch, rows * columns, channels) into RGB images; NotFinite replaces an image that is not."""
        # One image at a time where every number of them would be compiled.
        batches = [latents] if self._backend.shapes is None else latents.split(1)
        with self._backend.inference():
            decoded = [self._autoencoder.decode(batch.to(self._backend.device), grid) for batch in batches]
        pixels = torch.cat([part.cpu() for part in decoded])
        finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
        images = to_images(pixels.nan_to_num())
        return [image if good else NotFinite("decode") for image, good in zip(images, finite, strict=True)]


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Turn pixels (batch, 3, height, width), about -1 to 1, into RGB images."""
    return VaeImageProcessor().postprocess(pixels.float(), output_type="pil")


def to_file(image: Image.Image, format: ImageFormat, quality: int = 95) -> bytes:
    """Encode an image file; `quality` (0 to 100) applies to jpeg and webp."""
    buffer = BytesIO()
    options = {"compress_level": 3} if format == "png" else {"quality": quality}
    image.save(buffer, format=format, **options)
    return buffer.getvalue()
