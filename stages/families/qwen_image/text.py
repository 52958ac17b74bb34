"""Prompt encoding of Qwen-Image, with the pipeline's own template."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from stages.families.base import TextEncoder


class QwenImageTextEncoder(TextEncoder):
    """Embeds prompts as the last hidden state of a language model, without the tokens of the template's head."""

    kind = Qwen2_5_VLForConditionalGeneration

    def __init__(self, module: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(module, tokenizer)
        self._pipeline = QwenImagePipeline(
            scheduler=None, vae=None, text_encoder=module, tokenizer=tokenizer, transformer=None
        )
        self._template = self._tokens("")

    @property
    def layers(self) -> nn.Module:
        return self.module.model.language_model.layers

    @property
    def longest(self) -> int:
        return self._pipeline.tokenizer_max_length + self._pipeline.prompt_template_encode_start_idx - self._template

    def count(self, prompt: str) -> int:
        return self._tokens(prompt) - self._template

    def encode(self, prompt: str) -> torch.Tensor:
        embeds, _ = self._pipeline.encode_prompt(prompt, device=self.module.device)
        return embeds[0]

    def _tokens(self, prompt: str) -> int:
        """Count the tokens of the prompt in its template, to which diffusers' limit applies."""
        return len(self.tokenizer(self._pipeline.prompt_template_encode.format(prompt)).input_ids)
