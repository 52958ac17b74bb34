"""The text encoder in a replica: where an image's packet begins."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from backends import Backend
from stages.encode import Encoder
from stages.model import ModelConfig
from stages.packet import LatentPacket


@dataclass(frozen=True)
class ImageRequest:
    """One image of a request; `negative_prompt` is None where no stage needs one."""

    request_id: str
    image_index: int
    seed: int
    size: str
    prompt: str
    negative_prompt: str | None


class TextEncoder:
    """One thread uses the device."""

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        self._encoder = Encoder(model, backend)
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

    async def encode(self, image: ImageRequest) -> LatentPacket:
        """The packet of pure noise that `image` starts as; raises `stages.encode.PromptTooLong`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._device,
            self._encoder.begin,
            image.request_id,
            image.image_index,
            image.seed,
            image.size,
            image.prompt,
            image.negative_prompt,
        )
