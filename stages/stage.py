"""One stage of a plan on a device: packets in, packets out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import FirstBlockCacheConfig

from backends import Backend
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
        self._full_evaluations = 0
        # The last block's attention runs in a full evaluation, not in one that a cache cut short.
        self._transformer.transformer_blocks[-1].attn.register_forward_hook(self._count_full_evaluation)

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
        # A cache decides for a whole forward pass, so that rows which share one would depend on each other; and it
        # remembers, so that every image needs a fresh one.
        batches = [[packet] for packet in packets] if stage.cache else [packets]
        done = []
        self._activate(stage.adapter, stage.adapter_scale)
        for batch in batches:
            with self._cache(stage):
                done += self._run(batch, stage, preview, cancelled)
        return done if guided_after else [replace(packet, negative_embeds=None) for packet in done]

    def _run(
        self, packets: Sequence[LatentPacket], stage: StageSpec, preview: bool, cancelled: Callable[[], bool]
    ) -> list[LatentPacket]:
        start = time.time()
        self._full_evaluations = 0
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
            )
            for packet in packets
        ]
        for _ in range(stage.steps):
            if cancelled():
                raise Cancelled(f"{stage.name} was cancelled at sigma {rows[0].sigma:.3f}")
            step(self._transformer, rows, cached=stage.cache is not None)
        self._backend.synchronise()
        span = Span(stage.name, start, time.time(), nfe=self._evaluations(stage))
        return [
            replace(
                packet,
                latent=row.latent.to(packet.latent.dtype),
                preview=row.denoised.to(packet.latent.dtype) if preview else None,
                sigma=stage.sigma_end,
                position=packet.position + 1,
                spans=(*packet.spans, span),
            )
            for packet, row in zip(packets, rows, strict=True)
        ]

    def _evaluations(self, stage: StageSpec) -> float:
        """Network evaluations of each image; one that the cache cut short counts for its first block."""
        if stage.cache is None:
            return stage.nfe
        skipped = stage.nfe - self._full_evaluations
        return self._full_evaluations + skipped / len(self._transformer.transformer_blocks)

    def _count_full_evaluation(self, module: object, inputs: object, output: object) -> None:
        self._full_evaluations += 1

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

    @contextmanager
    def _cache(self, stage: StageSpec) -> Iterator[None]:
        if stage.cache is None:
            yield
            return
        self._transformer.enable_cache(FirstBlockCacheConfig(threshold=stage.cache.threshold))
        try:
            yield
        finally:
            self._transformer.disable_cache()


def _negative_embeds(packet: LatentPacket) -> torch.Tensor:
    if packet.negative_embeds is None:
        raise ValueError(f"image {packet.image_index} of {packet.request_id} has no negative prompt to be guided by")
    return packet.negative_embeds
