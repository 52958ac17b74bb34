"""AMD's GPUs, by PyTorch for ROCm."""

from __future__ import annotations

from typing import ClassVar

from backends.gpu import GPUBackend


class ROCmBackend(GPUBackend):
    """Instinct MI300 and its relatives.

    Attention is PyTorch's own, because AITER's refuses masks. Their fp8 format is e4m3fnuz, which torchao chooses by
    itself and which rounds otherwise than NVIDIA's e4m3fn: quantized images differ between pools.
    """

    name: ClassVar[str] = "rocm"
    attention: ClassVar[str | None] = "native"

    @property
    def missing(self) -> str | None:
        import torch  # here, because checks of a configuration do without it

        if torch.version.hip is None:
            return "PyTorch is built without ROCm"
        return None if torch.cuda.is_available() else "PyTorch finds no ROCm device"
