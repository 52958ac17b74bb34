"""Limits of images: sizes, seeds and file formats."""

from __future__ import annotations

import re
from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp"]

# PyTorch's CPU generator uses only these bits: larger seeds would repeat the images of smaller ones.
MAX_SEED = 2**32 - 1

MOST_PIXELS = 4096  # along one side


def parse_size(size: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` into two integers; raises ValueError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT, not {size!r}")
    return int(match[1]), int(match[2])


def megapixels(size: str, images: int = 1) -> float:
    """Return the millions of pixels of so many images of `WIDTHxHEIGHT`."""
    width, height = parse_size(size)
    return width * height * images / 1e6


def token_grid(size: str, pixels_per_token: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image of `WIDTHxHEIGHT` pixels."""
    width, height = parse_size(size)
    return height // pixels_per_token, width // pixels_per_token
