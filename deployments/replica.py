"""The replicas of a deployment, which run consecutive stages of an image on one device."""

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
    """Holds the components that its stages need; encoding, denoising and decoding of different images overlap."""

    def __init__(self, model: ModelConfig, placement: Placement) -> None:
        console.attach()
        backend = get_backend(placement.backend)
        self._encoder = EncodeWorker(model, backend) if ENCODE in placement.stages else None
        self._transformer = DenoiseWorker(model, backend, placement) if placement.denoises else None
        self._decoder = DecodeWorker(model, backend) if DECODE in placement.stages else None

    def check_health(self) -> None:
        """Raise if the replica cannot work; Serve calls this, and replaces a replica that raises."""
        if self._transformer:
            self._transformer.check_health()

    async def run(self, call: str, packet: bytes) -> Wire:
        """Run a hop of an image; a caller that cancels stops the work before its next step.

        Args:
            call: JSON of a `Call`.
            packet: the packet after the previous hop; empty for the first hop, which encodes the prompt.

        Returns:
            A reply's JSON, and the packet or, if the hop decodes, the image's file.

        Raises:
            RuntimeError: work failed; the message names the error, whose own class the caller may not know.
        """
        return await self._reply(Call.from_json(call), packet, show=lambda preview: None)

    async def run_with_previews(self, call: str, packet: bytes) -> AsyncGenerator[Wire]:
        """Yield the hop's previews, each as soon as its step is done, then what `run` would return."""
        previews: asyncio.Queue[LatentPacket | None] = asyncio.Queue()
        result = asyncio.create_task(self._reply(Call.from_json(call), packet, previews.put_nowait))
        result.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            while preview := await previews.get():
                yield PacketReply(kind="preview").model_dump_json(), preview.to_bytes()
            yield await result
        finally:
            result.cancel()

    async def _reply(self, call: Call, packet: bytes, show: Callable[[LatentPacket], None]) -> Wire:
        """Run a call; errors of a single image become replies, since Serve would log a traceback of an exception."""
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
            current = await self._encoder.encode(call.route.image, call.route.plan.stages[0].scale)
        if call.hop.stages:
            assert self._transformer, "no transformer here"
            current = await self._transformer.denoise(current, call, show)
        if call.hop.decodes:
            assert self._decoder, "no decoder here"
            reply, data = await self._decoder.decode(
                current, call.route.image.size, call.route.format, call.route.quality
            )
            return reply.model_dump_json(), data
        return PacketReply().model_dump_json(), current.to_bytes()
