"""Measure the latency of the base, cached, distilled and hybrid plans on this machine, with random weights.

Latency does not depend on the values of the weights, so a model of any size can be measured without a download. The
exceptions are adaptive caches, which skip more or less depending on the values; only caches with a fixed schedule
(TaylorSeer) are measured. Adapters are assumed to be fused into the weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from backends import Backend, Quantization, get_backend
from bench.machine import machine_name
from bench.methods import read_methods
from bench.models import QWEN_IMAGE, add_backend_argument
from bench.results import add_output_argument, output_directory, write_json
from stages.config import ModelConfig
from stages.decode import to_images
from stages.encode import pure_noise
from stages.families import get_family
from stages.network import Network
from stages.packet import LatentPacket
from stages.plan import Plan, TaylorSeerSpec
from stages.stage import Denoiser


@dataclass(frozen=True)
class Latency:
    """Latency of one image by one plan.

    Attributes:
        plan: name of the plan.
        nfe: network evaluations; blocks that a cache skipped are not counted.
        denoise, decode: median seconds.
        speed_up: the first plan's `denoise` over this one's.
    """

    plan: str
    nfe: float
    denoise: float
    decode: float
    speed_up: float


class RandomModel:
    """Denoiser and autoencoder with random weights."""

    def __init__(
        self, config: ModelConfig, backend: Backend, quantize: Quantization | None = None, *, full: bool = False
    ) -> None:
        """Initialise the components of a config's pipeline.

        Args:
            config: the model's config; its source must be a local directory, unless `full`.
            backend: backend of the device.
            quantize: scheme by which the transformer's blocks are quantized, or None.
            full: whether to use diffusers' default architecture, which is Qwen-Image's, in place of the config's.
        """
        self.backend = backend
        self._config = config
        family = get_family(config.family)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, backend.default_dtype))
        try:
            with torch.device(backend.device):
                if full:
                    module, vae = family.transformer.kind(), family.autoencoder.kind()
                    scheduler = FlowMatchEulerDiscreteScheduler(
                        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
                        shift_terminal=0.02,
                    )  # fmt: skip
                else:
                    module, vae, scheduler = (
                        part.from_config(part.load_config(config.source, subfolder=folder))
                        for part, folder in (
                            (family.transformer.kind, "transformer"),
                            (family.autoencoder.kind, "vae"),
                            (FlowMatchEulerDiscreteScheduler, "scheduler"),
                        )
                    )
        finally:
            torch.set_default_dtype(before)
        transformer = family.transformer(backend.place(module))
        if quantize:
            backend.quantize(transformer.blocks, quantize)
        self.denoiser = Denoiser(config, Network(transformer, backend=backend), scheduler, backend)
        self._autoencoder = family.autoencoder(backend.place(vae))
        self._transformer = transformer

    def packet(self, size: str, length: int) -> LatentPacket:
        """Make a packet of pure noise, with random embeddings of `length` tokens for each of its two prompts."""
        width, dtype = self._transformer.text_width, self._transformer.dtype
        prompt, negative = torch.randn(2, length, width, dtype=dtype)
        channels, grid = self._transformer.token_channels // 4, self._config.grid(size)
        return pure_noise(
            self._config.name, "latency", 0, 0, grid, channels, prompt, negative, text_tokens=length, avoids=True
        )

    @torch.inference_mode()
    def decode(self, packet: LatentPacket) -> None:
        """Decode a packet's latent into an image, and wait until it is done."""
        to_images(self._autoencoder.decode(packet.latent[None].to(self.backend.device), packet.grid))
        self.backend.synchronise()


def plans(config: ModelConfig) -> Iterable[Plan]:
    """Yield the methods of the group `main`, without adapters; those with an adaptive cache are left out."""
    for name, plan in read_methods(config.plans)["main"].items():
        if all(stage.cache is None or isinstance(stage.cache, TaylorSeerSpec) for stage in plan.stages):
            stages = tuple(stage.model_copy(update={"adapter": None}) for stage in plan.stages)
            yield plan.model_copy(update={"name": name, "stages": stages})


def measure(model: RandomModel, plans: Iterable[Plan], size: str, length: int, repeats: int) -> list[Latency]:
    """Measure every plan on one image at a time, after a warm-up run of each.

    Args:
        model: the model to measure.
        plans: the plans; speed-ups are relative to the first.
        size: `WIDTHxHEIGHT` in pixels.
        length: tokens of either prompt.
        repeats: number of runs of which the median is taken.
    """
    rows: list[Latency] = []
    for plan in plans:
        denoising, decoding, nfe = [], [], 0.0
        for _ in range(repeats + 1):
            packet = model.packet(size, length)
            start = time.perf_counter()
            for _ in plan.stages:
                (packet,) = model.denoiser.denoise([packet], plan)
            denoised = time.perf_counter()
            model.decode(packet)
            denoising.append(denoised - start)
            decoding.append(time.perf_counter() - denoised)
            nfe = sum(span.nfe for span in packet.spans)
        denoise = statistics.median(denoising[1:])
        first = rows[0].denoise if rows else denoise
        rows.append(Latency(plan.name, nfe, denoise, statistics.median(decoding[1:]), first / denoise))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("--model", default="qwen-image", help="qwen-image, or the config of a local model")
    add_backend_argument(parser)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of either prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantize", choices=get_args(Quantization), help="quantize the transformer's blocks")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure the plans, print a row for each, and write `latency-MODEL.json`."""
    full = arguments.model == "qwen-image"
    config = ModelConfig.read(QWEN_IMAGE if full else Path(arguments.model))
    name = arguments.model if full else Path(arguments.model).stem
    model = RandomModel(config, get_backend(arguments.backend), arguments.quantize, full=full)
    if arguments.compile:
        model.denoiser.compile()
        tokens = math.prod(config.grid(arguments.size))
        model.denoiser.warm_up([arguments.size], 2 * tokens, print)  # a guided image counts twice
    rows = measure(model, plans(config), arguments.size, arguments.tokens, arguments.repeats)
    for row in rows:
        print(
            f"{row.plan:<18}{row.nfe:>6.1f} NFE  denoise {row.denoise:>8.3f} s  decode {row.decode:>7.3f} s  "
            f"{row.speed_up:>5.1f}x"
        )
    content = {
        "machine": machine_name(),
        "model": name,
        "weights": "random",
        "size": arguments.size,
        "prompt_tokens": arguments.tokens,
        "dtype": f"torch.{model.backend.default_dtype}",
        "quantize": arguments.quantize,
        "compile": arguments.compile,
        "rows": [asdict(row) for row in rows],
    }
    variant = "-".join([name, *filter(None, [arguments.quantize, arguments.compile and "compiled"])])
    write_json(output_directory(arguments) / f"latency-{variant}.json", content)
