"""The autoencoder as a deployment: where an image leaves as a file."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from backends import get_backend
from stages.decode import Decoder, ImageFormat, to_file
from stages.model import ModelConfig
from stages.packet import LatentPacket, Span


@dataclass(frozen=True)
class DecodedImage:
    """An image file and how it came about.

    Attributes:
        index: which of the request's images.
        data: bytes of the file.
        spans: one for each stage.
    """

    index: int
    seed: int
    data: bytes
    spans: tuple[Span, ...]


class VAEDecoder:
    """One replica has one device with one thread that uses it, and another thread that writes files."""

    def __init__(self, model: ModelConfig, backend: str) -> None:
        self._decoder = Decoder(model, get_backend(backend))
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")

    async def decode(self, packet: bytes, format: ImageFormat, quality: int, preview: bool) -> DecodedImage:
        """Decode a packet's latent, or with `preview` the clean latent that its last step foresaw."""
        loop = asyncio.get_running_loop()
        arrived = LatentPacket.from_bytes(packet)
        latent = arrived.latent if not preview or arrived.preview is None else arrived.preview
        start = time.time()
        (image,) = await loop.run_in_executor(self._device, self._decoder.decode, latent[None], arrived.grid)
        data = await loop.run_in_executor(self._files, to_file, image, format, quality)
        spans = (*arrived.spans, Span("decode", start, time.time()))
        return DecodedImage(arrived.image_index, arrived.seed, data, spans)
