"""Prompt encoding of Z-Image, with the tokenizer's own chat template."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel

from stages.families.base import TextEncoder

_MOST_TOKENS = 512  # of a prompt with its template; `ZImagePipeline` truncates there


class ZImageTextEncoder(TextEncoder):
    """Embeds prompts as the last but one hidden state of a language model, with the template's tokens."""

    kind = AutoModel

    @property
    def layers(self) -> nn.Module:
        return self.module.layers

    @property
    def longest(self) -> int:
        return _MOST_TOKENS - self._template

    @property
    def head(self) -> int:
        return 0

    def tokenize(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return self.tokenizer(text).input_ids

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-2]
