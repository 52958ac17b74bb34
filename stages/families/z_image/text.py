"""Prompt encoding of Z-Image, with the tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

from stages.families.base import TextEncoder

_MOST_TOKENS = 512  # of a prompt with its template; `ZImagePipeline` truncates there


class ZImageTextEncoder(TextEncoder):
    """Embeds prompts as the last but one hidden state of a language model, with the template's tokens."""

    kind = AutoModel

    def __init__(self, module: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(module, tokenizer)
        self._template = len(self._tokens(""))

    @property
    def layers(self) -> nn.Module:
        return self.module.layers

    @property
    def longest(self) -> int:
        return _MOST_TOKENS - self._template

    def count(self, prompt: str) -> int:
        return len(self._tokens(prompt)) - self._template

    def encode(self, prompt: str) -> torch.Tensor:
        tokens = torch.tensor([self._tokens(prompt)], device=self.module.device)
        # No padding: diffusers pads to its limit and drops it again, and causal attention never sees it.
        return self.module(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-2][0]

    def _tokens(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return self.tokenizer(text).input_ids
