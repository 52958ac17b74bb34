"""Any processor that PyTorch runs on."""

from __future__ import annotations

from typing import ClassVar

import torch

from backends.base import Backend, Quantization


class CPUBackend(Backend):
    """Runs in float32: exact, and on most processors faster than emulated half precision."""

    name: ClassVar[str] = "cpu"
    default_dtype: ClassVar[torch.dtype] = torch.float32
    quantizations: ClassVar[tuple[Quantization, ...]] = ("int8_weight_only", "int8_dynamic")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def synchronise(self) -> None:
        """Nothing is queued: every operation has run when it returns."""
