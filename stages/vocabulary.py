"""What a client is told of a prompt that has words which the model never saw."""

from __future__ import annotations

import re
from collections.abc import Collection

_NAMED = 10  # words in a warning
_LETTERS = 32  # of each


def unknown_words(text: str, vocabulary: Collection[str]) -> list[str]:
    """The words of `text` that are not in `vocabulary`, in lower case and once each, in their order.

    A word is letters and digits, with apostrophes between them.

    Args:
        vocabulary: words in lower case.
    """
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in vocabulary]


def prompt_warnings(prompt: str, negative_prompt: str | None, vocabulary: Collection[str] | None) -> list[str]:
    """A sentence for each prompt with unknown words; none where the model names no vocabulary."""
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
