"""End-to-end text-to-image in one process, for notebooks, tests and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from backends import Backend
from stages.config import ModelConfig
from stages.decode import Decoder
from stages.encode import REMEMBERED, Encoder
from stages.errors import NotFinite
from stages.families import get_family
from stages.image import MAX_SEED
from stages.packet import LatentPacket
from stages.plan import Plan
from stages.spans import Span
from stages.stage import Denoiser


@dataclass(frozen=True)
class Prompted:
    """An image to generate.

    Attributes:
        prompt: what to show.
        seed: 0 to `MAX_SEED`.
        negative_prompt: what to avoid; some plans ignore it.
    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a seed out of range, from which no noise can be drawn, or the noise of another."""
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}, not {self.seed!r}")


@dataclass(frozen=True)
class Result:
    """An image, the seed that reproduces it, and the work that it took."""

    image: Image.Image
    seed: int
    spans: tuple[Span, ...]

    @property
    def nfe(self) -> float:
        """Network evaluations; blocks that a cache skipped are not counted."""
        return sum(span.nfe for span in self.spans)


class Pipeline:
    """Encoder, denoiser and decoder on one device."""

    def __init__(self, config: ModelConfig, backend: Backend, remembered: int = REMEMBERED) -> None:
        """Load the model.

        Args:
            config: the model's config.
            backend: backend of the device.
            remembered: number of prompts whose embeddings the encoder caches.
        """
        self.config = config
        self.encoder = Encoder(config, backend, remembered)
        self.denoiser = Denoiser.load(config, backend)
        self.decoder = Decoder(config, backend)

    def run(
        self,
        plan: Plan | str,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seeds: Sequence[int] = (0,),
        size: str | None = None,
    ) -> list[Result]:
        """Generate an image of `prompt` for each seed; see `run_batch`."""
        return self.run_batch(plan, [Prompted(prompt, seed, negative_prompt) for seed in seeds], size)

    def run_in_batches(self, plan: Plan | str, images: Sequence[Prompted], batch: int) -> Iterator[Result]:
        """Generate images as `run_batch` does, at most `batch` at a time."""
        for start in range(0, len(images), batch):
            yield from self.run_batch(plan, images[start : start + batch])

    def run_batch(self, plan: Plan | str, images: Sequence[Prompted], size: str | None = None) -> list[Result]:
        """Generate images of any prompts in one batch.

        Args:
            plan: a plan, or the name of one of the config's plans.
            images: the images to generate.
            size: one of the config's sizes, by default the first.

        Raises:
            ValueError: no plan has that name, the plan needs an adapter that the model lacks, the size is not one
                of the model's, or there is no image.
        """
        plan = (self.config.plan(plan, size) if isinstance(plan, str) else plan).with_adapters(self.config.adapters)
        packets = self.enter(plan, images, size)
        for _ in plan.stages:
            packets = self.denoise(packets, plan)
        start = time.time()
        decoded = self.decoder.decode(torch.stack([packet.latent for packet in packets]), packets[0].grid)
        span = Span("decode", start, time.time())
        results = []
        for image, packet in zip(decoded, packets, strict=True):
            if isinstance(image, NotFinite):
                raise image
            results.append(Result(image, packet.seed, (*packet.spans, span)))
        return results

    def denoise(self, packets: Sequence[LatentPacket], plan: Plan) -> list[LatentPacket]:
        """Take packets of one grid through their next stage of `plan`."""
        return self.denoiser.denoise(packets, plan)

    def enter(self, plan: Plan, images: Sequence[Prompted], size: str | None = None) -> list[LatentPacket]:
        """Make the packets that images start as; see `run_batch`."""
        if not images:
            raise ValueError("there must be an image to generate")
        size = size or self.config.sizes[0]
        empty = get_family(self.config.family).empty_prompt
        if size not in self.config.sizes:
            raise ValueError(f"size must be one of {list(self.config.sizes)}, not {size!r}")
        plan.check_grid(self.config.grid(size))
        return [
            self.encoder.begin(
                "local",
                index,
                image.seed,
                size,
                image.prompt,
                plan.negative_prompt(image.negative_prompt, empty),
                plan.stages[0].scale,
            )
            for index, image in enumerate(images)
        ]
