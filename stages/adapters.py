"""LoRAs on one set of weights, weighted row by row, so that one forward pass serves rows of all stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.lora_files import Lora


class RowAdapters:
    """Adds LoRAs to any linear layers of a transformer.

    Every adapted layer holds all adapters side by side, as one pair of factors whose rank is the sum of theirs. A row's
    gate is a vector of that length: an adapter's strength at the adapter's own ranks, and 0 elsewhere. The mixture of
    adapters in a batch thus changes neither shapes nor modules, and always costs two thin products. With DoRA adapters
    the gate continues with 1 for each that the row uses, then with the strength of each.

    One adapter may be fused into the weights: its rows then cost nothing extra (except for DoRA's scaling), and rows
    without it subtract it.
    """

    def __init__(
        self,
        transformer: Any,
        adapters: Mapping[str, Mapping[str, Lora]],
        fused: str | None = None,
    ) -> None:
        """Replace the adapted layers of `transformer`, in place.

        Args:
            transformer: the module to adapt.
            adapters: adapters by name, each as LoRAs by the name of the layer.
            fused: adapter to fuse into the weights.

        Raises:
            ValueError: no adapter is called `fused`.
        """
        if fused is not None and fused not in adapters:
            raise ValueError(f"the adapter to fuse must be one of {sorted(adapters)}, not {fused!r}")
        self._columns: dict[str, slice] = {}
        start = 0
        for adapter, loras in sorted(adapters.items()):
            rank = max(lora.rank for lora in loras.values())
            self._columns[adapter] = slice(start, start + rank)
            start += rank
        self._ranks = start
        self._dora = [
            adapter
            for adapter, loras in sorted(adapters.items())
            if any(lora.magnitude is not None for lora in loras.values())
        ]
        self._fused = fused
        self._gate = _Gate()
        for name in sorted({name for loras in adapters.values() for name in loras}):
            here = {adapter: loras[name] for adapter, loras in adapters.items() if name in loras}
            parent, _, child = name.rpartition(".")
            layer = _RowLora(transformer.get_submodule(name), here, self._columns, self._dora, self._gate, fused)
            setattr(transformer.get_submodule(parent), child, layer)

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return list(self._columns)

    @property
    def width(self) -> int:
        """Length of a row's gate."""
        return self._ranks + 2 * len(self._dora)

    def gate(self, weights: Sequence[tuple[str | None, float]]) -> torch.Tensor | None:
        """Return the rows' gates (rows, width) in float32 on the CPU, or None if no row changes the layers' weights.

        Args:
            weights: each row's adapter, or None for the base model alone, and its strength.

        Raises:
            KeyError: there is no such adapter.
        """
        gate = torch.zeros(len(weights), self.width)
        for row, (adapter, scale) in zip(gate, weights, strict=True):
            if adapter is not None:
                row[self._columns[adapter]] = scale
            if self._fused is not None:
                row[self._columns[self._fused]] -= 1
            if adapter in self._dora:
                column = self._ranks + self._dora.index(adapter)
                row[column], row[column + len(self._dora)] = 1, scale
        return gate if gate.any() else None

    @contextmanager
    def gated(self, gate: torch.Tensor | None) -> Iterator[None]:
        """Apply these gates to forward passes within the `with` block; adapted layers run only inside of one."""
        before = self._gate.open
        if gate is None or not self._dora:
            self._gate.open = gate, None
        else:
            self._gate.open = gate[:, : self._ranks], gate[:, self._ranks :]
        try:
            yield
        finally:
            self._gate.open = before


class _Gate:
    """The gates of the current forward pass, shared by all adapted layers.

    `open` holds two tensors: strengths (rows, ranks), or None for the layers' own weights alone; and, where there is
    DoRA, its use and strength (rows, 2 * adapters). Outside of a pass it is None.
    """

    open: tuple[torch.Tensor | None, torch.Tensor | None] | None = None


class _RowLora(nn.Module):
    """A linear layer and the low-rank products of all adapters."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(
        self,
        base: nn.Linear,
        loras: Mapping[str, Lora],
        columns: Mapping[str, slice],
        dora: Sequence[str],
        gate: _Gate,
        fused: str | None,
    ) -> None:
        super().__init__()
        self.base = base
        self._gate = gate
        weight = base.weight
        ranks = max(column.stop for column in columns.values())
        down, up = weight.new_zeros(ranks, weight.shape[1]), weight.new_zeros(weight.shape[0], ranks)
        for adapter, lora in loras.items():
            start = columns[adapter].start
            down[start : start + lora.rank] = lora.down
            up[:, start : start + lora.rank] = lora.up
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        scaled = {index: loras[adapter] for index, adapter in enumerate(dora) if adapter in loras}
        self._growth = _Growth(weight, scaled) if scaled else None
        if fused is not None:
            weight.data += up[:, columns[fused]] @ down[columns[fused]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.base(x)
        assert self._gate.open is not None, "an adapted layer runs outside of RowAdapters.gated"
        rows, dora = self._gate.open
        if rows is None:
            return output
        gate = rows if x.ndim == 2 else rows[:, None]
        output = output + F.linear(F.linear(x, self.down) * gate, self.up)
        if self._growth is None or dora is None:
            return output
        growth = self._growth(dora).to(output.dtype)
        growth = growth if x.ndim == 2 else growth[:, None]
        bias = self.base.bias
        return output * growth if bias is None else (output - bias) * growth + bias


class _Growth(nn.Module):
    """DoRA's factor for every output: magnitude over the norm of W + s D, where D = up @ down and s is the strength.

    The norm's square is |W|^2 + 2 s W.D + s^2 |D|^2, so every row may have a strength of its own.
    """

    weight: torch.Tensor
    product: torch.Tensor
    change: torch.Tensor
    magnitude: torch.Tensor

    def __init__(self, weight: torch.Tensor, loras: Mapping[int, Lora]) -> None:
        """Precompute the terms of the norm.

        Args:
            weight: W, (outputs, inputs).
            loras: this layer's LoRAs with DoRA, by their index among all adapters that use DoRA on any layer.
        """
        super().__init__()
        self._here = list(loras)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        exact = weight.detach().to(dtype)
        product, change, magnitude = [], [], []
        for lora in loras.values():
            assert lora.magnitude is not None
            delta = lora.up.to(exact) @ lora.down.to(exact)
            product.append((exact * delta).sum(1))
            change.append(delta.square().sum(1))
            magnitude.append(lora.magnitude.to(exact))
        self.register_buffer("weight", exact.square().sum(1))
        self.register_buffer("product", torch.stack(product))
        self.register_buffer("change", torch.stack(change))
        self.register_buffer("magnitude", torch.stack(magnitude))

    def forward(self, dora: torch.Tensor) -> torch.Tensor:
        """Return factors (rows, outputs) for DoRA's use and strength (rows, 2 * adapters)."""
        used, strength = (half[:, self._here, None] for half in dora.to(self.weight.dtype).chunk(2, dim=1))
        norm = (self.weight + strength * (2 * self.product + strength * self.change)).sqrt()
        return 1 + (used * (self.magnitude / norm - 1)).sum(1)
