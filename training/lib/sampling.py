"""Samples of a model that a run has saved, by the engine that would serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from backends import Backend
from stages.config import AdapterSource, ModelConfig
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, StageSpec
from training.lib.images import grid

PROMPTS = (
    "a red star",
    "a large furry blue heart on a white background",
    "a striped green circle on the left",
    "a shape",
    "a yellow square left of a purple ring",
    "a small orange cross and a pink moon on a black background",
)
SEEDS = range(4)


def model_config(pipeline: Path, loras: Mapping[str, Path] | None = None, size: str = "128x128") -> ModelConfig:
    """Make the config of a model.

    Args:
        pipeline: directory of the pipeline.
        loras: directories of LoRAs, by the names of their adapters.
        size: the only size, `WIDTHxHEIGHT` in pixels.
    """
    adapters = {name: AdapterSource(source=str(directory)) for name, directory in (loras or {}).items()}
    return ModelConfig(name="training", source=str(pipeline), sizes=(size,), adapters=adapters)


def sample_grid(config: ModelConfig, backend: Backend, stages: Sequence[StageSpec], path: Path) -> None:
    """Write a PNG file of samples, with a row for each of `PROMPTS` and a column for each of `SEEDS`.

    Loads a copy of the model, whose memory is freed on return.
    """
    images = [Prompted(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    results = Pipeline(config, backend).run_batch(Plan(stages=tuple(stages)), images)
    grid([result.image for result in results], len(SEEDS)).save(path)
