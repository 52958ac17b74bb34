"""The components of a model in a replica, each with the thread that uses its device."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Literal

import torch
from PIL import Image
from ray import serve

from backends import Backend
from deployments.messages import Call, ImageReply, ImageRequest, StepReply
from deployments.settings import Placement
from stages.batching import StepBatcher, StepReport
from stages.config import ModelConfig
from stages.decode import Decoder, to_file
from stages.encode import Encoder
from stages.errors import NotFinite
from stages.image import ImageFormat, parse_size
from stages.packet import LatentPacket
from stages.pulse import Pulse
from stages.spans import Span
from stages.stage import Denoiser

logger = logging.getLogger("ray.serve")

# Takes a reply to a step, and the packet beside it, if there is one.
HandOut = Callable[[StepReply, LatentPacket | None], object]
Grid = tuple[int, int]


class EncodeWorker:
    """The text encoder, which makes an image's first packet."""

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        self._encoder = Encoder(model, backend)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="encode", initializer=backend.give_way)
        self.pulse = Pulse()

    async def encode(self, image: ImageRequest, scale: float) -> LatentPacket:
        """Make the packet of pure noise that `image` starts as; raises `stages.errors.PromptTooLong`.

        Args:
            image: the image.
            scale: share of its size at which the plan's first stage works.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._device,
            self.pulse.during(self._encoder.begin),
            image.request_id,
            image.image_index,
            image.seed,
            image.size,
            image.prompt,
            image.negative_prompt,
            scale,
        )


class DenoiseWorker:
    """The transformer, for one stage or several; one thread batches all packets that are here.

    Attributes:
        adapters: names of the adapters that are loaded.
    """

    def __init__(
        self, model: ModelConfig, backend: Backend, placement: Placement, report: Callable[[StepReport], object]
    ) -> None:
        """Load the transformer.

        Args:
            model: the model's config.
            backend: backend of the device.
            placement: the stages to run, and how.
            report: called on the device's thread after each step.
        """
        denoiser = Denoiser.load(model, backend, placement.fuse)
        if placement.compile:
            denoiser.compile()
        denoiser.warm_up(model.sizes, placement.max_batch_tokens, logger.info)
        self.adapters = denoiser.adapters
        self._sizes = {model.grid(size): size for size in model.sizes}
        self._batcher = StepBatcher(denoiser, placement.max_batch_tokens, report)

        def use_device() -> None:
            backend.give_way()
            self._batcher.run()

        self._device = Thread(target=use_device, name="denoise", daemon=True)
        self._device.start()

    @property
    def pulse(self) -> Pulse:
        """How long the step at hand has taken."""
        return self._batcher.pulse

    def census(self) -> dict[tuple[str, str], int]:
        """Count the images that are here, by stage and size; by `other` for one that is none of the model's."""
        counts: Counter[tuple[str, str]] = Counter()
        for (stage, grid), count in self._batcher.census().items():
            counts[stage, self._sizes.get(grid, "other")] += count
        return counts

    def check_health(self) -> None:
        """Raise RuntimeError if the thread that uses the device has died."""
        if not self._device.is_alive():
            raise RuntimeError("the thread that uses the device has died")

    async def denoise(self, packet: LatentPacket, call: Call, hand_out: HandOut) -> LatentPacket:
        """Take a packet through what is left of the stages of `call.hop`; see `stages.stage.Denoiser.begin`.

        A caller that cancels stops the work before its next step.

        Args:
            packet: the packet to denoise.
            call: the plan, the hop and the deadline; earlier deadlines go first.
            hand_out: called in the event loop's thread with the hop's replies to steps.
        """
        loop = asyncio.get_running_loop()

        def from_device(kind: Literal["preview", "checkpoint"]) -> Callable[[int, LatentPacket], object]:
            return lambda step, made: loop.call_soon_threadsafe(hand_out, StepReply(kind=kind, step=step), made)

        def tell(step: int) -> None:
            loop.call_soon_threadsafe(hand_out, StepReply(kind="step", step=step), None)

        submitted = self._batcher.submit(
            packet,
            call.route.plan,
            stages=call.hop.end - packet.position,
            previews=call.hop.previews,
            checkpoints=call.hop.checkpoints,
            show=from_device("preview"),
            keep=from_device("checkpoint"),
            tell=tell if call.hop.tells else None,
            deadline=call.route.deadline,
        )
        try:
            done = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            logger.info("cancelled by the caller")
            raise
        work = ", ".join(
            f"{span.stage} {span.nfe:g} evaluations {1000 * (span.end - span.start):.0f} ms"
            for span in done.spans[len(packet.spans) :]
        )
        logger.info(f"image {done.image_index} of {done.request_id}, sigma {packet.sigma:g} to {done.sigma:g}: {work}")
        return done


class DecodeWorker:
    """The autoencoder's decoder, which turns packets into files; a second thread encodes the files.

    Latents that arrive while a batch is on the device make up the next one.
    """

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        self._decoder = Decoder(model, backend)
        self._device = ThreadPoolExecutor(1, thread_name_prefix="decode", initializer=backend.give_way)
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self.pulse = Pulse()

    async def decode(
        self, packet: LatentPacket, size: str, format: ImageFormat, quality: int
    ) -> tuple[ImageReply, bytes]:
        """Decode a packet's latent into a file; raises NotFinite.

        Args:
            packet: the packet to decode.
            size: the image's size, to which a preview of a stage at half of it is enlarged.
            format: format of the file.
            quality: 0 to 100, for lossy formats.
        """
        start = time.time()
        image = await self._to_pixels((packet.latent, packet.grid))
        if isinstance(image, NotFinite):
            raise image
        if image.size != parse_size(size):
            image = image.resize(parse_size(size), Image.Resampling.BICUBIC)
        data = await asyncio.get_running_loop().run_in_executor(self._files, to_file, image, format, quality)
        reply = ImageReply(
            index=packet.image_index,
            seed=packet.seed,
            text_tokens=packet.text_tokens,
            image_tokens=len(packet.latent),
            spans=(*packet.spans, Span("decode", start, time.time())),
        )
        return reply, data

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def _to_pixels(self, latents: list[tuple[torch.Tensor, Grid]]) -> list[Image.Image | NotFinite]:
        """Decode latents, each with its grid, in one batch per grid."""
        groups: dict[Grid, list[int]] = {}
        for index, (_, grid) in enumerate(latents):
            groups.setdefault(grid, []).append(index)
        images: dict[int, Image.Image | NotFinite] = {}
        for grid, indices in groups.items():
            stacked = torch.stack([latents[index][0] for index in indices])
            decode = self.pulse.during(self._decoder.decode)
            decoded = await asyncio.get_running_loop().run_in_executor(self._device, decode, stacked, grid)
            images |= dict(zip(indices, decoded, strict=True))
        return [images[index] for index in range(len(latents))]
