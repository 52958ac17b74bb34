"""GPUs that PyTorch calls `cuda`: NVIDIA's, and AMD's under ROCm."""

from __future__ import annotations

from typing import ClassVar

import torch

from backends.base import Backend, Quantization


class CUDABackend(Backend):
    """Runs in bfloat16 on the process's current device, which Ray chooses by what a replica asks for."""

    name: ClassVar[str] = "cuda"
    default_dtype: ClassVar[torch.dtype] = torch.bfloat16
    quantizations: ClassVar[tuple[Quantization, ...]] = ("int8_weight_only", "int8_dynamic", "fp8_dynamic")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def synchronise(self) -> None:
        torch.cuda.synchronize()
