"""Errors of a single image, which are reported to its client."""

from __future__ import annotations


class PromptTooLong(ValueError):
    """A prompt with more tokens than the model's config allows; `parameter` says which prompt."""

    def __init__(self, parameter: str, tokens: int, limit: int) -> None:
        super().__init__(f"{parameter} has {tokens} tokens, at most {limit} are allowed")
        self.parameter, self.tokens, self.limit = parameter, tokens, limit


class NotFinite(ArithmeticError):
    """An image with numbers that are infinite or NaN; `stage` says where they were first found."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the image is not finite after stage {stage}")
        self.stage = stage
