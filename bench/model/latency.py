"""Latency of a model without its weights: what base, cached, distilled and hybrid take on this machine.

Latency does not depend on the values of the weights, so that a model of any size can be measured without a download.
Caches run at a fixed schedule (TaylorSeer), because what an adaptive one skips does depend on them. Adapters count as
fused into the weights.
"""

from __future__ import annotations

import argparse
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
from bench.models import QWEN_IMAGE
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
    """Of one image: medians in seconds.

    Attributes:
        nfe: network evaluations; what a cache skipped is not counted.
        speed_up: of denoising over the first plan's.
    """

    plan: str
    nfe: float
    denoise: float
    decode: float
    speed_up: float


class RandomModel:
    """A denoiser and an autoencoder of an architecture, with random weights."""

    def __init__(
        self, config: ModelConfig, backend: Backend, quantize: Quantization | None = None, *, full: bool = False
    ) -> None:
        """Make the parts of a config's pipeline.

        Args:
            config: of a model whose files are here, unless `full`.
            backend: to place them on.
            quantize: the transformer's blocks by this, if at all.
            full: whether to take the architecture from diffusers' defaults, which are those of Qwen-Image.
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
        self.denoiser = Denoiser(config, Network(transformer), scheduler, backend)
        self._autoencoder = family.autoencoder(backend.place(vae))
        self._transformer = transformer

    def packet(self, size: str, length: int) -> LatentPacket:
        """Noise, and embeddings of `length` tokens for both prompts."""
        width, dtype = self._transformer.text_width, self._transformer.dtype
        prompt, negative = torch.randn(2, length, width, dtype=dtype)
        channels = self._transformer.token_channels // 4
        return pure_noise(
            self._config, "latency", 0, 0, size, channels, prompt, negative, text_tokens=length, avoids=True
        )

    @torch.inference_mode()
    def decode(self, packet: LatentPacket) -> None:
        """Decode an image, to the last pixel."""
        to_images(self._autoencoder.decode(packet.latent[None].to(self.backend.device), packet.grid))
        self.backend.synchronise()


def plans(config: ModelConfig) -> Iterable[Plan]:
    """The methods of `main` by their names, but those with a cache at no fixed schedule; without adapters."""
    for name, plan in read_methods(config.plans)["main"].items():
        if all(stage.cache is None or isinstance(stage.cache, TaylorSeerSpec) for stage in plan.stages):
            stages = tuple(stage.model_copy(update={"adapter": None}) for stage in plan.stages)
            yield plan.model_copy(update={"name": name, "stages": stages})


def measure(model: RandomModel, plans: Iterable[Plan], size: str, length: int, repeats: int) -> list[Latency]:
    """Every plan on images of `size` and prompts of `length` tokens, after one run each to warm up.

    Speed-ups are over the first plan.
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
    parser.add_argument("--model", default="qwen-image", help="qwen-image, or the config of a local model")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--tokens", type=int, default=64, help="of either prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantize", choices=get_args(Quantization), help="the transformer's blocks")
    parser.add_argument("--compile", action="store_true", help="the transformer's blocks")
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    full = arguments.model == "qwen-image"
    config = ModelConfig.read(QWEN_IMAGE if full else Path(arguments.model))
    name = arguments.model if full else Path(arguments.model).stem
    model = RandomModel(config, get_backend(arguments.backend), arguments.quantize, full=full)
    if arguments.compile:
        model.denoiser.compile([arguments.size])
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
