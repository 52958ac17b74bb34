"""Fine-tune the LoRAs of a hybrid plan's last stages end to end: `bridge`, and `finish`, which starts as the student.

`python -m training.tail training/scenes.yaml PIPELINE DISTILLED_LORA BRIDGE_LORA RUN`, the last four directories

The teacher is the guided base model, which continues in many steps from the latent where the plan's base stage ends.
Bridge and finish learn to reach its latents in one step each. The teacher follows an ordinary differential equation, so
every start has a single target; but a network that cannot predict every hair has the least error if it draws none. The
loss therefore also compares the decoded images' local contrast (`training.lib.contrast`). Attention guidance of these
stages is left out of training, because it extrapolates beyond what the LoRAs predict.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from backends import get_backend
from stages.families.qwen_image.autoencoder import QwenImageAutoencoder
from stages.pipeline import Pipeline
from stages.plan import Plan, read_plans
from stages.sigmas import stage_sigmas
from training.lib.adapters import Lora, active, lora_parameters, save_lora
from training.lib.contrast import contrast
from training.lib.loop import begin, load_pipeline, one_cycle, train
from training.lib.prompts import Prompts
from training.lib.sampling import model_config, sample_grid
from training.lib.teacher import Trajectories, draw_trajectories, size_of, teacher_stages
from training.lib.velocity import conditional, integrate


def main() -> None:
    """Train, and write the LoRAs as directories of their names in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "tail", "pipeline", "distilled", "bridge", "run")
    device, length = accelerator.device, config["pairs"]["text_length"]
    backend = get_backend(device.type)
    weights = config["error_weights"]
    plan = read_plans(Path(config["plans"]))[config["plan"]]
    before = [stage for stage in plan.stages if stage.adapter not in weights]
    tail = [stage.model_copy(update={"attention_guidance": None}) for stage in plan.stages if stage.adapter in weights]
    levels = [tail[0].sigma_start, *(stage.sigma_end for stage in tail)]

    loras = {"bridge": arguments.bridge, "finish": arguments.distilled}
    kept = arguments.run / "pairs"
    if not kept.exists():
        model = model_config(arguments.pipeline, loras, size_of(config["pairs"]))
        teacher = teacher_stages(levels, config["teacher_steps"], config["guidance_scale"], tail[0].name)
        way = Plan(stages=(*before, *teacher))
        drawn = draw_trajectories(Pipeline(model, backend), way, Prompts.read(config), config["pairs"], len(before))
        drawn.save(kept)
    taught = Trajectories.load(kept)
    passed = [taught.level(sigma) for sigma in levels]

    pipeline = load_pipeline(arguments.pipeline, device)
    pipeline.transformer.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    for name, directory in loras.items():
        pipeline.load_lora_weights(directory, adapter_name=name)
    parameters = [parameter for name in weights for parameter in lora_parameters(pipeline.transformer, name)]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    transformer, optimizer, scheduler = accelerator.prepare(
        pipeline.transformer, optimizer, one_cycle(optimizer, schedule)
    )
    trained = Lora("tail", parameters, optimizer)
    autoencoder = QwenImageAutoencoder(pipeline.vae)
    every = taught.texts(pipeline, length)
    sigmas = [stage_sigmas(stage, pipeline.scheduler, taught.latents.shape[2]) for stage in tail]
    del pipeline  # frees the text encoder, whose memory sampling needs
    with torch.no_grad():
        images = taught.latents[:, passed[-1]].float().split(schedule.batch_size)
        contrasts = torch.cat([contrast(autoencoder.decode(image, taught.grid)[:, :, None]).cpu() for image in images])

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        rows = [rng.randrange(len(taught.prompts)) for _ in range(schedule.batch_size)]
        texts = every[torch.tensor(rows).to(device)]
        reached, *ends = taught.latents[rows][:, passed].float().to(device).unbind(1)
        error = torch.zeros((), device=device)
        with accelerator.autocast():
            for stage, along, end in zip(tail, sigmas, ends, strict=True):
                with active(transformer, stage.adapter):
                    reached = integrate(conditional(transformer, texts.read_by(stage), taught.grid), reached, along)
                in_velocities = F.mse_loss(reached, end) / (stage.sigma_start - stage.sigma_end) ** 2
                error = error + weights[stage.adapter] * in_velocities
        decoded = slice(config["decoded"])
        drawn = contrast(autoencoder.decode(reached[decoded], taught.grid)[:, :, None])
        blur = (drawn - contrasts[rows[decoded]].to(drawn)).abs().mean()
        trained.backward(accelerator, error + config["contrast_weight"] * blur)
        trained.step()
        scheduler.step()
        return {"error": error.detach(), "contrast": blur.detach()}

    def sample(path: Path) -> None:
        saved = {name: arguments.run / name for name in weights}
        for name, directory in saved.items():
            save_lora(accelerator.unwrap_model(transformer), name, directory, torch.bfloat16)
        sample_grid(model_config(arguments.pipeline, loras | saved), backend, plan.stages, path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
