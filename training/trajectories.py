"""Sample many images by the guided base model, and keep their latents at the distilled plan's noise levels.

`python -m training.trajectories training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`

The student learns to follow these trajectories in few steps, and the bridge to return to them after the few, large
steps of a hybrid plan's base stage.
"""

from __future__ import annotations

from backends import get_backend
from stages.loading import load_scheduler
from stages.pipeline import Pipeline
from stages.plan import Plan, StageSpec
from stages.sigmas import stage_sigmas
from training.lib.loop import make_accelerator, parse_arguments, read_config
from training.lib.prompts import Prompts
from training.lib.sampling import model_config
from training.lib.teacher import draw_trajectories, size_of, teacher_stages


def main() -> None:
    """Draw the trajectories and write them to the run's directory."""
    arguments = parse_arguments(__doc__, "pipeline", "run")
    config = read_config(arguments.config, "trajectories")
    backend = get_backend(make_accelerator().device.type)
    model = model_config(arguments.pipeline, size=size_of(config))
    rows, columns = model.grid(size_of(config))
    student = StageSpec(name="distilled", sigma_start=1.0, sigma_end=0.0, **config["levels"])
    levels = stage_sigmas(student, load_scheduler(model), rows * columns).tolist()
    plan = Plan(stages=teacher_stages(levels, config["steps"], config["guidance_scale"]))
    draw_trajectories(Pipeline(model, backend), plan, Prompts.read(config), config).save(arguments.run)


if __name__ == "__main__":
    main()
