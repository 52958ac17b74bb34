"""Prompts padded to a fixed length, so that all batches have the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import QwenImagePipeline

from stages import text
from stages.plan import StageSpec


@dataclass(frozen=True)
class Text(text.Text):
    """Prompts of a batch, with a mask even if nothing is padded."""

    mask: torch.Tensor
    negative: None = field(default=None, init=False)

    def __getitem__(self, rows: torch.Tensor) -> Text:
        return Text(self.embeds[rows], self.mask[rows])

    def beside(self, other: Text) -> Text:
        """Concatenate the rows of two batches."""
        return Text(torch.cat([self.embeds, other.embeds]), torch.cat([self.mask, other.mask]))


@dataclass(frozen=True)
class Texts:
    """A prompt and a negative prompt for each image of a batch."""

    prompt: Text
    negative: Text

    def __getitem__(self, rows: torch.Tensor) -> Texts:
        return Texts(self.prompt[rows], self.negative[rows])

    def read_by(self, stage: StageSpec) -> Text:
        """Return what the adapter of `stage` reads: the prompt, or both prompts joined."""
        return self.joined() if stage.reads_negative else self.prompt

    def joined(self) -> Text:
        """Join both prompts as `stages.denoise.join_negative` does, row by row."""
        length = self.prompt.mask.shape[1]
        own, avoided = (of.mask.sum(dim=1, keepdim=True) for of in (self.prompt, self.negative))
        both = torch.cat([self.prompt.embeds, -self.negative.embeds], dim=1)
        place = torch.arange(both.shape[1], device=both.device).expand(len(both), -1)
        # The negative prompt follows the prompt's last token, before the padding.
        source = torch.where(place < own, place, place - own + length).clamp(max=both.shape[1] - 1)
        return Text(both.gather(1, source[..., None].expand_as(both)), place < own + avoided)


def tokenize(pipeline: QwenImagePipeline, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize prompts in the pipeline's template.

    Args:
        pipeline: its tokenizer and template are used.
        prompts: the prompts.
        length: tokens of the longest prompt, with the end of the template.

    Returns:
        int64 (batch, start of the template + length), and a mask of that shape, False for padding.

    Raises:
        ValueError: a prompt is longer.
    """
    total = pipeline.prompt_template_encode_start_idx + length
    texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
    encoded = pipeline.tokenizer(texts, padding="max_length", max_length=total)
    if (longest := max(map(len, encoded.input_ids))) > total:
        raise ValueError(f"a prompt has {longest - total} tokens more than {length}")
    return torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask, dtype=torch.bool)


def encode(pipeline: QwenImagePipeline, tokens: torch.Tensor, mask: torch.Tensor) -> Text:
    """Embed tokens as the pipeline's `encode_prompt` does, but without splitting the batch to pad it again.

    Padding comes last and the decoder is causal, so no token attends to padding.

    Args:
        pipeline: its text encoder is used.
        tokens: see `tokenize`.
        mask: see `tokenize`.

    Returns:
        Embeddings of the prompts and of the template's end, without its start.
    """
    hidden = pipeline.text_encoder.model.language_model(input_ids=tokens, use_cache=False).last_hidden_state
    start = pipeline.prompt_template_encode_start_idx
    return Text(hidden[:, start:], mask[:, start:])


@torch.no_grad()
def embed(pipeline: QwenImagePipeline, prompts: Sequence[str], length: int, batch: int = 256) -> Text:
    """Embed any number of prompts on the text encoder's device, at most `batch` at a time; see `tokenize`."""
    parts = []
    for start in range(0, len(prompts), batch):
        tokens, mask = tokenize(pipeline, list(prompts[start : start + batch]), length)
        device = pipeline.text_encoder.device
        parts.append(encode(pipeline, tokens.to(device), mask.to(device)))
    return Text(torch.cat([part.embeds for part in parts]), torch.cat([part.mask for part in parts]))


def embed_pairs(pipeline: QwenImagePipeline, prompts: list[str], negatives: list[str], length: int) -> Texts:
    """Embed a prompt and a negative prompt for each image, see `tokenize`."""
    return Texts(embed(pipeline, prompts, length), embed(pipeline, negatives, length))
