"""Rotation of queries and keys to their positions, by complex numbers or in real arithmetic where a device has none."""

from __future__ import annotations

import torch


def lay_out(rotations: torch.Tensor, real: bool) -> torch.Tensor:
    """Return complex rotations (...) as they are or, in real arithmetic, as cosines and sines (..., 2)."""
    return torch.view_as_real(rotations).contiguous() if real else rotations


def rotate(tokens: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels, each a complex number's two parts; keep the dtype.

    Real arithmetic takes three times as long on a CPU.

    Args:
        tokens: (batch, tokens, heads, width of a head).
        rotations: (tokens, 1, half the width of a head), or with the batch before; see `lay_out`.
    """
    pairs = tokens.float().unflatten(-1, (-1, 2))
    if rotations.is_complex():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    else:
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rotations.unbind(-1)
        rotated = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return rotated.flatten(-2).type_as(tokens)
