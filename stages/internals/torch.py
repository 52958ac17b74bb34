"""Internals of PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.fx.experimental import _config


def unrelated_dimensions() -> AbstractContextManager[None]:
    """Keep torch.compile from assuming that dimensions which are equal once (e.g. tokens and ranks) always are."""
    return _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
