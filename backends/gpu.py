"""What GPUs of several vendors have in common: PyTorch calls all of them `cuda`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from backends.base import Backend, Memory, Quantization


class GPUBackend(Backend):
    """Runs in bfloat16 on the process's current device, which Ray assigns to the replica."""

    device: ClassVar[str] = "cuda"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    quantizations: ClassVar[tuple[Quantization, ...]] = ("int8_weight_only", "int8_dynamic", "fp8_dynamic")
    resources: ClassVar[Mapping[str, float]] = MappingProxyType({"GPU": 1.0})

    def synchronise(self) -> None:
        import torch  # here, because checks of a configuration do without it

        torch.cuda.synchronize()

    def memory(self) -> Memory:
        import torch  # here, because checks of a configuration do without it

        free, total = torch.cuda.mem_get_info()
        return Memory(in_use=total - free, free=free)
