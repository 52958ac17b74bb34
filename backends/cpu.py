"""Any processor that PyTorch runs on."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from backends.base import Backend, Memory, Quantization, host_memory

_NICENESS = 10  # a tenth of the weight of others: these are what brings the work, and take little


class CPUBackend(Backend):
    """Runs in float32: exact, and on most processors faster than emulated half precision."""

    name: ClassVar[str] = "cpu"
    device: ClassVar[str] = "cpu"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "float32"
    quantizations: ClassVar[tuple[Quantization, ...]] = ("int8_weight_only", "int8_dynamic")

    @property
    def missing(self) -> str | None:
        return None

    def synchronise(self) -> None:
        """Do nothing, because every operation is done when it returns."""

    def give_way(self) -> None:
        os.nice(_NICENESS)  # on Linux of the calling thread alone

    def memory(self) -> Memory:
        return host_memory()
