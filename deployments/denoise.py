"""A stage as a deployment: base, bridge and distilled are this class under three names."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from backends import get_backend
from stages.model import ModelConfig
from stages.packet import LatentPacket
from stages.plan import Plan
from stages.stage import Denoiser

logger = logging.getLogger("ray.serve")


class Denoise:
    """One replica has one device, and one thread that uses it."""

    def __init__(self, model: ModelConfig, backend: str) -> None:
        self._denoiser = Denoiser(model, get_backend(backend))
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def denoise(self, packet: bytes, plan: Plan, preview: bool) -> bytes:
        """Take a packet through the stage of `plan` that it waits for; see `stages.stage.Denoiser.denoise`.

        A caller that cancels stops the work before its next step.
        """
        stop = Event()

        def work() -> bytes:
            arrived = LatentPacket.from_bytes(packet)
            (done,) = self._denoiser.denoise([arrived], plan, preview=preview, cancelled=stop.is_set)
            span = done.spans[-1]
            logger.info(
                f"{span.stage}: image {done.image_index} of {done.request_id}, sigma {arrived.sigma:g} to "
                f"{done.sigma:g}, {span.nfe:g} evaluations, {1000 * (span.end - span.start):.0f} ms"
            )
            return done.to_bytes()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._device, work)
        except asyncio.CancelledError:
            stop.set()
            logger.info("cancelled by the caller")
            raise
