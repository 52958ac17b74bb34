"""Train transformer and text encoder by flow matching.

`python -m training.base training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from stages.plan import StageSpec
from training.data import SceneBatches, SizeShare
from training.loop import Schedule, load_pipeline, one_cycle, parse_arguments, read_config, train
from training.optimize import make_optimizers
from training.sampling import sample_grid

# Not for Muon: they face outward, or (modulation) cost it more than they gain.
OUTER_LAYERS = ("embed_tokens", "img_in", "txt_in", "proj_out", "norm_out", "time_text_embed", "_mod.")


def draw_sigmas(count: int, mean: float, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels (count,), Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator))


def main() -> None:
    arguments = parse_arguments(__doc__, "pipeline", "run")
    config = read_config(arguments.config, "base")
    schedule = Schedule(**config["schedule"])
    set_seed(schedule.seed)
    accelerator = Accelerator(mixed_precision="bf16")
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    batches = SceneBatches(pipeline.vae, [SizeShare(**size) for size in config["sizes"]], arguments.run, schedule.seed)

    model = torch.nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder.model})
    optimizers = make_optimizers(model, schedule, exclude=OUTER_LAYERS)
    schedulers = [one_cycle(optimizer, schedule) for optimizer in optimizers]
    ema = EMAModel(model.parameters(), decay=config["ema_decay"], use_ema_warmup=True, foreach=True)
    model, *movers = accelerator.prepare(model, *optimizers, *schedulers)
    accelerator.register_for_checkpointing(ema)

    def step(index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{schedule.seed} {index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        clean, captions, shape = batches.draw(rng, schedule.batch_size * config["tokens"])
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(len(clean), config["sigma_mean"], config["sigma_deviation"], generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with accelerator.autocast():
            embeds, mask = pipeline.encode_prompt(captions, device=accelerator.device)
            velocity = model["transformer"](
                hidden_states=noisy.to(accelerator.device),
                timestep=sigma.to(accelerator.device),
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[shape]] * len(clean),
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - clean).to(accelerator.device)).square().mean()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for mover in movers:
            mover.step()
        model.zero_grad()
        ema.step(model.parameters())
        return {"loss": loss.detach(), "norm": norm}

    def sample(path: Path) -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        sample_grid(
            pipeline, [StageSpec(name="base", steps=25, guidance_scale=4.0, sigma_start=1.0, sigma_end=0.0)], path
        )
        pipeline.save_pretrained(arguments.run / "pipeline")
        ema.restore(model.parameters())

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
