"""Rotary embeddings of Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from stages.families.rotary import lay_out

_POSITIONS = 4096  # of a text and half an image's side before it, as in diffusers' table


@dataclass(frozen=True)
class Rotary:
    """Rotations of a batch's positions, the same for every row.

    They are (tokens, 1, half the width of a head), see `stages.families.rotary`.

    Attributes:
        text: of as many tokens as the longest text has; prompt and negative prompt share these positions.
        image: of the image's tokens.
    """

    text: torch.Tensor
    image: torch.Tensor


class RotaryEmbedding(nn.Module):
    """Stands in for diffusers' `QwenEmbedRope`: an image's rows and columns count from its centre, text after them.

    Attributes:
        real: whether to use real arithmetic.
    """

    def __init__(self, theta: float, axes: Sequence[int]) -> None:
        """Prepare the table of text positions.

        Args:
            theta: base of the frequencies.
            axes: channels of a head that frame, row and column rotate.
        """
        super().__init__()
        self.real = False
        self._theta = theta
        self._axes = axes
        self._table = torch.cat([self._rotations(torch.arange(_POSITIONS), axis) for axis in range(3)], dim=-1)
        self._text = lru_cache(maxsize=1)(self._place_text)
        self._image = lru_cache(maxsize=64)(self._place_image)

    def forward(
        self, video_fhw: list[list[tuple[int, int, int]]], *, device: torch.device, max_txt_seq_len: int
    ) -> Rotary:
        """Return the rotations of a batch; the arguments are named as diffusers names them.

        Args:
            video_fhw: frames (1), rows and columns of each image's tokens, all alike.
            device: where to put the rotations.
            max_txt_seq_len: tokens of the longest text.
        """
        ((_, rows, columns),) = video_fhw[0]
        first = max(rows, columns) // 2
        text = self._text(device, self.real)[first : first + max_txt_seq_len]
        return Rotary(text, self._image(rows, columns, device, self.real))

    def _rotations(self, positions: torch.Tensor, axis: int) -> torch.Tensor:
        """Return complex rotations (positions, half the channels of `axis`)."""
        width = self._axes[axis]
        angles = torch.outer(positions, 1.0 / torch.pow(self._theta, torch.arange(0, width, 2).float().div(width)))
        return torch.polar(torch.ones_like(angles), angles)

    def _place_text(self, device: torch.device, real: bool) -> torch.Tensor:
        return _place(self._table, device, real)

    def _place_image(self, rows: int, columns: int, device: torch.device, real: bool) -> torch.Tensor:
        frame = self._rotations(torch.zeros(1), 0).expand(rows * columns, -1)
        down = self._rotations(torch.arange(rows) - (rows - rows // 2), 1).repeat_interleave(columns, dim=0)
        across = self._rotations(torch.arange(columns) - (columns - columns // 2), 2).repeat(rows, 1)
        return _place(torch.cat([frame, down, across], dim=-1), device, real)


def _place(rotations: torch.Tensor, device: torch.device, real: bool) -> torch.Tensor:
    """Put rotations (tokens, half the width of a head) on a device, as `Rotary` has them."""
    return lay_out(rotations[:, None], real).to(device)
