"""The transformer as a deployment, for one stage or for several."""

from __future__ import annotations

import asyncio
import logging
from threading import Thread

from backends import get_backend
from deployments.settings import Transformer
from stages.batching import StepBatcher
from stages.model import ModelConfig
from stages.packet import LatentPacket
from stages.plan import Plan
from stages.stage import Denoiser

logger = logging.getLogger("ray.serve")


class Denoise:
    """One replica has one device, and one thread that uses it, for all packets that are here at a time."""

    def __init__(self, model: ModelConfig, settings: Transformer) -> None:
        denoiser = Denoiser.load(model, get_backend(settings.backend), settings.fuse)
        if settings.compile:
            denoiser.compile(model.sizes)
        self._batcher = StepBatcher(denoiser, settings.max_batch_tokens)
        self._device = Thread(target=self._batcher.run, name="device", daemon=True)
        self._device.start()

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if not self._device.is_alive():
            raise RuntimeError("the thread that uses the device has died")

    async def denoise(self, packet: bytes, plan: Plan, preview: bool, deadline: float) -> bytes:
        """Take a packet through the stage of `plan` that it waits for; see `stages.stage.Denoiser.begin`.

        A caller that cancels stops the work before its next step.

        Args:
            deadline: seconds since the epoch; who has less time goes first.
        """
        arrived = LatentPacket.from_bytes(packet)
        try:
            done = await asyncio.wrap_future(self._batcher.submit(arrived, plan, preview=preview, deadline=deadline))
        except asyncio.CancelledError:
            logger.info("cancelled by the caller")
            raise
        span = done.spans[-1]
        logger.info(
            f"{span.stage}: image {done.image_index} of {done.request_id}, sigma {arrived.sigma:g} to {done.sigma:g}, "
            f"{span.nfe:g} evaluations, {1000 * (span.end - span.start):.0f} ms"
        )
        return done.to_bytes()
