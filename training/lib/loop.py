"""The training loop, and what every trainer starts with."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import QwenImagePipeline

from stages.yaml_file import read_mapping


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: total number of optimizer steps.
        batch_size: examples per step.
        learning_rate: peak of the one-cycle schedule.
        save_every: steps between checkpoints and sample grids.
        seed: seed of the weights, the data and the noise.
    """

    steps: int
    batch_size: int
    learning_rate: float
    save_every: int = 500
    seed: int = 0


class Progress:
    """Number of steps done, which is saved in the checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def parse_arguments(description: str | None, *directories: str) -> argparse.Namespace:
    """Parse the command line: `config`, then these directories, all as paths."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", *directories):
        parser.add_argument(name, type=Path)
    return parser.parse_args()


def read_config(path: Path, section: str) -> dict[str, Any]:
    """Read a section of a YAML file; raises KeyError, which names the section and those that exist."""
    config = read_mapping(path)
    if section not in config:
        raise KeyError(f"{path} has no section {section!r}; it has {sorted(config)}")
    return config[section]


def make_accelerator() -> Accelerator:
    """Return an accelerator with bfloat16 autocast, or without if this is a CPU that has no instructions for bfloat16.

    On such a CPU bfloat16 would take ten times as long as float32. Denormal numbers, such as the many tiny gradients of
    a trained model, also take ten times as long, and are flushed to zero. Threads that exist already would not do so:
    call this before any computation.
    """
    torch.set_flush_denormal(True)
    native = torch.accelerator.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return Accelerator(mixed_precision="bf16" if native else "no")


def begin(
    description: str | None, section: str, *directories: str
) -> tuple[argparse.Namespace, dict[str, Any], Schedule, Accelerator]:
    """Parse the command line, read the trainer's section of the config, and seed all generators.

    Args:
        description: help text of the command.
        section: name of the section.
        directories: names of the arguments after `config`.

    Returns:
        The arguments, the section, its schedule, and an accelerator.
    """
    arguments = parse_arguments(description, *directories)
    config = read_config(arguments.config, section)
    schedule = Schedule(**config["schedule"])
    set_seed(schedule.seed)
    return arguments, config, schedule, make_accelerator()


def load_pipeline(directory: Path, device: torch.device) -> QwenImagePipeline:
    """Load a pipeline in float32, to train parts of it."""
    pipeline = QwenImagePipeline.from_pretrained(directory, dtype=torch.float32).to(device)
    if device.type == "cpu":
        # On two cores, a step of the small model takes 0.50 s with this backend, 0.66 s with the flash kernel.
        pipeline.transformer.set_attention_backend("_native_math")
    return pipeline


def one_cycle(
    optimizer: torch.optim.Optimizer, schedule: Schedule, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule of linear warm-up over a share `warmup` of the steps, then cosine decay to 1 % of the peak."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rates,
        total_steps=schedule.steps + 1,
        pct_start=warmup,
        final_div_factor=100 / 25,
        cycle_momentum=False,
    )


def train(
    accelerator: Accelerator,
    run: Path,
    schedule: Schedule,
    step: Callable[[int], dict[str, torch.Tensor]],
    sample: Callable[[Path], None],
) -> None:
    """Train from the last checkpoint, or from the start if there is none, up to `schedule.steps`.

    Every 50 steps, the means of the logged scalars are appended to `log.jsonl`. Every `save_every` steps, and at the
    end, the state is saved in `state`, and samples are written to `samples/STEP.png`.

    Args:
        accelerator: saves everything that it has prepared or that is registered with it.
        run: the run's directory.
        schedule: when to stop and to save.
        step: takes the optimizer step of an index, which seeds its randomness, and returns scalars to log.
        sample: writes samples to the given file.
    """
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    state, log = run / "state", run / "log.jsonl"
    (run / "samples").mkdir(parents=True, exist_ok=True)
    if state.exists():
        accelerator.load_state(str(state))
    totals: dict[str, torch.Tensor] = {}
    since, started = progress.step, time.monotonic()
    while progress.step < schedule.steps:
        for name, value in step(progress.step).items():
            totals[name] = totals[name] + value if name in totals else value.clone()
        progress.step += 1
        if progress.step % 50 == 0:
            count = progress.step - since
            line = {"step": progress.step, "seconds_a_step": (time.monotonic() - started) / count}
            line |= {name: float(total) / count for name, total in totals.items()}
            with log.open("a") as file:
                file.write(json.dumps({key: round(value, 5) for key, value in line.items()}) + "\n")
            totals, since, started = {}, progress.step, time.monotonic()
        if progress.step % schedule.save_every == 0 or progress.step == schedule.steps:
            accelerator.save_state(str(state))
            sample(run / "samples" / f"{progress.step:06d}.png")
