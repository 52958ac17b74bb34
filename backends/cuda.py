"""NVIDIA's GPUs."""

from __future__ import annotations

from typing import ClassVar

from backends.gpu import GPUBackend


class CUDABackend(GPUBackend):
    """GPUs on which PyTorch runs by CUDA; `fp8_dynamic` needs compute capability 8.9 or above."""

    name: ClassVar[str] = "cuda"

    @property
    def available(self) -> bool:
        import torch  # here, because checks of a configuration do without it

        return torch.cuda.is_available() and torch.version.hip is None
