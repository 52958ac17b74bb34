"""Distil the guided base model into a LoRA that needs few steps and no guidance.

`python -m training.distilled training/scenes.yaml PIPELINE_DIRECTORY TRAJECTORY_DIRECTORY RUN_DIRECTORY`

First the student regresses the teacher's trajectories; then distribution matching (`training.matching`) sharpens it.
As in trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674) the student walks its own few steps, so that
it trains on the latents that it will meet; or, as after the base stage of a hybrid plan, it takes over from the
teacher's trajectory. Student and critic are two LoRAs on the one set of base weights.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from stages.encode import EMPTY_PROMPT
from stages.model import PIXELS_PER_TOKEN
from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.adapters import active, save_lora
from training.loop import begin, load_pipeline, train
from training.matching import Samples, prepare
from training.prompts import Prompts
from training.sampling import conditional, integrate, sample_grid
from training.trajectories import Trajectories


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "distilled", "pipeline", "trajectories", "run")
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    lora, scheduler, matching = prepare(accelerator, pipeline.transformer, "distilled", config, schedule)
    transformer = matching.transformer
    prompts = Prompts.read(pipeline, config)
    (negative,) = prompts.embed([EMPTY_PROMPT])
    taught = Trajectories.load(arguments.trajectories)
    plain = [row for row, negative_prompt in enumerate(taught.negative_prompts) if negative_prompt == EMPTY_PROMPT]
    plan = StageSpec(
        name="distilled", sigma_start=1.0, sigma_end=0.0, steps=4, shift=config["shift"], adapter="distilled"
    )

    def plan_sigmas(steps: int, tokens: int) -> torch.Tensor:
        return stage_sigmas(plan.model_copy(update={"steps": steps}), pipeline.scheduler, tokens)

    levels = [
        [taught.level(sigma) for sigma in plan_sigmas(steps, taught.latents.shape[2]).tolist()]
        for steps in config["steps"]
    ]
    strides = [pair for passed in levels for pair in itertools.pairwise(passed)]

    def regress(rng: Random) -> dict[str, torch.Tensor]:
        """Follow the teacher over one step of one of the plans."""
        rows = torch.tensor(rng.choices(plain, k=schedule.batch_size))  # the student will see no negative prompts
        level, following = torch.tensor([rng.choice(strides) for _ in rows]).unbind(1)
        start, end = taught.latents[rows, level].float(), taught.latents[rows, following].float()
        sigma, after = taught.sigmas[level], taught.sigmas[following]
        target = ((end - start) / (after - sigma)[:, None, None]).to(accelerator.device)
        embeds = prompts.embed([taught.prompts[row] for row in rows])
        with accelerator.autocast(), active(transformer, "distilled"):
            velocity = conditional(transformer, embeds, taught.grid)(start.to(accelerator.device), sigma)
        loss = F.mse_loss(velocity, target)
        lora.descend(accelerator, loss)
        return {"regression": loss.detach()}

    def match(rng: Random, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One update of the student and one of the critic, on the same samples."""
        takes_over = rng.random() < config["take_over"]
        width, height = rng.choice(config["sizes"])
        grid = taught.grid if takes_over else (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        tokens = grid[0] * grid[1]
        count = max(1, schedule.batch_size * config["tokens"] // tokens)
        rows = rng.choices(plain, k=count)
        embeds = prompts.embed([taught.prompts[row] for row in rows] if takes_over else prompts.draw(rng, count))
        noise = torch.randn(count, tokens, transformer.config.in_channels, generator=generator)

        # The way to one of the student's steps, its own or the teacher's, and the clean latent that it foresees there.
        sigmas = plan_sigmas(rng.choice(config["steps"]), tokens)
        index = rng.randrange(len(sigmas) - 1)
        with accelerator.autocast(), active(transformer, "distilled"):
            walk = conditional(transformer, embeds, grid)
            if takes_over:
                latents = taught.latents[rows, taught.level(float(sigmas[index]))].float().to(accelerator.device)
            else:
                with torch.no_grad():
                    latents = integrate(walk, noise.to(accelerator.device), sigmas[: index + 1])[-1]
            clean = latents - sigmas[index] * walk(latents, sigmas[index].expand(count))

        samples = Samples(clean, float(sigmas[index]), embeds, [negative] * count, walk, grid)
        return matching.update(lora, samples, generator)

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        losses = regress(rng) if index < config["regression_steps"] else match(rng, generator)
        scheduler.step()
        return losses

    def sample(path: Path) -> None:
        unwrapped = accelerator.unwrap_model(transformer)
        save_lora(unwrapped, "distilled", arguments.run / "lora", torch.bfloat16)
        sample_grid(pipeline, [plan], path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
