"""Walk the guided base model from many noises and keep what it passes at the distilled plan's noise levels.

`python -m training.trajectories training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`

Student and bridge both learn from these: the one to make the same way in few steps, the other to bring the few
large steps of a hybrid plan's base stage back onto it.
"""

from __future__ import annotations

import torch

from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.lib.loop import load_pipeline, make_accelerator, parse_arguments, read_config
from training.lib.prompts import Prompts
from training.lib.sampling import integrate
from training.lib.teacher import Teacher, draw_trajectories, grid_of, teacher_sigmas
from training.lib.text import Texts


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments(__doc__, "pipeline", "run")
    config = read_config(arguments.config, "trajectories")
    accelerator = make_accelerator()
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    grid = grid_of(config)
    tokens = grid[0] * grid[1]
    plan = StageSpec(name="distilled", sigma_start=1.0, sigma_end=0.0, **config["levels"])
    levels = stage_sigmas(plan, pipeline.scheduler, tokens)
    sigmas, marks = teacher_sigmas(pipeline.scheduler, levels.tolist(), config["steps"], tokens)
    teacher = Teacher(pipeline.transformer, grid, config["guidance_scale"])

    def walk(noise: torch.Tensor, texts: Texts) -> list[torch.Tensor]:
        trail = integrate(teacher.velocity(texts), noise, sigmas)
        return [trail[mark] for mark in marks]

    prompts = Prompts.read(config)
    draw_trajectories(accelerator, pipeline, prompts, config, levels, walk).save(arguments.run)


if __name__ == "__main__":
    main()
