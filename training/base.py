"""Train transformer and text encoder by flow matching, with a head that names what is where.

`python -m training.base training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.training_utils import EMAModel

from stages.plan import StageSpec
from training.data import LABELS, NO_OBJECT, SceneBatches, SceneLatents, SizeShare, in_order
from training.loop import begin, load_pipeline, one_cycle, train
from training.optimize import make_optimizers
from training.sampling import sample_grid

# Not for Muon: they face outward, or (modulation) cost it more than they gain.
OUTER_LAYERS = ("embed_tokens", "img_in", "txt_in", "proj_out", "norm_out", "time_text_embed", "_mod.", "head.")


class ObjectHead(torch.nn.Module):
    """Reads object attributes from the image tokens of an inner block; thrown away after the training.

    Representation alignment (REPA, arXiv 2410.06940), with the scenes' true attributes in place of another
    network's features: the flow-matching loss alone, most of which is background, teaches shapes last.
    """

    def __init__(self, transformer: QwenImageTransformer2DModel, depth: int) -> None:
        super().__init__()
        self.read = torch.nn.Linear(transformer.inner_dim, sum(LABELS.values()))
        transformer.transformer_blocks[depth - 1].register_forward_hook(self._keep)

    def _keep(self, block: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._tokens = output[1]

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the last forward pass with `labels` (B, tokens, 3), over the tokens with an object."""
        labels = labels.to(self._tokens.device)
        shown = labels[..., 0] != NO_OBJECT
        logits = self.read(self._tokens[shown]).float().split(list(LABELS.values()), dim=-1)
        losses = [F.cross_entropy(part, truth) for part, truth in zip(logits, labels[shown].T, strict=True)]
        return torch.stack(losses).sum()


def draw_sigmas(count: int, mean: float, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels (count,), Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator, device=generator.device))


def encode_captions(pipeline: QwenImagePipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, length, width), padded on the right, and the mask (B, length) of what is no padding.

    What `encode_prompt` of the pipeline does, except that it takes the batch apart and pads it anew, row by row, which
    costs a device that is fast enough most of a step.
    """
    texts = [pipeline.prompt_template_encode.format(caption) for caption in captions]
    tokens = pipeline.tokenizer(texts, padding=True, return_tensors="pt").to(pipeline.text_encoder.device)
    hidden = pipeline.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1]
    start = pipeline.prompt_template_encode_start_idx
    return hidden[:, start:], tokens.attention_mask[:, start:].bool()


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "base", "pipeline", "run")
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    seed, workers = config["scenes_seed"], config["workers"]
    sets = [SceneLatents(pipeline.vae, SizeShare(**size), arguments.run, seed, workers) for size in config["sizes"]]
    draw = in_order(SceneBatches(sets, schedule.batch_size * config["tokens"], schedule.seed), workers)

    model = torch.nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder.model})
    head = ObjectHead(pipeline.transformer, config["head_depth"])
    trained = torch.nn.ModuleDict({"model": model, "head": head})
    optimizers = make_optimizers(trained, schedule, exclude=OUTER_LAYERS)
    schedulers = [one_cycle(optimizer, schedule) for optimizer in optimizers]
    ema = EMAModel(model.parameters(), decay=config["ema_decay"], use_ema_warmup=True, foreach=True)
    trained, *movers = accelerator.prepare(trained, *optimizers, *schedulers)
    accelerator.register_for_checkpointing(ema)

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(accelerator.device).manual_seed(schedule.seed + index)
        batch = draw(index)
        clean = batch.latents.to(accelerator.device, torch.float32)
        noise = torch.randn(clean.shape, generator=generator, device=accelerator.device)
        sigma = draw_sigmas(len(clean), config["sigma_mean"], config["sigma_deviation"], generator)
        with accelerator.autocast():
            embeds, mask = encode_captions(pipeline, batch.captions)
            velocity = model["transformer"](
                hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
                timestep=sigma,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[batch.shape]] * len(clean),
                return_dict=False,
            )[0]
            naming = head.loss(batch.labels)
        loss = F.mse_loss(velocity.float(), noise - clean)
        accelerator.backward(loss + config["head_weight"] * naming)
        norm = accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        for mover in movers:
            mover.step()
        trained.zero_grad()
        ema.step(model.parameters())
        return {"loss": loss.detach(), "naming": naming.detach(), "norm": norm}

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
