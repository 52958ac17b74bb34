"""TPUs as PyTorch's device `tpu`, by TorchTPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from backends.base import Backend, Memory, StaticShapes, compile_each_shape

if TYPE_CHECKING:
    from torch import nn


class TPUBackend(Backend):
    """Runs in bfloat16 on the chip that Ray assigns to the replica; every shape is compiled apart."""

    name: ClassVar[str] = "tpu"
    device: ClassVar[str] = "tpu"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    shapes: ClassVar[StaticShapes | None] = StaticShapes()
    complex_numbers: ClassVar[bool] = False
    resources: ClassVar[Mapping[str, float]] = MappingProxyType({"TPU": 1.0})

    @property
    def missing(self) -> str | None:
        if find_spec("torch_tpu") is None:
            return "torch-tpu is not installed"
        import torch  # here, because checks of a configuration do without it

        device = torch.accelerator.current_accelerator(check_available=True)
        return None if device is not None and device.type == self.device else "TorchTPU finds no TPU"

    def synchronise(self) -> None:
        import torch  # here, because checks of a configuration do without it

        torch.accelerator.synchronize()

    def memory(self) -> Memory:
        import torch  # here, because checks of a configuration do without it

        free, total = torch.accelerator.get_memory_info()
        return Memory(in_use=total - free, free=free)

    def keep_compilations(self, directory: Path) -> None:
        os.environ["TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"] = str(directory)

    def compile(self, module: nn.Module) -> None:
        """Set up `module`, in place, to be compiled on each call with new shapes."""
        compile_each_shape(module)
