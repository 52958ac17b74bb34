"""GPUs that PyTorch calls `cuda`: those of NVIDIA, and those of AMD under ROCm."""

from __future__ import annotations

from typing import ClassVar, Literal

from backends.base import Backend, Quantization


class CUDABackend(Backend):
    """Runs in bfloat16 on the process's current device, which Ray assigns to the replica."""

    name: ClassVar[str] = "cuda"
    device: ClassVar[str] = "cuda"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    quantizations: ClassVar[tuple[Quantization, ...]] = ("int8_weight_only", "int8_dynamic", "fp8_dynamic")

    @property
    def available(self) -> bool:
        import torch  # here, because checks of a configuration do without it

        return torch.cuda.is_available()

    def synchronise(self) -> None:
        import torch  # here, because checks of a configuration do without it

        torch.cuda.synchronize()
