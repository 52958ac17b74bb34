"""Intel's Gaudi accelerators, by the vendor's PyTorch with `habana_frameworks`, which only its containers have.

PT_HPU_LAZY_MODE in the environment says how operations run: if it is 1, they are recorded, and compiled for every shape
when they are waited for; if it is 0, each runs by itself, and `compile` lets blocks be compiled for every shape.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from backends.base import Backend, M, Memory, StaticShapes, compile_each_shape

if TYPE_CHECKING:
    import torch
    from torch import nn


_LAZY = "PT_HPU_LAZY_MODE"


class GaudiBackend(Backend):
    """Runs in bfloat16, with the vendor's fused attention."""

    name: ClassVar[str] = "gaudi"
    device: ClassVar[str] = "hpu"
    default_dtype: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    shapes: ClassVar[StaticShapes | None] = StaticShapes()
    complex_numbers: ClassVar[bool] = False
    resources: ClassVar[Mapping[str, float]] = MappingProxyType({"HPU": 1.0})

    @property
    def missing(self) -> str | None:
        if find_spec("habana_frameworks") is None:
            return "habana_frameworks is not installed; the vendor's containers have it"
        if os.environ.get(_LAZY) not in ("0", "1"):  # what it is by default depends on the release
            return f"{_LAZY} says neither 0 nor 1"
        from habana_frameworks.torch import hpu

        return None if hpu.is_available() else "habana_frameworks finds no device"

    def synchronise(self) -> None:
        from habana_frameworks.torch import hpu

        hpu.synchronize()

    def memory(self) -> Memory:
        from habana_frameworks.torch import hpu

        stats = hpu.memory_stats()
        return Memory(in_use=stats["InUse"], free=stats["Limit"] - stats["InUse"])

    def place(self, module: M) -> M:
        _fuse_attention()
        return super().place(module)

    def compile(self, module: nn.Module) -> None:
        """Set up `module`, in place, to be compiled on each call with new shapes; what is recorded is so anyway.

        The vendor's HPU graphs would spare the host even the recording. But a graph that is replayed sees only tensors
        that are the module's own arguments, and adapters' gates reach its layers in another way.
        """
        if os.environ[_LAZY] == "0":
            compile_each_shape(module, backend="hpu_backend")

    def keep_compilations(self, directory: Path) -> None:
        os.environ["PT_HPU_RECIPE_CACHE_CONFIG"] = f"{directory},false,8192"

    def end_graph(self) -> None:
        from habana_frameworks.torch import core

        core.mark_step()


def _fuse_attention() -> None:
    """Let torch's attention on this device be the vendor's fused kernel, whichever library calls it."""
    import torch.nn.functional as F
    from habana_frameworks.torch.hpex.kernels import FusedSDPA

    plain = F.scaled_dot_product_attention
    if getattr(plain, "fused", False):
        return

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,  # enable_gqa, which the kernel does without being asked
    ) -> torch.Tensor:
        if query.device.type != GaudiBackend.device:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        return FusedSDPA.apply(query, key, value, attn_mask, dropout_p, is_causal, scale)

    attend.fused = True  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
