"""What an image may be: its size, its seed and its file."""

from __future__ import annotations

import re
from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp"]

# PyTorch's CPU generator looks at no more bits than these: larger seeds would repeat smaller ones' images.
MAX_SEED = 2**32 - 1

MOST_PIXELS = 4096  # of a side


def parse_size(size: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` into two integers; raises ValueError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT, not {size!r}")
    return int(match[1]), int(match[2])


def token_grid(size: str, pixels_per_token: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image of `WIDTHxHEIGHT` pixels."""
    width, height = parse_size(size)
    return height // pixels_per_token, width // pixels_per_token
