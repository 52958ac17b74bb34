"""Paths of the configs that benchmarks use by default."""

from __future__ import annotations

from pathlib import Path

_CONFIGS = Path(__file__).parent.parent / "configs"
SCENES, QWEN_IMAGE = _CONFIGS / "scenes.yaml", _CONFIGS / "qwen_image.yaml"
