"""Train the bridge: a LoRA that takes a latent from where the base stage ends to where the distilled stage starts.

`python -m training.bridge training/scenes.yaml PIPELINE TRAJECTORIES DISTILLED_LORA RUN`, the last four directories

The base stage of a hybrid plan takes few, large Euler steps, so its latent is off the model's true trajectory. The
teacher's trajectories, in many small steps, supply the targets. For the same noise and prompts, the bridge's input is
the latent where the plan's base stage ends, and its target is the teacher's latent where the bridge ends. Because both
come from the same noise, the bridge preserves a seed's composition, and with it the base model's diversity and
guidance.

Some of the trajectories have a negative prompt. A bridge that reads it (`StageSpec.reads_negative`) learns to follow
it in one evaluation, where guidance takes two. A bridge that does not read it still learns to keep out what the base
stage has removed.

After this regression, distribution matching (`training.lib.matching`) makes the clean latents that the bridge predicts
likely under the guided base model. The student is trained in the same way, so it continues from latents such as it
knows.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from backends import get_backend
from stages.pipeline import Pipeline
from stages.plan import read_plans
from stages.sigmas import stage_sigmas
from training.lib.adapters import active, save_lora
from training.lib.loop import begin, load_pipeline, train
from training.lib.matching import Samples, prepare
from training.lib.recording import Recorded, Tensors
from training.lib.sampling import model_config, sample_grid
from training.lib.teacher import Trajectories, hand_over
from training.lib.text import Text
from training.lib.velocity import conditional, integrate


def main() -> None:
    """Train, and write the LoRA as `lora` in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "bridge", "pipeline", "trajectories", "distilled", "run")
    device = accelerator.device
    backend = get_backend(device.type)
    plan = read_plans(Path(config["plans"]))[config["plan"]]
    *before, bridge, last = plan.stages
    if last.adapter is None:
        raise ValueError(f"{config['plans']}: the last stage of {config['plan']} must have an adapter")
    loras = {"bridge": arguments.run / "lora", last.adapter: arguments.distilled}
    taught = Trajectories.load(arguments.trajectories)
    target_level = taught.level(bridge.sigma_end)
    targets = taught.latents[:, target_level].to(device)
    model = model_config(arguments.pipeline, size=taught.size)
    starts = hand_over(Pipeline(model, backend), plan, len(before), taught).to(device)

    pipeline = load_pipeline(arguments.pipeline, device)
    texts = taught.texts(pipeline, config["text_length"])
    sigmas = stage_sigmas(bridge, pipeline.scheduler, taught.latents.shape[2])
    matching, scheduler = prepare(accelerator, pipeline.transformer, "bridge", config, schedule)
    transformer, lora = matching.transformer, matching.lora
    del pipeline  # frees the text encoder, whose memory sampling needs

    def reach(start: torch.Tensor, target: torch.Tensor, *text: torch.Tensor) -> Tensors:
        """Compute gradients of the distance to the teacher's latent where the bridge ends."""
        with accelerator.autocast(), active(transformer, "bridge"):
            reached = integrate(conditional(transformer, Text(*text), taught.grid), start, sigmas)
        # In units of velocity, so that it does not depend on the length of the bridge.
        loss = F.mse_loss(reached, target) / (bridge.sigma_start - bridge.sigma_end) ** 2
        lora.backward(accelerator, loss)
        return (loss.detach(),)

    reached_once = Recorded(reach)

    def regress(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take a step of regression on the teacher's trajectories."""
        text = texts[rows].read_by(bridge)
        (loss,) = reached_once(starts[rows].float(), targets[rows].float(), text.embeds, text.mask)
        lora.step()
        return {"regression": loss}

    def match(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Take a step of distribution matching on the clean latents that the bridge's last step predicts."""
        text = texts[rows].read_by(bridge)
        with torch.no_grad(), accelerator.autocast(), active(transformer, "bridge"):
            velocity = conditional(transformer, text, taught.grid)
            latents = integrate(velocity, starts[rows].float(), sigmas[:-1])
        return matching.update(Samples(latents, float(sigmas[-2]), text, texts[rows], taught.grid), generator)

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
        rows = torch.tensor([rng.randrange(len(taught.prompts)) for _ in range(schedule.batch_size)]).to(device)
        losses = regress(rows) if index < config["regression_steps"] else match(rows, generator)
        scheduler.step()
        return losses

    def sample(path: Path) -> None:
        unwrapped = accelerator.unwrap_model(transformer)
        save_lora(unwrapped, "bridge", arguments.run / "lora", torch.bfloat16)
        sample_grid(model_config(arguments.pipeline, loras), backend, plan.stages, path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
