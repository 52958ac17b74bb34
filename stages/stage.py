"""One stage of a plan on a device: packets in, packets out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from backends import Backend
from stages.caches import make_cache
from stages.denoise import Row, step
from stages.model import ModelConfig, load_scheduler, load_transformer
from stages.packet import LatentPacket, Span
from stages.plan import Plan, StageSpec
from stages.sigmas import stage_sigmas


class Cancelled(Exception):
    """The work was called off between two steps."""


class Denoiser:
    """The transformer and its adapters on a device; for one thread at a time."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._transformer = load_transformer(config, backend)
        self._scheduler = load_scheduler(config)
        self._backend = backend
        self._active: tuple[str | None, float] = (None, 1.0)

    def denoise(
        self,
        packets: Sequence[LatentPacket],
        plan: Plan,
        *,
        preview: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[LatentPacket]:
        """Take packets that wait for the same stage of `plan` through it.

        Args:
            packets: of one grid; their order is kept.
            plan: whose stage number `packet.position` is run.
            preview: also keep the clean latents that the last step foresaw.
            cancelled: asked before every step.

        Raises:
            Cancelled: `cancelled` said so.
            ValueError: a packet arrives at another noise level than the stage starts from or without the negative
                prompt that a guided stage needs, or grids differ.
        """
        stage = plan.stages[packets[0].position]
        for packet in packets:
            if packet.sigma != stage.sigma_start:
                raise ValueError(f"packet at sigma {packet.sigma} cannot enter {stage.name} at {stage.sigma_start}")
            if packet.grid != packets[0].grid:
                raise ValueError(f"packets of grids {packets[0].grid} and {packet.grid} cannot share a batch")
        guided_after = any(later.guided for later in plan.stages[packets[0].position + 1 :])
        self._activate(stage.adapter, stage.adapter_scale)
        done = self._run(packets, stage, preview, cancelled)
        return done if guided_after else [replace(packet, negative_embeds=None) for packet in done]

    def _run(
        self, packets: Sequence[LatentPacket], stage: StageSpec, preview: bool, cancelled: Callable[[], bool]
    ) -> list[LatentPacket]:
        start = time.time()
        device = self._backend.device
        sigmas = stage_sigmas(stage, self._scheduler, tokens=len(packets[0].latent))
        rows = [
            Row(
                latent=packet.latent.to(device, torch.float32),
                sigmas=sigmas,
                grid=packet.grid,
                prompt_embeds=packet.prompt_embeds.to(device),
                negative_embeds=_negative_embeds(packet).to(device) if stage.guided else None,
                guidance_scale=stage.guidance_scale,
                cache=make_cache(stage.cache) if stage.cache else None,
                negative_cache=make_cache(stage.cache) if stage.cache and stage.guided else None,
            )
            for packet in packets
        ]
        for _ in range(stage.steps):
            if cancelled():
                raise Cancelled(f"{stage.name} was cancelled at sigma {rows[0].sigma:.3f}")
            step(self._transformer, rows)
        self._backend.synchronise()
        end = time.time()
        return [
            replace(
                packet,
                latent=row.latent.to(packet.latent.dtype),
                preview=row.denoised.to(packet.latent.dtype) if preview else None,
                sigma=stage.sigma_end,
                position=packet.position + 1,
                spans=(*packet.spans, Span(stage.name, start, end, row.nfe)),
            )
            for packet, row in zip(packets, rows, strict=True)
        ]

    def _activate(self, adapter: str | None, scale: float) -> None:
        """Switch to `adapter`, or to none. It takes longer than a small model's step, so only when it must be."""
        if (adapter, scale) == self._active:
            return
        if adapter is None:
            self._transformer.disable_lora()
        else:
            self._transformer.set_adapters(adapter, scale)
            self._transformer.enable_lora()
        self._active = (adapter, scale)


def _negative_embeds(packet: LatentPacket) -> torch.Tensor:
    if packet.negative_embeds is None:
        raise ValueError(f"image {packet.image_index} of {packet.request_id} has no negative prompt to be guided by")
    return packet.negative_embeds
