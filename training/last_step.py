"""Train the distilled LoRA further on what it does last in a hybrid plan: one step from the hand-over to the image.

`python -m training.last_step training/scenes.yaml PIPELINE DISTILLED_LORA BRIDGE_LORA RUN`, all four directories

From where base and bridge leave an image, the guided base model goes on in many steps; the student must get there in
one. The way is an ordinary differential equation's, so that there is one right answer; but where a network cannot
foresee each hair, errors of latents are least without any. So the image's contrast by place and direction counts as
well (`training.decoder`). At all other noise levels the student stays as it was, or as it was on another base: that is
how it moves to a base that was trained further. Attention guidance, if the plan's step has it, is left out of the
training: it works by going further than the student's own answer.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from stages.decode import decode_pixels
from stages.plan import StageSpec, presets
from stages.vae import convolve_images
from training.adapters import Lora, active, lora_parameters, save_lora
from training.decoder import contrast
from training.loop import begin, load_pipeline, one_cycle, train
from training.prompts import Prompts, Texts
from training.sampling import conditional, run_stages, sample_grid
from training.trajectories import Trajectories, draw_trajectories, grid_of


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "last_step", "pipeline", "distilled", "bridge", "run")
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    pipeline.transformer.requires_grad_(False)
    convolve_images(pipeline.vae).requires_grad_(False)
    pipeline.load_lora_weights(arguments.bridge, adapter_name="bridge")
    pipeline.load_lora_weights(arguments.distilled, adapter_name="distilled")
    former = pipeline
    if config["made_on"]:
        former = load_pipeline(Path(config["made_on"]), accelerator.device)
        former.transformer.requires_grad_(False)
    former.load_lora_weights(arguments.distilled, adapter_name="before")
    parameters = lora_parameters(pipeline.transformer, "distilled")
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    transformer, optimizer, scheduler = accelerator.prepare(
        pipeline.transformer, optimizer, one_cycle(optimizer, schedule)
    )
    lora = Lora("distilled", parameters, optimizer)
    prompts, former_prompts = Prompts.read(pipeline, config), Prompts(former)
    plan = presets()[config["plan"]]
    *before, last = plan.stages
    grid = grid_of(config["pairs"])
    rest = StageSpec(
        name="base",
        sigma_start=last.sigma_start,
        sigma_end=0.0,
        steps=config["teacher_steps"],
        guidance_scale=config["guidance_scale"],
    )

    def walk(noise: torch.Tensor, texts: Texts) -> list[torch.Tensor]:
        """Where the plan hands over, and where the teacher goes from there."""
        handed_over = run_stages(pipeline, before, noise, texts, grid)
        return [handed_over, run_stages(pipeline, [rest], handed_over, texts, grid)]

    kept = arguments.run / "pairs"
    if not kept.exists():
        levels = torch.tensor([last.sigma_start, 0.0])
        channels = transformer.config.in_channels
        draw_trajectories(accelerator, prompts, config["pairs"], channels, levels, walk).save(kept)
    taught = Trajectories.load(kept)
    with torch.no_grad():
        ends = taught.latents[:, 1].float().split(schedule.batch_size)
        contrasts = torch.cat([contrast(decode_pixels(pipeline.vae, end, grid)).cpu() for end in ends])

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rows = [rng.randrange(len(taught.prompts)) for _ in range(schedule.batch_size)]
        texts = taught.texts(prompts, rows)
        start, end = taught.latents[rows].float().to(accelerator.device).unbind(1)
        sigma = taught.sigmas[0].expand(len(rows)).to(start)

        # Other levels, with noise on what the teacher made.
        others = slice(round(config["kept_share"] * len(rows)))
        elsewhere = torch.rand(others.stop, generator=generator).to(start)
        noise = torch.randn(end[others].shape, generator=generator).to(start)
        noisy = torch.lerp(end[others], noise, elsewhere[:, None, None])
        with accelerator.autocast():
            with torch.no_grad(), active(former.transformer, "before"):
                embeds = texts.embeds[others]
                if former is not pipeline:
                    embeds = former_prompts.embed([taught.prompts[row] for row in rows[others]])
                as_before = conditional(former.transformer, embeds, grid)(noisy, elsewhere)
            with active(transformer, "distilled"):
                now = conditional(transformer, texts.embeds[others], grid)(noisy, elsewhere)
                foreseen = conditional(transformer, texts.embeds, grid)(start, sigma)
        clean = start - sigma[:, None, None] * foreseen
        decoded = slice(config["decoded"])
        drawn = contrast(decode_pixels(pipeline.vae, clean[decoded], grid))
        error = F.mse_loss(clean, end) / last.sigma_start**2  # in units of velocity
        blur = (drawn - contrasts[rows[decoded]].to(drawn)).abs().mean()
        away = F.mse_loss(now, as_before)
        with active(transformer, "distilled"):
            lora.descend(accelerator, error + config["contrast_weight"] * blur + config["kept_weight"] * away)
        scheduler.step()
        return {"error": error.detach(), "contrast": blur.detach(), "kept": away.detach()}

    def sample(path: Path) -> None:
        save_lora(accelerator.unwrap_model(transformer), "distilled", arguments.run / "lora", torch.bfloat16)
        sample_grid(pipeline, plan.stages, path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
