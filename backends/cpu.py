"""Any processor that PyTorch runs on."""

from __future__ import annotations

from typing import ClassVar

import torch

from backends.base import Backend


class CPUBackend(Backend):
    """Runs in float32: exact, and on most processors faster than emulated half precision."""

    name: ClassVar[str] = "cpu"
    default_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def synchronise(self) -> None:
        """Nothing is queued: every operation has run when it returns."""
