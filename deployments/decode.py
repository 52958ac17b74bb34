"""The autoencoder's decoder in a replica: where an image leaves as a file."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from ray import serve

from backends import Backend
from stages.decode import Decoder, ImageFormat, to_file
from stages.finite import NotFinite
from stages.model import ModelConfig
from stages.packet import LatentPacket, Span

Grid = tuple[int, int]


@dataclass(frozen=True)
class DecodedImage:
    """An image file and how it came about.

    Attributes:
        index: which of the request's images.
        data: bytes of the file.
        text_tokens: of the request's prompts.
        image_tokens: of the latent.
        spans: one for each stage.
    """

    index: int
    seed: int
    data: bytes
    text_tokens: int
    image_tokens: int
    spans: tuple[Span, ...]


class VAEDecoder:
    """One thread uses the device, and another writes files.

    Latents that arrive while a batch is on the device make up the next one.
    """

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        self._decoder = Decoder(model, backend)
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")

    async def decode(self, packet: LatentPacket, format: ImageFormat, quality: int) -> DecodedImage:
        """Decode a packet's latent; raises NotFinite."""
        start = time.time()
        image = await self._to_pixels((packet.latent, packet.grid))
        if isinstance(image, NotFinite):
            raise image
        data = await asyncio.get_running_loop().run_in_executor(self._files, to_file, image, format, quality)
        return DecodedImage(
            index=packet.image_index,
            seed=packet.seed,
            data=data,
            text_tokens=packet.text_tokens,
            image_tokens=len(packet.latent),
            spans=(*packet.spans, Span("decode", start, time.time())),
        )

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def _to_pixels(self, latents: list[tuple[torch.Tensor, Grid]]) -> list[Image.Image | NotFinite]:
        """Images of latents and their grids; those of one grid are decoded together."""
        groups: dict[Grid, list[int]] = {}
        for index, (_, grid) in enumerate(latents):
            groups.setdefault(grid, []).append(index)
        images: dict[int, Image.Image | NotFinite] = {}
        for grid, indices in groups.items():
            stacked = torch.stack([latents[index][0] for index in indices])
            decode = self._decoder.decode
            decoded = await asyncio.get_running_loop().run_in_executor(self._device, decode, stacked, grid)
            images |= dict(zip(indices, decoded, strict=True))
        return [images[index] for index in range(len(latents))]
