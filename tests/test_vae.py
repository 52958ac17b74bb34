"""The autoencoder on single images, against its unmodified self."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from backends import Backend
from stages.config import ModelConfig
from stages.decode import to_file
from stages.image import ImageFormat
from stages.loading import load_autoencoder


@pytest.fixture(scope="module")
def original(config: ModelConfig) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(config.source, subfolder="vae", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def convolving(config: ModelConfig, backend: Backend) -> AutoencoderKLQwenImage:
    return load_autoencoder(config, backend).module


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max())


@pytest.mark.parametrize("shape", [(1, 3, 1, 64, 64), (2, 3, 1, 48, 96)])
@torch.inference_mode()
def test_encoding_is_exact(
    original: AutoencoderKLQwenImage, convolving: AutoencoderKLQwenImage, shape: tuple[int, ...]
) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = original.encode(images).latent_dist
    actual = convolving.encode(images).latent_dist
    assert expected.mean.shape[2:] == (1, shape[3] // 8, shape[4] // 8)
    assert difference(actual.mean, expected.mean) < 1e-5
    assert difference(actual.logvar, expected.logvar) < 1e-5
    assert expected.mean.std() > 1e-2


@pytest.mark.parametrize("shape", [(1, 16, 1, 8, 8), (2, 16, 1, 6, 12)])
@torch.inference_mode()
def test_decoding_is_exact(
    original: AutoencoderKLQwenImage, convolving: AutoencoderKLQwenImage, shape: tuple[int, ...]
) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = original.decode(latents).sample
    assert expected.shape[2:] == (1, 8 * shape[3], 8 * shape[4])
    assert difference(convolving.decode(latents).sample, expected) < 1e-5
    assert expected.std() > 1e-2


@torch.inference_mode()
def test_images_of_a_batch_do_not_touch_each_other(convolving: AutoencoderKLQwenImage) -> None:
    latents = torch.randn((3, 16, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    together = convolving.decode(latents).sample
    alone = torch.cat([convolving.decode(latent[None]).sample for latent in latents])
    assert difference(together, alone) < 1e-5


@pytest.fixture
def image() -> Image.Image:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (48, 1)), np.full((48, 64), 90, np.uint8)] * 2, axis=-1)[..., :3])


def test_png_is_lossless(image: Image.Image) -> None:
    again = Image.open(BytesIO(to_file(image, "png")))
    assert (again.format, again.size, again.mode) == ("PNG", (64, 48), "RGB")
    assert np.array_equal(np.asarray(again), np.asarray(image))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_sets_the_size_of_lossy_files(image: Image.Image, format: ImageFormat) -> None:
    good, poor = to_file(image, format, quality=95), to_file(image, format, quality=5)
    assert len(poor) < len(good)
    again = Image.open(BytesIO(good))
    assert (again.format, again.size) == (format.upper(), (64, 48))
    assert np.abs(np.asarray(again, np.int16) - np.asarray(image, np.int16)).mean() < 5
