"""A stand-in on a processor for `habana_frameworks`, Gaudi's runtime, with the names that the backend uses."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

from backends import GaudiBackend


class FusedSDPA:
    """The fused attention, which broadcasts masks, and repeats the keys of grouped queries by itself."""

    calls: Counter[str]

    @classmethod
    def apply(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        cls.calls["attend"] += 1
        assert dropout_p == 0
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (of.repeat_interleave(repeats, dim=-3) for of in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        return logits.softmax(-1) @ value


@contextmanager
def gaudi_on_cpu() -> Iterator[Counter[str]]:
    """Let Gaudi's backend run on the processor, in lazy mode, within the block; count what it calls."""
    calls: Counter[str] = Counter()
    FusedSDPA.calls = calls

    def count(name: str) -> None:
        calls[name] += 1

    contents: dict[str, dict[str, object]] = {
        "habana_frameworks": {},
        "habana_frameworks.torch": {
            "core": SimpleNamespace(mark_step=lambda: count("mark_step")),
            "hpu": SimpleNamespace(
                is_available=lambda: True,
                memory_stats=lambda: {"Limit": 96, "InUse": 32, "MaxInUse": 64},
                synchronize=lambda: count("synchronize"),
            ),
        },
        "habana_frameworks.torch.hpex": {},
        "habana_frameworks.torch.hpex.kernels": {"FusedSDPA": FusedSDPA},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents[name])
    sys.modules.update(modules)
    with (
        patch.dict(os.environ, PT_HPU_LAZY_MODE="1"),
        patch.object(GaudiBackend, "device", "cpu"),
        patch.object(F, "scaled_dot_product_attention", F.scaled_dot_product_attention),  # put back afterwards
    ):
        try:
            yield calls
        finally:
            for name in modules:  # and no others, which cannot be loaded twice
                del sys.modules[name]
