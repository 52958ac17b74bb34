"""TPUs by PyTorch/XLA, whose last release is 2.9; where PJRT_DEVICE is CPU, the same graphs run on a processor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from backends.base import Backend, M, Memory, StaticShapes, host_memory

if TYPE_CHECKING:
    from torch import nn


class XLABackend(Backend):
    """Records operations and compiles what was recorded when it is waited for, once for every shape."""

    name: ClassVar[str] = "xla"
    device: ClassVar[str] = "xla"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    shapes: ClassVar[StaticShapes | None] = StaticShapes()
    complex_numbers: ClassVar[bool] = False
    resources: ClassVar[Mapping[str, float]] = MappingProxyType({"TPU": 1.0})

    @property
    def missing(self) -> str | None:
        if find_spec("torch_xla") is None:
            return "torch-xla is not installed"
        # Without a choice, the library looks for a TPU, and waits for minutes where there is none.
        return None if os.environ.get("PJRT_DEVICE") else "PJRT_DEVICE does not say TPU or CPU"

    def synchronise(self) -> None:
        import torch_xla  # only in the environment of such a pool

        torch_xla.sync(wait=True)

    def memory(self) -> Memory:
        import torch_xla.core.xla_model as xla_model
        import torch_xla.runtime as runtime

        if runtime.device_type() == "CPU":
            return host_memory()
        info = xla_model.get_memory_info(self.device)
        return Memory(in_use=info["bytes_used"], free=info["bytes_limit"] - info["bytes_used"])

    def inference(self) -> AbstractContextManager[None]:
        """Switch gradients off; tensors of `torch.inference_mode` fail in this library."""
        import torch  # here, because checks of a configuration do without it

        return torch.no_grad()

    def place(self, module: M) -> M:
        placed = super().place(module)
        self.synchronise()  # so that moving the weights is no part of the first graph
        return placed

    def keep_compilations(self, directory: Path) -> None:
        from torch_xla import runtime  # only in the environment of such a pool

        runtime.initialize_cache(str(directory), readonly=False)

    def compile(self, module: nn.Module) -> None:
        """Do nothing, because everything that is recorded is compiled."""

    def end_graph(self) -> None:
        import torch_xla  # only in the environment of such a pool

        torch_xla.sync()
