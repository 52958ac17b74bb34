"""Prompts to embeddings, and the packet that an image starts as."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from threading import Lock

import torch

from backends import Backend
from stages.finite import check_finite
from stages.model import ModelConfig, load_text_encoder, token_grid
from stages.noise import draw_noise
from stages.packet import LatentPacket, Span
from stages.plan import Plan

# What diffusers' users pass for "no negative prompt in particular".
EMPTY_PROMPT = " "

REMEMBERED = 256  # prompts, by an encoder


def negative_for(plan: Plan, negative_prompt: str | None) -> str | None:
    """What to encode of a request's negative prompt, which it may lack: None if no stage of `plan` needs it."""
    return (negative_prompt or EMPTY_PROMPT) if plan.needs_negative(avoids=bool(negative_prompt)) else None


class PromptTooLong(ValueError):
    """A prompt of more tokens than the model's config allows; `parameter` says which prompt."""

    def __init__(self, parameter: str, tokens: int, limit: int) -> None:
        super().__init__(f"{parameter} has {tokens} tokens, at most {limit} are allowed")
        self.parameter, self.tokens, self.limit = parameter, tokens, limit

    def __reduce__(self) -> tuple[type[PromptTooLong], tuple[str, int, int]]:
        return type(self), (self.parameter, self.tokens, self.limit)


def pure_noise(
    request_id: str,
    image_index: int,
    seed: int,
    size: str,
    channels: int,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None,
    text_tokens: int,
    avoids: bool,
) -> LatentPacket:
    """The packet that an image of `size` starts as, its latent of `channels` channels in the embeddings' dtype."""
    rows, columns = token_grid(size)
    return LatentPacket(
        request_id=request_id,
        image_index=image_index,
        seed=seed,
        grid=(rows, columns),
        sigma=1.0,
        position=0,
        text_tokens=text_tokens,
        avoids=avoids,
        spans=(),
        latent=draw_noise(seed, channels, 2 * rows, 2 * columns).to(prompt_embeds.dtype),
        prompt_embeds=prompt_embeds,
        negative_embeds=negative_embeds,
    )


class Encoder:
    """The text encoder on a device, with the embeddings of the last `remembered` prompts."""

    def __init__(self, config: ModelConfig, backend: Backend, remembered: int = REMEMBERED) -> None:
        """Raises ValueError if a prompt as long as the config allows would be cut, or the template around it."""
        self._pipeline = load_text_encoder(config, backend)
        self._backend = backend
        self._limit = config.max_prompt_tokens
        self._template = self._tokens("")
        fits = self._pipeline.tokenizer_max_length + self._pipeline.prompt_template_encode_start_idx - self._template
        if self._limit > fits:
            raise ValueError(f"max_prompt_tokens must be at most {fits} for this model's tokenizer, not {self._limit}")
        self._latent_channels = config.read_transformer()["in_channels"] // 4
        self._lock = Lock()
        self._remembered = lru_cache(maxsize=remembered)(self._encode)

    def encode(self, prompt: str, parameter: str = "prompt") -> torch.Tensor:
        """Embeddings (length, width) of `prompt` on the CPU.

        Raises:
            PromptTooLong: it is, which `parameter` is blamed for.
            NotFinite: the embeddings are not.
        """
        self.count(prompt, parameter)
        with self._lock:  # images of one request ask for the same prompt at the same time
            return self._remembered(prompt)

    def count(self, prompt: str, parameter: str = "prompt") -> int:
        """Tokens of `prompt`, without its template's; raises PromptTooLong, blaming `parameter`."""
        tokens = self._tokens(prompt) - self._template
        if tokens > self._limit:
            raise PromptTooLong(parameter, tokens, self._limit)
        return tokens

    def _tokens(self, prompt: str) -> int:
        """Of the prompt in its template, which are what diffusers cuts."""
        return len(self._pipeline.tokenizer(self._pipeline.prompt_template_encode.format(prompt)).input_ids)

    @torch.inference_mode()
    def _encode(self, prompt: str) -> torch.Tensor:
        embeds, _ = self._pipeline.encode_prompt(prompt, device=self._backend.device)
        return check_finite(embeds[0].cpu(), "encode")

    def begin(
        self,
        request_id: str,
        image_index: int,
        seed: int,
        size: str,
        prompt: str,
        negative_prompt: str | None,
    ) -> LatentPacket:
        """The packet of pure noise that an image of `size` starts as.

        Args:
            negative_prompt: see `negative_for`.

        Raises:
            PromptTooLong: one of the prompts is.
        """
        start = time.time()
        embeds = self.encode(prompt, "prompt")
        negative = None if negative_prompt is None else self.encode(negative_prompt, "negative_prompt")
        avoids = bool(negative_prompt and negative_prompt.strip())
        text_tokens = self.count(prompt) + (self.count(negative_prompt) if negative_prompt and avoids else 0)
        packet = pure_noise(
            request_id, image_index, seed, size, self._latent_channels, embeds, negative, text_tokens, avoids
        )
        return replace(packet, spans=(Span("encode", start, time.time()),))
