"""Train the two LoRAs of a hybrid plan's tail on what reaches them: `bridge` and, from the student on, `finish`.

`python -m training.tail training/scenes.yaml PIPELINE DISTILLED_LORA BRIDGE_LORA RUN`, all four directories

From where base leaves an image, the guided base model goes on in many steps; bridge and finish must get there in one
each. The way is an ordinary differential equation's, so that there is one right answer; but where a network cannot
foresee each hair, errors of latents are least without any. So the image's contrast by place and direction counts as
well (`training.lib.contrast`). Attention guidance, if the plan's steps have it, is left out of the training: it works
by going further than their own answers.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from stages.families.qwen_image.autoencoder import QwenImageAutoencoder
from stages.plan import read_plans
from stages.sigmas import stage_sigmas
from training.lib.adapters import Lora, active, lora_parameters, save_lora
from training.lib.contrast import contrast
from training.lib.loop import begin, load_pipeline, one_cycle, train
from training.lib.prompts import Prompts
from training.lib.sampling import integrate, of_stage, run_stages, sample_grid
from training.lib.teacher import Teacher, Trajectories, draw_trajectories, grid_of, teacher_sigmas
from training.lib.text import Texts


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "tail", "pipeline", "distilled", "bridge", "run")
    device, length = accelerator.device, config["pairs"]["text_length"]
    pipeline = load_pipeline(arguments.pipeline, device)
    pipeline.transformer.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    autoencoder = QwenImageAutoencoder(pipeline.vae)
    pipeline.load_lora_weights(arguments.bridge, adapter_name="bridge")
    pipeline.load_lora_weights(arguments.distilled, adapter_name="finish")
    weights = config["error_weights"]
    parameters = [parameter for name in weights for parameter in lora_parameters(pipeline.transformer, name)]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    transformer, optimizer, scheduler = accelerator.prepare(
        pipeline.transformer, optimizer, one_cycle(optimizer, schedule)
    )
    loras = Lora("tail", parameters, optimizer)
    plan = read_plans(Path(config["plans"]))[config["plan"]]
    before = [stage for stage in plan.stages if stage.adapter not in weights]
    tail = [stage.model_copy(update={"attention_guidance": None}) for stage in plan.stages if stage.adapter in weights]
    grid = grid_of(config["pairs"])
    tokens = grid[0] * grid[1]
    levels = [tail[0].sigma_start, *(stage.sigma_end for stage in tail)]
    sigmas, marks = teacher_sigmas(pipeline.scheduler, levels, config["teacher_steps"], tokens)

    teacher = Teacher(pipeline.transformer, grid, config["guidance_scale"])

    def walk(noise: torch.Tensor, texts: Texts) -> list[torch.Tensor]:
        """Where the plan hands over, and where the teacher is at each end of a stage from there."""
        handed_over = run_stages(pipeline, before, noise, texts, grid)
        with active(pipeline.transformer, None):
            trail = integrate(teacher.velocity(texts), handed_over, sigmas)
        return [trail[mark] for mark in marks]

    kept = arguments.run / "pairs"
    if not kept.exists():
        prompts = Prompts.read(config)
        draw_trajectories(accelerator, pipeline, prompts, config["pairs"], torch.tensor(levels), walk).save(kept)
    taught = Trajectories.load(kept)
    every = taught.texts(pipeline, length)
    with torch.no_grad():
        ends = taught.latents[:, -1].float().split(schedule.batch_size)
        contrasts = torch.cat([contrast(autoencoder.decode(end, grid)[:, :, None]).cpu() for end in ends])

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        rows = [rng.randrange(len(taught.prompts)) for _ in range(schedule.batch_size)]
        texts = every[torch.tensor(rows).to(device)]
        reached, *ends = taught.latents[rows].float().to(device).unbind(1)
        error = torch.zeros((), device=device)
        with accelerator.autocast():
            for stage, end in zip(tail, ends, strict=True):
                velocity = of_stage(transformer, stage, texts, grid)
                with active(transformer, stage.adapter):
                    reached = integrate(velocity, reached, stage_sigmas(stage, pipeline.scheduler, tokens))[-1]
                in_velocities = F.mse_loss(reached, end) / (stage.sigma_start - stage.sigma_end) ** 2
                error = error + weights[stage.adapter] * in_velocities
        decoded = slice(config["decoded"])
        drawn = contrast(autoencoder.decode(reached[decoded], grid)[:, :, None])
        blur = (drawn - contrasts[rows[decoded]].to(drawn)).abs().mean()
        loras.backward(accelerator, error + config["contrast_weight"] * blur)
        loras.step()
        scheduler.step()
        return {"error": error.detach(), "contrast": blur.detach()}

    def sample(path: Path) -> None:
        for name in weights:
            save_lora(accelerator.unwrap_model(transformer), name, arguments.run / name, torch.bfloat16)
        sample_grid(pipeline, plan.stages, path, length)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
