"""Intel's Gaudi accelerators, by the vendor's PyTorch with `habana_frameworks`, which only its containers have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from backends.base import Backend, M, Memory, StaticShapes

if TYPE_CHECKING:
    import torch
    from torch import nn


class GaudiBackend(Backend):
    """Runs in bfloat16, with the vendor's fused attention; each repeated part is a graph that is compiled per shape."""

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
        """Let every shape of `module` be recorded once and replayed afterwards, without the host's work."""
        from habana_frameworks.torch.hpu import wrap_in_hpu_graph

        wrap_in_hpu_graph(module, disable_tensor_cache=True)

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
        **options: Any,
    ) -> torch.Tensor:
        if query.device.type != GaudiBackend.device:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        return FusedSDPA.apply(query, key, value, attn_mask, dropout_p, is_causal, scale)

    attend.fused = True  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
