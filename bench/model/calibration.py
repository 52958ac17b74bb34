"""What commands that calibrate have in common: a plan of a model, and images to measure it on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from backends import get_backend
from bench.models import SCENES, add_backend_argument
from scenes.cases import DEV, Cases
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan


@dataclass(frozen=True)
class Calibration:
    """A model, one of its plans, and the images to calibrate on."""

    pipeline: Pipeline
    plan: Plan
    prompted: Sequence[Prompted]

    @classmethod
    def load(cls, arguments: argparse.Namespace) -> Self:
        """Load what arguments of `add_calibration_arguments` and `--plan` name; raises ConfigError."""
        config = ModelConfig.read(arguments.config)
        plan = config.plan(arguments.plan)
        pipeline = Pipeline(config, get_backend(arguments.backend))
        return cls(pipeline, plan, Cases.read(arguments.cases).plain[: arguments.prompts])


def add_calibration_arguments(parser: argparse.ArgumentParser, prompts: int) -> None:
    """Add `--config`, `--cases`, `--prompts` (by default as many) and `--backend`."""
    parser.add_argument("--config", type=Path, default=SCENES)
    parser.add_argument("--cases", type=Path, default=DEV)
    parser.add_argument("--prompts", type=int, default=prompts, help="number of calibration prompts")
    add_backend_argument(parser)
