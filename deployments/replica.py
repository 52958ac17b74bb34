"""What a deployment's replicas do: consecutive stages of an image, on one device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from backends import get_backend
from deployments import console
from deployments.messages import Call, PacketReply, RefusalReply, Wire
from deployments.settings import DECODE, ENCODE, Placement
from deployments.workers import DecodeWorker, DenoiseWorker, EncodeWorker
from stages.config import ModelConfig
from stages.errors import NotFinite, PromptTooLong
from stages.packet import LatentPacket


class StageReplica:
    """Holds what its stages need of the model; encoding, denoising and decoding of different images overlap."""

    def __init__(self, model: ModelConfig, placement: Placement) -> None:
        console.attach()
        backend = get_backend(placement.backend)
        self._encoder = EncodeWorker(model, backend) if ENCODE in placement.stages else None
        self._transformer = DenoiseWorker(model, backend, placement) if placement.denoises else None
        self._decoder = DecodeWorker(model, backend) if DECODE in placement.stages else None

    def check_health(self) -> None:
        """Raise what is wrong; Serve asks, and replaces a replica that raises."""
        if self._transformer:
            self._transformer.check_health()

    async def run(self, call: str, packet: bytes) -> Wire:
        """Take an image along a hop; a caller that cancels stops the work before its next step.

        Args:
            call: JSON of a `Call`.
            packet: as the hop before left it; empty at the start, which encodes the prompt.

        Returns:
            A reply's JSON, with the packet, or with the image's file where the hop ends with it.

        Raises:
            RuntimeError: names what was raised; an error's own class may be unknown where the caller is.
        """
        return await self._answer(Call.from_json(call), packet, show=lambda preview: None)

    async def run_with_previews(self, call: str, packet: bytes) -> AsyncGenerator[Wire]:
        """Do as `run`, with the hop's previews before what that returns, each as soon as its step is done."""
        previews: asyncio.Queue[LatentPacket | None] = asyncio.Queue()
        result = asyncio.create_task(self._answer(Call.from_json(call), packet, previews.put_nowait))
        result.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            while preview := await previews.get():
                yield PacketReply(kind="preview").model_dump_json(), preview.to_bytes()
            yield await result
        finally:
            result.cancel()

    async def _answer(self, call: Call, packet: bytes, show: Callable[[LatentPacket], None]) -> Wire:
        """Run a call; what is one image's own fault is a reply, since Serve would log a traceback of one raised."""
        try:
            return await self._run(call, packet, show)
        except PromptTooLong as error:
            refusal = RefusalReply(code="prompt_too_long", message=str(error), param=error.parameter)
        except NotFinite as error:
            refusal = RefusalReply(code="not_finite", message=str(error))
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return refusal.model_dump_json(), b""

    async def _run(self, call: Call, packet: bytes, show: Callable[[LatentPacket], None]) -> Wire:
        if packet:
            current = LatentPacket.from_bytes(packet)
        else:
            assert self._encoder, "no encoder here"
            current = await self._encoder.encode(call.route.image)
        if call.hop.stages:
            assert self._transformer, "no transformer here"
            current = await self._transformer.denoise(current, call, show)
        if call.hop.decodes:
            assert self._decoder, "no decoder here"
            reply, data = await self._decoder.decode(current, call.route.format, call.route.quality)
            return reply.model_dump_json(), data
        return PacketReply().model_dump_json(), current.to_bytes()
