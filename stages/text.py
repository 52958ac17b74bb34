"""The prompts of a batch, and Normalized Attention Guidance away from negative ones.

Chen et al. 2025 (arXiv 2505.21179). In every block image tokens attend to the prompt and, separately, to the negative
prompt; the positive output is then extrapolated away from the negative one. Classifier-free guidance runs the whole
network twice. Here only attention runs twice, over a text sequence extended by the negative prompt. It also works at
large steps and with distilled models, where guidance of velocities fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from stages.plan import AttentionGuidanceSpec

Rows = list[int] | torch.Tensor  # a selection of a batch's rows, by index


@dataclass(frozen=True)
class Negative:
    """The negative prompt that guides a row's attention.

    Attributes:
        embeds: (length, width), without padding.
        guidance: strength of the guidance.
    """

    embeds: torch.Tensor
    guidance: AttentionGuidanceSpec


@dataclass(frozen=True)
class NegativeBatch:
    """The negative prompts of a batch; their tokens follow those of the prompts in the text.

    Attributes:
        mask: bool (batch, length), False for padding, and throughout for a row without a negative prompt.
        scale, tau, alpha: (batch, 1, 1), see `AttentionGuidanceSpec`.
    """

    mask: torch.Tensor
    scale: torch.Tensor
    tau: torch.Tensor
    alpha: torch.Tensor

    def __getitem__(self, rows: Rows) -> NegativeBatch:
        return NegativeBatch(self.mask[rows], self.scale[rows], self.tau[rows], self.alpha[rows])

    def to(self, device: str | torch.device) -> NegativeBatch:
        """Return a copy on `device`."""
        return NegativeBatch(*(part.to(device) for part in (self.mask, self.scale, self.tau, self.alpha)))

    def guide(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Guide attention outputs (batch, tokens, width) for the prompt away from those for the negative prompt.

        The positive outputs are extrapolated by `scale`, limited to `tau` times their L1 norm, and blended with the
        original at weight `alpha`.
        """
        extrapolated = positive + self.scale * (positive - negative)
        before, after = (
            output.norm(p=1, dim=-1, keepdim=True, dtype=torch.float32) for output in (positive, extrapolated)
        )
        shrink = (self.tau * before / after).clamp(max=1.0).to(positive.dtype)
        return torch.lerp(positive, shrink * extrapolated, self.alpha)


@dataclass(frozen=True)
class Text:
    """The prompts of a batch, padded on the right.

    Attributes:
        embeds: (batch, length, width), negative prompts last.
        mask: bool (batch, length), False for padding, or None if there is none.
        negative: the negative prompts that guide attention, or None if no row has one.
    """

    embeds: torch.Tensor
    mask: torch.Tensor | None = None
    negative: NegativeBatch | None = None

    def to(self, device: str | torch.device) -> Text:
        """Return a copy on `device`."""
        mask = None if self.mask is None else self.mask.to(device)
        return Text(self.embeds.to(device), mask, None if self.negative is None else self.negative.to(device))

    def full_mask(self) -> torch.Tensor:
        """Return the mask, all True if there is none: bool (batch, length)."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.embeds.shape[:2], dtype=torch.bool, device=self.embeds.device)


def collate(
    embeds: Sequence[torch.Tensor],
    negatives: Sequence[Negative | None],
    device: torch.device,
    dtype: torch.dtype,
    length: int = 0,
) -> Text:
    """Collate prompts into a batch.

    Args:
        embeds: each row's prompt embeddings (length, width); lengths may differ.
        negatives: each row's negative prompt, or None.
        device: where to put the batch.
        dtype: dtype of the batch's embeddings.
        length: tokens to pad prompts, and separately negative prompts, to; longer ones are padded to the longest.
    """
    padded, mask = _pad(embeds, length)
    if not any(negatives):
        return Text(padded.to(device, dtype), None if mask.all() else mask.to(device))
    nothing = embeds[0][:0]
    negative_padded, negative_mask = _pad([nothing if row is None else row.embeds for row in negatives], length)
    strengths = [
        (0.0, 1.0, 0.0) if row is None else (row.guidance.scale, row.guidance.tau, row.guidance.alpha)
        for row in negatives
    ]
    scale, tau, alpha = torch.tensor(strengths).to(device, dtype)[:, None, None].unbind(-1)
    joint_mask = torch.cat([mask, negative_mask], dim=1).to(device)
    negative = NegativeBatch(negative_mask.to(device), scale, tau, alpha)
    return Text(torch.cat([padded, negative_padded], dim=1).to(device, dtype), joint_mask, negative)


def _pad(embeds: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad embeddings to (batch, length, width); return them with their mask, False for padding, on the CPU."""
    lengths = torch.tensor([len(embed) for embed in embeds])
    padded = pad_sequence(list(embeds), batch_first=True)
    padded = F.pad(padded, (0, 0, 0, max(0, length - padded.shape[1])))
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
