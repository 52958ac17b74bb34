"""NVIDIA's GPUs."""

from __future__ import annotations

from typing import ClassVar

from backends.gpu import GPUBackend


class CUDABackend(GPUBackend):
    """GPUs on which PyTorch runs by CUDA; `fp8_dynamic` needs compute capability 8.9 or above."""

    name: ClassVar[str] = "cuda"

    @property
    def missing(self) -> str | None:
        import torch  # here, because checks of a configuration do without it

        if torch.version.cuda is None:
            return "PyTorch is built without CUDA"
        return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
