"""Prompts up to the longest that a model takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backends import Backend
from stages.config import ModelConfig
from stages.encode import Encoder
from stages.errors import PromptTooLong
from stages.families.qwen_image.text import QwenImageTextEncoder

LONGEST = 1019  # what diffusers keeps of prompt and template, 1024, without the template's end


@pytest.fixture(scope="module")
def encoder(config: ModelConfig, backend: Backend) -> Encoder:
    return Encoder(config.model_copy(update={"max_prompt_tokens": LONGEST}), backend)


@pytest.fixture
def seen(encoder: Encoder) -> Iterator[list[torch.Tensor]]:
    """A list that grows by the ids (1, length) of each text that the text encoder sees."""
    ids: list[torch.Tensor] = []
    text_encoder = encoder._text.module.model.language_model
    hook = text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    yield ids
    hook.remove()


def test_the_templates_end_survives_the_longest_prompt(encoder: Encoder, seen: list[torch.Tensor]) -> None:
    assert isinstance(encoder._text, QwenImageTextEncoder)
    pipeline = encoder._text._pipeline
    end = pipeline.tokenizer(pipeline.prompt_template_encode.partition("{}")[2]).input_ids
    assert len(end) == 5
    prompt = " ".join(["red"] * LONGEST)
    assert len(pipeline.tokenizer(prompt).input_ids) == LONGEST
    assert len(encoder.encode(prompt)) == LONGEST + len(end)
    assert seen[0][0, -len(end) :].tolist() == end
    with pytest.raises(PromptTooLong, match=rf"^prompt has {LONGEST + 1} tokens, at most {LONGEST} are allowed$"):
        encoder.encode(f"{prompt} red")


def test_a_limit_that_does_not_fit_beside_the_template_is_refused(config: ModelConfig, backend: Backend) -> None:
    too_many = config.model_copy(update={"max_prompt_tokens": LONGEST + 1})
    with pytest.raises(ValueError, match=f"max_prompt_tokens must be at most {LONGEST} for this model's tokenizer"):
        Encoder(too_many, backend)


def test_case_does_not_matter_to_the_small_models_tokenizer(encoder: Encoder) -> None:
    assert torch.equal(encoder.encode("A RED circle"), encoder.encode("a red circle"))
