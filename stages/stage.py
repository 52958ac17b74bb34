"""One stage of a plan on a device: packets in, packets out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from backends import Backend
from stages.caches import make_cache
from stages.config import ModelConfig
from stages.denoise import ImageState, join_negative, step
from stages.families import get_family
from stages.finite import check_finite
from stages.lift import lift
from stages.loading import load_scheduler
from stages.network import Network
from stages.packet import LatentPacket
from stages.plan import Plan, StageSpec
from stages.sigmas import stage_sigmas
from stages.spans import Span


@dataclass
class StageRun:
    """A packet partway through a stage.

    Attributes:
        packet: the packet as it arrived.
        plan: the plan whose stage number `packet.position` it is in.
        state: its progress.
        started: seconds since the epoch.
    """

    packet: LatentPacket
    plan: Plan
    state: ImageState
    started: float

    @property
    def stage(self) -> StageSpec:
        """The stage that the packet is in."""
        return self.plan.stages[self.packet.position]

    def finish(self) -> LatentPacket:
        """Return the packet after the last step, without prompts that no later stage needs; raises NotFinite."""
        later = self.plan.stages[self.packet.position + 1 :]
        needs_negative = any(stage.needs_negative(self.packet.avoids) for stage in later)
        latent, (rows, columns) = self.state.latent, self.packet.grid
        if later and later[0].scale > self.stage.scale:  # the next stage works at twice the rows and columns
            latent = lift(latent, self.state.denoised, self.stage.sigma_end, (rows, columns), self.packet.seed)
            rows, columns = 2 * rows, 2 * columns
        return replace(
            self.packet,
            grid=(rows, columns),
            latent=check_finite(latent.to(self._dtype), self.stage.name),
            prompt_embeds=self.packet.prompt_embeds if later else self.packet.prompt_embeds[:0],
            negative_embeds=self.packet.negative_embeds if needs_negative else None,
            sigma=self.stage.sigma_end,
            position=self.packet.position + 1,
            step=0,
            spans=self._spans(),
        )

    def checkpoint(self) -> LatentPacket:
        """Return the packet between the last step and the next, from which another replica goes on to the same image.

        Raises:
            ValueError: the stage has a cache, whose state a packet does not hold.
        """
        if self.stage.cache:
            raise ValueError(f"{self.stage.name} has a cache, and no checkpoints")
        return replace(
            self.packet,
            latent=self.state.latent.cpu(),  # here, on the thread that has just waited for the device
            sigma=self.state.sigma,
            step=self.state.index,
            spans=self._spans(),
        )

    def preview(self) -> LatentPacket:
        """Return the clean latent that the last step predicted, as a packet after the plan, without its prompts."""
        return replace(
            self.packet,
            latent=self.state.denoised.to(self._dtype),
            prompt_embeds=self.packet.prompt_embeds[:0],
            negative_embeds=None,
            sigma=0.0,
            position=len(self.plan.stages),
            step=0,
            spans=self._spans(),
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.packet.prompt_embeds.dtype

    def _spans(self) -> tuple[Span, ...]:
        return (*self.packet.spans, Span(self.stage.name, self.started, time.time(), self.state.nfe))


class Denoiser:
    """The transformer and its adapters on a device; for one thread at a time."""

    def __init__(
        self, config: ModelConfig, network: Network, scheduler: FlowMatchEulerDiscreteScheduler, backend: Backend
    ) -> None:
        """Hold what denoising needs.

        Args:
            config: the model's config.
            network: the model's transformer, on the device.
            scheduler: the base model's scheduler, for its shift.
            backend: the device's backend.
        """
        self._config = config
        self._network = network
        self._scheduler = scheduler
        self._backend = backend

    @classmethod
    def load(cls, config: ModelConfig, backend: Backend, fused: str | None = None) -> Self:
        """Load the config's transformer, quantized as the config says.

        Args:
            config: the model's config.
            backend: backend of the device to load onto.
            fused: adapter to fuse into the weights, for a device that runs a single stage.
        """
        network = Network.load(config, backend, fused)
        if config.quantize.transformer:
            backend.quantize(network.transformer.blocks, config.quantize.transformer)
        return cls(config, network, load_scheduler(config), backend)

    def compile(self) -> None:
        """Let the transformer's blocks be compiled; `warm_up` does so before requests wait for it."""
        self._network.compile()

    def warm_up(self, sizes: Sequence[str], max_batch_tokens: int, report: Callable[[str], object]) -> None:
        """Run everything once that is compiled on its first run; nothing where nothing is compiled.

        Args:
            sizes: sizes of images to come.
            max_batch_tokens: most image tokens in a forward pass.
            report: called with a line on the progress.
        """
        family = get_family(self._config.family)
        limit = self._config.max_prompt_tokens or family.longest_prompt
        plans = self._config.plans_by_size()
        joined = any(stage.reads_negative for plan, _ in plans for stage in plan.stages)
        text = (limit + family.template_tokens) * (2 if joined else 1)
        grids = {self._config.grid(size) for size in sizes}
        for plan, at in plans:
            grids |= {self._config.grid(size, stage.scale) for size in at if size in sizes for stage in plan.stages}
        forms = [
            (grid, form)
            for grid in sorted(grids)
            for form in self._network.forms(max(2, max_batch_tokens // (grid[0] * grid[1])), text)
        ]
        start = time.monotonic()
        for done, (grid, form) in enumerate(forms):
            with self._backend.inference():
                self._network.warm_up(form, grid, guides_attention=family.guides_attention)
            self._backend.synchronise()
            elapsed = time.monotonic() - start
            left = elapsed / (done + 1) * (len(forms) - done - 1)
            report(
                f"warmed up {done + 1} of {len(forms)}: {form[0]} rows of {grid[0]}x{grid[1]} tokens, {form[1]} text "
                f"tokens; {elapsed:.0f} s, about {left:.0f} s left"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._network.adapters)

    @property
    def blocks(self) -> int:
        """Number of the transformer's blocks."""
        return self._network.blocks

    def begin(self, packet: LatentPacket, plan: Plan) -> StageRun:
        """Let a packet enter its next stage, number `packet.position` of `plan`, after `packet.step` of its steps.

        Raises:
            ValueError: the packet belongs to another model, is not at the noise level that the stage has at this step,
                is amid a stage that has a cache, or lacks the negative prompt that the stage needs; or the model lacks
                an adapter, a block to skip or attention guidance.
        """
        if packet.model != self._config.name:
            raise ValueError(f"packet of model {packet.model!r} cannot enter {self._config.name!r}")
        stage = plan.stages[packet.position]
        if not 0 <= packet.step < (1 if stage.cache else stage.steps):
            raise ValueError(f"packet at step {packet.step} cannot enter {stage.name}")
        sigmas = stage_sigmas(stage, self._scheduler, tokens=len(packet.latent))
        sigma = float(sigmas[packet.step]) if packet.step else stage.sigma_start
        if packet.sigma != sigma:
            raise ValueError(f"packet at sigma {packet.sigma} cannot enter {stage.name} at {sigma}")
        if stage.adapter not in (None, *self._network.adapters):
            raise ValueError(f"adapter must be one of {self._network.adapters}, not {stage.adapter!r}")
        plan.check_transformer(self.blocks, guides_attention=get_family(self._config.family).guides_attention)
        device = self._network.device
        prompt, negative = packet.prompt_embeds.to(device), None
        if stage.needs_negative(packet.avoids):
            if packet.negative_embeds is None:
                raise ValueError(
                    f"image {packet.image_index} of {packet.request_id} has no negative prompt for {stage.name}"
                )
            negative = packet.negative_embeds.to(device)
            if stage.reads_negative:  # and thus is not guided
                prompt, negative = join_negative(prompt, negative), None
        state = ImageState(
            latent=packet.latent.to(device, torch.float32),
            sigmas=sigmas,
            grid=packet.grid,
            prompt_embeds=prompt,
            negative_embeds=negative,
            guidance_scale=stage.guidance_scale,
            attention_guidance=stage.attention_guidance,
            adapter=stage.adapter,
            adapter_scale=stage.adapter_scale,
            skip_blocks=stage.skip_blocks,
            cache=make_cache(stage.cache, stage.steps) if stage.cache else None,
            negative_cache=make_cache(stage.cache, stage.steps) if stage.cache and stage.guided else None,
            index=packet.step,
        )
        return StageRun(packet, plan, state, time.time())

    def step(self, runs: Sequence[StageRun]) -> None:
        """Advance runs of one grid, of any plans and stages, by one denoising step in one forward pass."""
        with self._backend.inference():
            step(self._network, [run.state for run in runs])
        self._backend.synchronise()

    def denoise(self, packets: Sequence[LatentPacket], plan: Plan) -> list[LatentPacket]:
        """Take packets of one grid through their next stage of `plan`; see `begin`.

        Raises:
            NotFinite: a packet's latent is no longer finite.
            ValueError: the packets' grids differ.
        """
        for packet in packets:
            if packet.grid != packets[0].grid:
                raise ValueError(f"packets of grids {packets[0].grid} and {packet.grid} cannot share a batch")
        runs = [self.begin(packet, plan) for packet in packets]
        while under_way := [run for run in runs if not run.state.done]:
            self.step(under_way)
        return [run.finish() for run in runs]
