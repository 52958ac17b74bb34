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

    async def denoise(self, packet: bytes, plan: Plan, stages: int, preview: bool, deadline: float) -> bytes:
        """Take a packet through the next stages of `plan`; see `stages.stage.Denoiser.begin`.

        A caller that cancels stops the work before its next step.

        Args:
            stages: how many.
            preview: after the last of them.
            deadline: seconds since the epoch; who has less time goes first.
        """
        current = LatentPacket.from_bytes(packet)
        for left in reversed(range(stages)):
            submitted = self._batcher.submit(current, plan, preview=preview and not left, deadline=deadline)
            try:
                done = await asyncio.wrap_future(submitted)
            except asyncio.CancelledError:
                logger.info("cancelled by the caller")
                raise
            span = done.spans[-1]
            logger.info(
                f"{span.stage}: image {done.image_index} of {done.request_id}, sigma {current.sigma:g} to "
                f"{done.sigma:g}, {span.nfe:g} evaluations, {1000 * (span.end - span.start):.0f} ms"
            )
            current = done
        return current.to_bytes()
