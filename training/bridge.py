"""Train the bridge: a LoRA that carries a latent from the base stage to where the distilled stage expects it.

`python -m training.bridge training/scenes.yaml PIPELINE TRAJECTORIES DISTILLED_LORA RUN`, all four directories

A hybrid plan's base stage takes few, large steps and so ends beside the model's true trajectory. The teacher's
trajectories say where it should be: from the same noise and prompt, the bridge's input is what the coarse base
stage leaves at sigma_a and its target is the point of the fine trajectory at sigma_b. Pairs come from one noise,
so that the seed's composition, and with it the base model's diversity and guidance, is what is learned. Some of the
trajectories avoid a negative prompt: a bridge that reads it (`StageSpec.reads_negative`) goes on avoiding it, where
guidance would take a second evaluation; one that does not learns at least to leave away what base has taken away.
Then distribution matching (`training.matching`) makes the clean latent that it foresees one that the base model finds
likely, guided by both prompts, as it does the student's: so that the student goes on from what it knows.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from stages.plan import read_plans
from stages.sigmas import stage_sigmas
from training.adapters import active, save_lora
from training.loop import begin, load_pipeline, train
from training.matching import Samples, prepare
from training.prompts import Prompts, Texts
from training.sampling import integrate, of_stage, run_stages, sample_grid
from training.trajectories import Trajectories


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "bridge", "pipeline", "trajectories", "distilled", "run")
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    pipeline.load_lora_weights(arguments.distilled, adapter_name="distilled")
    lora, scheduler, matching = prepare(accelerator, pipeline.transformer, "bridge", config, schedule)
    transformer = matching.transformer
    prompts = Prompts(pipeline)
    taught = Trajectories.load(arguments.trajectories)
    plan = read_plans(Path(config["plans"]))[config["plan"]]
    *before, bridge, _ = plan.stages
    tokens = taught.latents.shape[2]
    sigmas = stage_sigmas(bridge, pipeline.scheduler, tokens)
    target_level = taught.level(bridge.sigma_end)

    @torch.no_grad()
    def coarse(rows: list[int]) -> torch.Tensor:
        """Where base leaves the trajectories' noises, in bfloat16."""
        texts = taught.texts(prompts, rows)
        with accelerator.autocast():
            noise = taught.latents[rows, 0].float().to(accelerator.device)
            return run_stages(pipeline, before, noise, texts, taught.grid).bfloat16().cpu()

    every = list(range(len(taught.prompts)))
    starts = torch.cat([coarse(every[first : first + 64]) for first in range(0, len(every), 64)])

    def regress(rows: list[int], texts: Texts) -> dict[str, torch.Tensor]:
        """Reach the teacher's trajectory where the bridge ends."""
        target = taught.latents[rows, target_level].float().to(accelerator.device)
        with accelerator.autocast(), active(transformer, "bridge"):
            velocity = of_stage(transformer, bridge, texts, taught.grid)
            reached = integrate(velocity, starts[rows].float().to(accelerator.device), sigmas)[-1]
        # In units of velocity, whatever the length of the bridge.
        loss = F.mse_loss(reached, target) / (bridge.sigma_start - bridge.sigma_end) ** 2
        lora.descend(accelerator, loss)
        return {"regression": loss.detach()}

    def match(rows: list[int], texts: Texts, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Make what the bridge's last step foresees likely."""
        with accelerator.autocast(), active(transformer, "bridge"):
            velocity = of_stage(transformer, bridge, texts, taught.grid)
            with torch.no_grad():
                latents = integrate(velocity, starts[rows].float().to(accelerator.device), sigmas[:-1])[-1]
            clean = latents - sigmas[-2] * velocity(latents, sigmas[-2].expand(len(rows)))
        samples = Samples(clean, float(sigmas[-2]), texts.embeds, texts.negatives, velocity, taught.grid)
        return matching.update(lora, samples, generator)

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rows = [rng.randrange(len(every)) for _ in range(schedule.batch_size)]
        texts = taught.texts(prompts, rows)
        losses = regress(rows, texts) if index < config["regression_steps"] else match(rows, texts, generator)
        scheduler.step()
        return losses

    def sample(path: Path) -> None:
        unwrapped = accelerator.unwrap_model(transformer)
        save_lora(unwrapped, "bridge", arguments.run / "lora", torch.bfloat16)
        sample_grid(pipeline, plan.stages, path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
