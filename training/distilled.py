"""Distil the guided base model into a LoRA that takes few steps and no guidance.

`python -m training.distilled training/scenes.yaml PIPELINE_DIRECTORY TRAJECTORY_DIRECTORY RUN_DIRECTORY`

The student is first trained by regression on the teacher's trajectories. Then the critic alone is trained on the
student's samples, and last both by distribution matching (`training.lib.matching`), which makes the samples sharp.

As in trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674), the student samples by its own few steps, so
that it is trained on the latents that it will see. In a share of the updates it starts from the teacher's trajectory
instead, as it does after the base stage of a hybrid plan. Student and critic are two LoRAs on the same base weights.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from backends import get_backend
from stages.families.qwen_image import EMPTY_PROMPT, PIXELS_PER_TOKEN
from stages.plan import StageSpec
from stages.sigmas import stage_sigmas
from training.lib.adapters import active, save_lora
from training.lib.loop import begin, load_pipeline, train
from training.lib.matching import Samples, prepare
from training.lib.prompts import Prompts
from training.lib.recording import Recorded, Tensors
from training.lib.sampling import model_config, sample_grid
from training.lib.teacher import Trajectories
from training.lib.text import Text, embed_pairs
from training.lib.velocity import evaluate, integrate


def main() -> None:
    """Train, and write the LoRA as `lora` in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "distilled", "pipeline", "trajectories", "run")
    device = accelerator.device
    backend = get_backend(device.type)
    pipeline = load_pipeline(arguments.pipeline, device)
    length = config["text_length"]
    taught = Trajectories.load(arguments.trajectories)
    latents, followed = taught.latents.to(device), taught.texts(pipeline, length)
    own_prompts = Prompts.read(config).draw(Random(schedule.seed), config["prompt_count"])
    own = embed_pairs(pipeline, own_prompts, [EMPTY_PROMPT] * len(own_prompts), length)
    # The student does not read negative prompts, so it learns from trajectories without one.
    plain = [row for row, negative_prompt in enumerate(taught.negative_prompts) if negative_prompt == EMPTY_PROMPT]
    matching, scheduler = prepare(accelerator, pipeline.transformer, "distilled", config, schedule)
    transformer, lora, flow_scheduler = matching.transformer, matching.lora, pipeline.scheduler
    del pipeline  # frees the text encoder, whose memory sampling needs
    plan = StageSpec(
        name="distilled", sigma_start=1.0, sigma_end=0.0, steps=4, shift=config["shift"], adapter="distilled"
    )

    def plan_sigmas(steps: int, tokens: int) -> torch.Tensor:
        return stage_sigmas(plan.model_copy(update={"steps": steps}), flow_scheduler, tokens)

    levels = [
        [taught.level(sigma) for sigma in plan_sigmas(steps, taught.latents.shape[2]).tolist()]
        for steps in config["steps"]
    ]
    strides = [pair for passed in levels for pair in itertools.pairwise(passed)]

    def follow(start: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, *text: torch.Tensor) -> Tensors:
        """Compute gradients of the error of the LoRA's velocity."""
        with accelerator.autocast(), active(transformer, "distilled"):
            loss = F.mse_loss(evaluate(transformer, start, sigma, Text(*text), taught.grid), target)
        lora.backward(accelerator, loss)
        return (loss.detach(),)

    @torch.no_grad()
    def go(grid: tuple[int, int], noisy: torch.Tensor, sigma: torch.Tensor, *text: torch.Tensor) -> Tensors:
        """Predict the student's velocity."""
        with accelerator.autocast(), active(transformer, "distilled"):
            return (evaluate(transformer, noisy, sigma, Text(*text), grid),)

    followed_once = Recorded(follow)
    grids = {(height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN) for width, height in config["sizes"]}
    gone = {grid: Recorded(partial(go, grid)) for grid in grids}

    def regress(rng: Random) -> dict[str, torch.Tensor]:
        """Take a step of regression, on one step of one of the plans for each image."""
        rows = torch.tensor(rng.choices(plain, k=schedule.batch_size))
        level, following = torch.tensor([rng.choice(strides) for _ in rows]).unbind(1)
        sigma, after = taught.sigmas[level].to(device), taught.sigmas[following].to(device)
        rows = rows.to(device)
        start, end = latents[rows, level.to(device)].float(), latents[rows, following.to(device)].float()
        text = followed.prompt[rows]
        (loss,) = followed_once(start, sigma, (end - start) / (after - sigma)[:, None, None], text.embeds, text.mask)
        lora.step()
        return {"regression": loss}

    def draw_samples(rng: Random, generator: torch.Generator) -> Samples:
        """Draw latents that one of the student's steps starts from, on its own trajectory or on the teacher's."""
        takes_over = rng.random() < config["take_over"]
        width, height = rng.choice(config["sizes"])
        grid = taught.grid if takes_over else (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        tokens = grid[0] * grid[1]
        count = max(1, schedule.batch_size * config["tokens"] // tokens)
        rows = torch.tensor(rng.choices(plain if takes_over else range(len(own_prompts)), k=count)).to(device)
        texts = (followed if takes_over else own)[rows]
        sigmas = plan_sigmas(rng.choice(config["steps"]), tokens)
        index = rng.randrange(len(sigmas) - 1)
        if takes_over:
            start = latents[rows, taught.level(float(sigmas[index]))].float()
        else:
            shape = (count, tokens, transformer.config.in_channels)
            noise = torch.randn(shape, generator=generator, device=device)
            text = (texts.prompt.embeds, texts.prompt.mask)
            start = integrate(lambda x, sigma: gone[grid](x, sigma, *text)[0], noise, sigmas[: index + 1])
        return Samples(start, float(sigmas[index]), texts.prompt, texts, grid)

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
        if index < config["regression_steps"]:
            losses = regress(rng)
        elif index < config["regression_steps"] + config["critic_steps"]:
            losses = matching.update_critic(draw_samples(rng, generator), generator)
        else:
            losses = matching.update(draw_samples(rng, generator), generator)
        scheduler.step()
        return losses

    def sample(path: Path) -> None:
        unwrapped = accelerator.unwrap_model(transformer)
        save_lora(unwrapped, "distilled", arguments.run / "lora", torch.bfloat16)
        served = model_config(arguments.pipeline, {"distilled": arguments.run / "lora"})
        sample_grid(served, backend, [plan], path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
