"""Warnings for prompts with words that the model never saw in training."""

from __future__ import annotations

import re
from collections.abc import Collection

_NAMED = 10  # words in a warning
_LETTERS = 32  # of a word in a warning


def unknown_words(text: str, vocabulary: Collection[str]) -> list[str]:
    """List the words of `text` that are not in `vocabulary`: in lower case, once each, in order of appearance.

    A word consists of letters and digits, with apostrophes between them.

    Args:
        text: a prompt.
        vocabulary: words in lower case.
    """
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in vocabulary]


def prompt_warnings(prompt: str, negative_prompt: str | None, vocabulary: Collection[str] | None) -> list[str]:
    """Return a sentence for each prompt with unknown words; none if the model's config has no vocabulary."""
    if vocabulary is None:
        return []
    return [
        f"{field} has words that the model does not know: {_list(unknown)}"
        for field, text in (("prompt", prompt), ("negative_prompt", negative_prompt or ""))
        if (unknown := unknown_words(text, vocabulary))
    ]


def _list(words: list[str]) -> str:
    named = [word if len(word) <= _LETTERS else f"{word[: _LETTERS - 1]}\u2026" for word in words[:_NAMED]]
    more = len(words) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
