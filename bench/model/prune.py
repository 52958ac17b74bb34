"""Find transformer blocks that a stage can skip, and write plans that skip the 1, 2, ... least important ones.

The importance of a block is the relative change of the stage's final latent when that block is skipped, averaged over
calibration prompts. Blocks are dropped one at a time, and the others' importance is measured again after each.
`python -m bench quality --methods FILE` then measures the plans' quality.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from bench.model.calibration import Calibration, add_calibration_arguments
from stages.packet import LatentPacket
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan


def without(plan: Plan, position: int, blocks: frozenset[int]) -> Plan:
    """Return `plan` with these `blocks` skipped in stage number `position`."""
    stages = list(plan.stages)
    stages[position] = stages[position].model_copy(update={"skip_blocks": blocks})
    return plan.model_copy(update={"stages": tuple(stages)})


def importance(
    pipeline: Pipeline, plan: Plan, position: int, packets: Sequence[LatentPacket], candidates: Sequence[int]
) -> dict[int, float]:
    """Measure the importance of blocks, given those that a stage skips already.

    Args:
        pipeline: the model.
        plan: the plan; its stage may skip blocks.
        position: index of the stage.
        packets: calibration images of one grid, at the start of that stage.
        candidates: indices of the blocks to measure.

    Returns:
        Relative change of the stage's final latent by block, compared with skipping none.
    """
    whole = without(plan, position, frozenset())
    truths = pipeline.denoiser.denoise(packets, whole)

    def moved(block: int) -> float:
        pruned = without(plan, position, plan.stages[position].skip_blocks | {block})
        changes = [
            (packet.latent - truth.latent).norm() / truth.latent.norm()
            for packet, truth in zip(pipeline.denoiser.denoise(packets, pruned), truths, strict=True)
        ]
        return float(torch.stack(changes).mean())

    return {block: moved(block) for block in candidates}


def prune(pipeline: Pipeline, plan: Plan, position: int, prompted: Sequence[Prompted], drop: int) -> list[Plan]:
    """Drop blocks from a stage one by one, the least important first, and print what is measured.

    Args:
        pipeline: the model.
        plan: the plan to prune.
        position: index of the stage.
        prompted: calibration images.
        drop: number of blocks to drop.

    Returns:
        The plans that skip 1, 2, ..., `drop` blocks.
    """
    packets = pipeline.enter(plan, prompted)
    for _ in range(position):
        packets = pipeline.denoiser.denoise(packets, plan)
    plans: list[Plan] = []
    for _ in range(drop):
        stage = plan.stages[position]
        left = [block for block in range(pipeline.denoiser.blocks) if block not in stage.skip_blocks]
        measured = importance(pipeline, plan, position, packets, left)
        print(f"{stage.name} without {sorted(stage.skip_blocks)}: {_rounded(measured)}", flush=True)
        least = min(measured, key=lambda block: measured[block])
        plan = without(plan, position, stage.skip_blocks | {least})
        plans.append(plan)
    return plans


def _rounded(measured: dict[int, float]) -> str:
    return ", ".join(f"block {block} {value:.3f}" for block, value in measured.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("output", type=Path, help="file of methods for `python -m bench quality --methods`")
    add_calibration_arguments(parser, prompts=32)
    parser.add_argument("--plan", default="hybrid", help="name of one of the config's plans")
    parser.add_argument("--stage", type=int, default=0, help="index of the plan's stage, from 0")
    parser.add_argument("--drop", type=int, default=2, help="number of blocks to drop")


def run(arguments: argparse.Namespace) -> None:
    """Write the plan and its pruned versions as a file of methods; raises SystemExit for arguments out of range."""
    on = Calibration.load(arguments)
    pipeline, plan, position = on.pipeline, on.plan, arguments.stage
    if not 0 <= position < len(plan.stages):
        raise SystemExit(f"--stage must be 0 to {len(plan.stages) - 1} for plan {plan.name}, not {position}")
    if not 1 <= arguments.drop < pipeline.denoiser.blocks:
        raise SystemExit(f"--drop must be 1 to {pipeline.denoiser.blocks - 1}, not {arguments.drop}")
    plans = {plan.name: plan}
    for pruned in prune(pipeline, plan, position, on.prompted, arguments.drop):
        skipped = ", ".join(map(str, sorted(pruned.stages[position].skip_blocks)))
        plans[f"{plan.name}, stage {position} without {skipped}"] = pruned
    stages = {name: made.model_dump(mode="json", exclude_defaults=True)["stages"] for name, made in plans.items()}
    arguments.output.write_text(yaml.safe_dump({"pruned": stages}, sort_keys=False, width=1000))
