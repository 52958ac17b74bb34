"""Words that a model does not know."""

from __future__ import annotations

from random import Random

import pytest

from scenes.captions import caption
from scenes.scene import sample_scene
from stages.config import ModelConfig
from stages.vocabulary import prompt_warnings, unknown_words

WORDS = {"a", "red", "star", "furry"}


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a red star", []),
        ("A RED star!!!", []),
        ("furry,star (red)", []),
        ("", []),
        ("a photo of a cat", ["photo", "of", "cat"]),
        ("Cat, cat and CAT", ["cat", "and"]),
        ("a star's 2 don\u2019ts", ["star's", "2", "don\u2019ts"]),
        ("\u043a\u043e\u0442", ["\u043a\u043e\u0442"]),
    ],
)
def test_unknown_words(text: str, unknown: list[str]) -> None:
    assert unknown_words(text, WORDS) == unknown


def test_each_prompt_has_its_warning() -> None:
    assert prompt_warnings("a red star", "furry", WORDS) == []
    assert prompt_warnings("a brown star", None, WORDS) == ["prompt has words that the model does not know: brown"]
    assert prompt_warnings("a brown cat", "dog", WORDS) == [
        "prompt has words that the model does not know: brown, cat",
        "negative_prompt has words that the model does not know: dog",
    ]


def test_a_model_without_a_vocabulary_has_no_warnings() -> None:
    assert prompt_warnings("a brown cat", "dog", None) == []


def test_warnings_are_bounded() -> None:
    (warning,) = prompt_warnings(" ".join(f"{'x' * 1000}{number}" for number in range(30)), None, WORDS)
    assert warning.endswith("x\u2026 and 20 more")
    assert len(warning) < 500


def test_the_small_models_vocabulary_is_that_of_its_captions(config: ModelConfig) -> None:
    rng = Random(0)
    captions = " ".join(caption(sample_scene(rng), rng) for _ in range(5000))
    assert config.vocabulary == frozenset(unknown_words(captions, ()))
