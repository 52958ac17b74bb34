"""The text encoder as a deployment: where an image's packet begins."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from backends import get_backend
from stages.encode import Encoder
from stages.model import ModelConfig


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
    """One replica has one device, and one thread that uses it."""

    def __init__(self, model: ModelConfig, backend: str) -> None:
        self._encoder = Encoder(model, get_backend(backend))
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def encode(self, image: ImageRequest) -> bytes:
        """The packet of pure noise that `image` starts as; raises `stages.encode.PromptTooLong`."""

        def work() -> bytes:
            return self._encoder.begin(
                image.request_id, image.image_index, image.seed, image.size, image.prompt, image.negative_prompt
            ).to_bytes()

        return await asyncio.get_running_loop().run_in_executor(self._device, work)
