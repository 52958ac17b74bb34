"""From prompts to embeddings, and to the packet that an image starts as."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache, partial
from threading import Lock

import torch
import torch.nn.functional as F

from backends import Backend
from stages.config import ModelConfig
from stages.errors import PromptTooLong
from stages.families import get_family
from stages.families.base import TextEncoder
from stages.finite import check_finite
from stages.latents import draw_noise
from stages.loading import load_text_encoder
from stages.packet import LatentPacket
from stages.spans import Span
from stages.yaml_file import ConfigError

REMEMBERED = 256  # prompts whose embeddings an encoder caches


def prompt_limit(config: ModelConfig, encoder: TextEncoder) -> int:
    """Return the most tokens of a prompt; raises ConfigError if the config allows more than the encoder keeps."""
    limit = config.max_prompt_tokens or encoder.longest
    if limit > encoder.longest:
        raise ConfigError(
            f"max_prompt_tokens must be at most {encoder.longest} for this model's tokenizer, not {limit}"
        )
    return limit


class Encoder:
    """The text encoder on a device, with a cache of the embeddings of the last `remembered` prompts."""

    def __init__(self, config: ModelConfig, backend: Backend, remembered: int = REMEMBERED) -> None:
        """Load the text encoder; raises ConfigError if it would truncate a prompt as long as the config allows."""
        self._config = config
        self._text = load_text_encoder(config, backend)
        self._limit = prompt_limit(config, self._text)
        self._channels = get_family(config.family).latent_channels(config.read_transformer())
        self._lock = Lock()
        self._embed = lru_cache(maxsize=remembered)(
            partial(_embed, self._text, backend)
        )  # a bound method would be a cycle

    def encode(self, prompt: str, parameter: str = "prompt") -> torch.Tensor:
        """Embed `prompt`: (length, width) on the CPU.

        Raises:
            PromptTooLong: the prompt is too long; the error names `parameter`.
            NotFinite: the embeddings are not finite.
        """
        return self._encode_and_count(prompt, parameter)[0]

    def _encode_and_count(self, prompt: str, parameter: str) -> tuple[torch.Tensor, int]:
        tokens = self.count(prompt, parameter)
        with self._lock:  # images of one request need the same prompt at the same time
            return self._embed(prompt), tokens

    def count(self, prompt: str, parameter: str = "prompt") -> int:
        """Count the tokens of `prompt` without its template; raises PromptTooLong, which names `parameter`."""
        tokens = self._text.count(prompt)
        if tokens > self._limit:
            raise PromptTooLong(parameter, tokens, self._limit)
        return tokens

    def begin(
        self,
        request_id: str,
        image_index: int,
        seed: int,
        size: str,
        prompt: str,
        negative_prompt: str | None,
        scale: float = 1.0,
    ) -> LatentPacket:
        """Make the packet of pure noise that an image starts as.

        Args:
            request_id: the image's request.
            image_index: which of the request's images it is.
            seed: seed of the noise.
            size: one of the config's sizes.
            prompt: prompt to embed.
            negative_prompt: see `Plan.negative_prompt`.
            scale: share of the size at which the plan's first stage works.

        Raises:
            PromptTooLong: one of the prompts is too long.
        """
        start = time.time()
        embeds, text_tokens = self._encode_and_count(prompt, "prompt")
        negative, avoids = None, bool(negative_prompt and negative_prompt.strip())
        if negative_prompt is not None:
            negative, negative_tokens = self._encode_and_count(negative_prompt, "negative_prompt")
            text_tokens += negative_tokens if avoids else 0
        grid = self._config.grid(size, scale)
        packet = pure_noise(
            self._config.name,
            request_id,
            image_index,
            seed,
            grid,
            self._channels,
            embeds,
            negative,
            text_tokens,
            avoids,
        )
        return replace(packet, spans=(Span("encode", start, time.time()),))


def _embed(encoder: TextEncoder, backend: Backend, prompt: str) -> torch.Tensor:
    tokens = encoder.tokenize(prompt)
    padding = backend.shapes.text.fit(len(tokens)) - len(tokens) if backend.shapes else 0
    padded = F.pad(torch.tensor([tokens]), (0, padding))  # after the prompt, where no token of it looks
    with backend.inference():
        embeds = encoder.embed(padded.to(backend.device)).cpu()
    return check_finite(embeds[0, encoder.head : len(tokens)], "encode")


def pure_noise(
    model: str,
    request_id: str,
    image_index: int,
    seed: int,
    grid: tuple[int, int],
    channels: int,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None,
    text_tokens: int,
    avoids: bool,
) -> LatentPacket:
    """Make the packet that an image starts as; its latent has `channels` channels and the embeddings' dtype."""
    return LatentPacket(
        model=model,
        request_id=request_id,
        image_index=image_index,
        seed=seed,
        grid=grid,
        sigma=1.0,
        position=0,
        step=0,
        text_tokens=text_tokens,
        avoids=avoids,
        spans=(),
        latent=draw_noise(seed, channels, grid).to(prompt_embeds.dtype),
        prompt_embeds=prompt_embeds,
        negative_embeds=negative_embeds,
    )
