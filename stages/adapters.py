"""LoRAs of one set of weights, weighted row by row, so that one forward pass carries rows of all stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from peft.tuners.lora import Linear as PeftLinear
from torch import nn


class RowAdapters:
    """Takes over the LoRAs that peft has loaded into a transformer.

    Every adapted layer holds all of them side by side, as one pair of factors of the sum of their ranks: a row's
    gate, a vector of that length, is an adapter's strength at its own ranks and 0 elsewhere. Which adapters a batch
    uses thus changes neither shapes nor modules, and costs two thin products whatever the mixture.

    One adapter may be fused into the weights: its rows then cost nothing more, and rows without it take it away.
    """

    def __init__(self, transformer: QwenImageTransformer2DModel, fused: str | None = None) -> None:
        """Raises ValueError if no adapter is called `fused`."""
        found = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, PeftLinear)}
        ranks: dict[str, int] = {}
        for layer in found.values():
            for adapter, rank in layer.r.items():
                ranks[adapter] = max(rank, ranks.get(adapter, 0))
        self._columns: dict[str, slice] = {}
        start = 0
        for adapter, rank in sorted(ranks.items()):
            self._columns[adapter] = slice(start, start + rank)
            start += rank
        if fused is not None and fused not in self._columns:
            raise ValueError(f"the adapter to fuse must be one of {sorted(self._columns)}, not {fused!r}")
        self._fused = fused
        self._gate = _Gate(start)
        for name, layer in found.items():
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, _RowLora(layer, self._columns, self._gate, fused))

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    @property
    def ranks(self) -> int:
        """Of all adapters together."""
        return self._gate.ranks

    def gate(self, weights: Sequence[tuple[str | None, float]]) -> torch.Tensor | None:
        """Gates (rows, ranks) for rows of an adapter, or None for the base model alone, and its strength.

        On the CPU in float32; None where every row's weights are those of the layers themselves.

        Raises:
            KeyError: no such adapter.
        """
        gate = torch.zeros(len(weights), self._gate.ranks)
        for row, (adapter, scale) in zip(gate, weights, strict=True):
            if adapter is not None:
                row[self._columns[adapter]] = scale
            if self._fused is not None:
                row[self._columns[self._fused]] -= 1
        return gate if gate.any() else None

    def use(self, gate: torch.Tensor | None) -> None:
        """From here on, rows of forward passes have these gates."""
        self._gate.rows = gate


class _Gate:
    """What all adapted layers read: gates (rows, ranks), or None for their own weights alone."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.rows: torch.Tensor | None = None


class _RowLora(nn.Module):
    """A linear layer and the low-rank products of all adapters."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, layer: PeftLinear, columns: dict[str, slice], gate: _Gate, fused: str | None) -> None:
        super().__init__()
        self.base = layer.base_layer
        self._gate = gate
        weight = self.base.weight
        down, up = weight.new_zeros(gate.ranks, weight.shape[1]), weight.new_zeros(weight.shape[0], gate.ranks)
        for adapter, rank in layer.r.items():
            start = columns[adapter].start
            down[start : start + rank] = layer.lora_A[adapter].weight.data
            up[:, start : start + rank] = layer.scaling[adapter] * layer.lora_B[adapter].weight.data
        if fused is not None:
            weight.data += up[:, columns[fused]] @ down[columns[fused]]
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.base(x)
        rows = self._gate.rows
        if rows is None:
            return output
        gate = rows if x.ndim == 2 else rows[:, None]
        return output + F.linear(F.linear(x, self.down) * gate, self.up)
