"""What a deployment's replicas do: consecutive stages of an image, on one device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from backends import get_backend
from deployments import console
from deployments.decode import DecodedImage, VAEDecoder
from deployments.denoise import Transformer
from deployments.encode import TextEncoder
from deployments.route import Leg, Preview, Route
from deployments.settings import DECODE, ENCODE, Placement
from stages.encode import PromptTooLong
from stages.model import ModelConfig
from stages.packet import LatentPacket


class StageReplica:
    """Holds what its stages need of the model; encoding, denoising and decoding of different images overlap."""

    def __init__(self, model: ModelConfig, placement: Placement) -> None:
        console.attach()
        backend = get_backend(placement.backend)
        self._denoises = placement.denoises
        if ENCODE in placement.stages:
            self._encoder = TextEncoder(model, backend)
        if self._denoises:
            self._transformer = Transformer(model, backend, placement)
        if DECODE in placement.stages:
            self._decoder = VAEDecoder(model, backend)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if self._denoises:
            self._transformer.check_health()

    async def run(self, route: Route, leg: Leg, packet: bytes | None) -> bytes | DecodedImage | PromptTooLong:
        """Take an image along `leg`; a caller that cancels stops the work before its next step.

        Args:
            packet: as the leg before left it; None at the start, which encodes the prompt.

        Returns:
            The packet, or the image where the leg ends with it; or PromptTooLong, which is the client's error: Serve
            would log a traceback of one that is raised.

        Raises:
            PacketError: not a packet of this version.
            ValueError: see `stages.stage.Denoiser.begin`.
        """
        return await self._run(route, leg, packet, show=lambda preview: None)

    async def run_with_previews(
        self, route: Route, leg: Leg, packet: bytes | None
    ) -> AsyncGenerator[Preview | bytes | DecodedImage | PromptTooLong]:
        """As `run`, with the leg's previews before what it returns, each as soon as its step is done."""
        previews: asyncio.Queue[LatentPacket | None] = asyncio.Queue()
        result = asyncio.create_task(self._run(route, leg, packet, previews.put_nowait))
        result.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            while preview := await previews.get():
                yield Preview(preview.to_bytes())
            yield await result
        finally:
            result.cancel()

    async def _run(
        self, route: Route, leg: Leg, packet: bytes | None, show: Callable[[LatentPacket], None]
    ) -> bytes | DecodedImage | PromptTooLong:
        try:
            current = await self._encoder.encode(route.image) if packet is None else LatentPacket.from_bytes(packet)
        except PromptTooLong as refusal:
            return refusal
        if leg.stages:
            current = await self._transformer.denoise(current, route.plan, leg, route.deadline, show)
        if leg.decodes:
            return await self._decoder.decode(current, route.format, route.quality)
        return current.to_bytes()
