"""Latents to pixels to files."""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from backends import Backend
from stages.finite import NotFinite
from stages.model import ModelConfig, load_vae

ImageFormat = Literal["png", "jpeg", "webp"]


def decode_pixels(vae: AutoencoderKLQwenImage, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Pixels (batch, 3, 1, height, width), about -1 to 1, of latents (batch, rows * columns, channels)."""
    scale = vae.spatial_compression_ratio
    height, width = (2 * scale * side for side in grid)
    weight = next(vae.parameters())  # diffusers' own `device` and `dtype` visit every module each time
    unpacked = QwenImagePipeline._unpack_latents(latents.to(weight.device), height, width, scale)
    mean = torch.tensor(vae.config.latents_mean, device=weight.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=weight.device).view(1, -1, 1, 1, 1)
    return vae.decode((unpacked * std + mean).to(weight.dtype), return_dict=False)[0]


@torch.inference_mode()
def decode_latents(vae: AutoencoderKLQwenImage, latents: torch.Tensor, grid: tuple[int, int]) -> list[Image.Image]:
    """RGB images of latents (batch, rows * columns, channels) on the device of `vae`."""
    return _to_images(decode_pixels(vae, latents, grid)[:, :, 0])


def _to_images(pixels: torch.Tensor) -> list[Image.Image]:
    return VaeImageProcessor().postprocess(pixels.float(), output_type="pil")


class Decoder:
    """The autoencoder's decoder on a device."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._vae = load_vae(config, backend)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, grid: tuple[int, int]) -> list[Image.Image | NotFinite]:
        """RGB images of latents (batch, rows * columns, channels), or why there is none."""
        pixels = decode_pixels(self._vae, latents, grid)[:, :, 0]
        finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
        images = _to_images(pixels.nan_to_num())
        return [image if good else NotFinite("decode") for image, good in zip(images, finite, strict=True)]


def to_file(image: Image.Image, format: ImageFormat, quality: int = 95) -> bytes:
    """Bytes of an image file; `quality` (1 to 100) is for jpeg and webp."""
    buffer = BytesIO()
    options = {"compress_level": 3} if format == "png" else {"quality": quality}
    image.save(buffer, format=format, **options)
    return buffer.getvalue()
