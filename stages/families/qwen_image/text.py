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

    @property
    def layers(self) -> nn.Module:
        return self.module.model.language_model.layers

    @property
    def longest(self) -> int:
        return self._pipeline.tokenizer_max_length + self.head - self._template

    @property
    def head(self) -> int:
        return self._pipeline.prompt_template_encode_start_idx

    def tokenize(self, prompt: str) -> list[int]:
        return self.tokenizer(self._pipeline.prompt_template_encode.format(prompt)).input_ids

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        # diffusers runs the whole model, with its head for words, to the same end.
        return self.module.model.language_model(input_ids=tokens, use_cache=False).last_hidden_state
