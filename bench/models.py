"""The models that benchmarks load: configs that they use by default, and the choice of a backend."""

from __future__ import annotations

import argparse
from pathlib import Path

from backends import backend_names

_CONFIGS = Path(__file__).parent.parent / "configs"
SCENES, QWEN_IMAGE = _CONFIGS / "scenes.yaml", _CONFIGS / "qwen_image.yaml"


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--backend`, the name of one."""
    parser.add_argument("--backend", choices=backend_names(), default="cpu")
