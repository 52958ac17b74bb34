"""The transformer in a replica, for one stage or for several."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from threading import Thread

from backends import Backend
from deployments.route import Leg
from deployments.settings import Placement
from stages.batching import StepBatcher
from stages.model import ModelConfig
from stages.packet import LatentPacket
from stages.plan import Plan
from stages.stage import Denoiser

logger = logging.getLogger("ray.serve")


class Transformer:
    """One thread uses the device, for all packets that are here at a time."""

    def __init__(self, model: ModelConfig, backend: Backend, placement: Placement) -> None:
        denoiser = Denoiser.load(model, backend, placement.fuse)
        if placement.compile:
            denoiser.compile(model.sizes)
        self._batcher = StepBatcher(denoiser, placement.max_batch_tokens)
        self._device = Thread(target=self._batcher.run, name="denoise", daemon=True)
        self._device.start()

    def check_health(self) -> None:
        """Raises RuntimeError if the device's thread has died."""
        if not self._device.is_alive():
            raise RuntimeError("the thread that uses the device has died")

    async def denoise(
        self, packet: LatentPacket, plan: Plan, leg: Leg, deadline: float, show: Callable[[LatentPacket], None]
    ) -> LatentPacket:
        """Take a packet through the stages of `leg`; see `stages.stage.Denoiser.begin`.

        A caller that cancels stops the work before its next step.

        Args:
            deadline: seconds since the epoch; who has less time goes first.
            show: takes the packets of the leg's previews, in the event loop's thread.
        """
        loop = asyncio.get_running_loop()
        submitted = self._batcher.submit(
            packet,
            plan,
            stages=leg.stages,
            previews=leg.previews,
            show=lambda preview: loop.call_soon_threadsafe(show, preview),
            deadline=deadline,
        )
        try:
            done = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            logger.info("cancelled by the caller")
            raise
        work = ", ".join(
            f"{span.stage} {span.nfe:g} evaluations {1000 * (span.end - span.start):.0f} ms"
            for span in done.spans[-leg.stages :]
        )
        logger.info(f"image {done.image_index} of {done.request_id}, sigma {packet.sigma:g} to {done.sigma:g}: {work}")
        return done
