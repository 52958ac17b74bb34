"""Train transformer and text encoder by flow matching, with an auxiliary head that predicts the objects in the image.

`python -m training.base training/scenes.yaml PIPELINE_DIRECTORY RUN_DIRECTORY`
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.training_utils import EMAModel

from backends import get_backend
from stages.plan import StageSpec
from training.lib.data import LABELS, NO_OBJECT, SceneBatches, SceneLatents, SizeShare, in_order
from training.lib.loop import begin, load_pipeline, one_cycle, train
from training.lib.noise import draw_sigmas
from training.lib.optimize import make_optimizers
from training.lib.recording import Recorded, hold_gradients
from training.lib.sampling import model_config, sample_grid
from training.lib.text import encode, tokenize
from training.lib.velocity import evaluate

# Not trained by Muon: input and output layers, and modulation, for which it costs more time than it saves.
OUTER_LAYERS = ("embed_tokens", "img_in", "txt_in", "proj_out", "norm_out", "time_text_embed", "_mod.", "head.")


class ObjectHead(torch.nn.Module):
    """A linear head that predicts object attributes from the image tokens of an inner block; not part of the result.

    This is representation alignment (REPA, arXiv 2410.06940) with the scenes' true attributes in place of another
    network's features. The flow-matching loss is dominated by the background, and alone learns shapes late.
    """

    def __init__(self, transformer: QwenImageTransformer2DModel, depth: int) -> None:
        """Attach the head to the transformer's block number `depth`, counted from 1."""
        super().__init__()
        self.read = torch.nn.Linear(transformer.inner_dim, sum(LABELS.values()))
        transformer.transformer_blocks[depth - 1].register_forward_hook(self._keep)

    def _keep(self, block: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._tokens = output[1]

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of the last forward pass, summed over attributes, mean over tokens with an object.

        Args:
            labels: (batch, tokens, 3), see `object_labels`.
        """
        logits = self.read(self._tokens).float().split(list(LABELS.values()), dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), truth.flatten(), ignore_index=NO_OBJECT)
            for part, truth in zip(logits, labels.long().unbind(-1), strict=True)
        ]
        return torch.stack(losses).sum()


def main() -> None:
    """Train, and write the EMA weights as `pipeline` in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "base", "pipeline", "run")
    backend = get_backend(accelerator.device.type)
    pipeline = load_pipeline(arguments.pipeline, accelerator.device)
    seed, workers = config["scenes_seed"], config["workers"]
    sets = [SceneLatents(pipeline.vae, SizeShare(**size), arguments.run, seed, workers) for size in config["sizes"]]
    tokenize_captions = partial(tokenize, pipeline, length=config["text_length"])
    batches = SceneBatches(sets, schedule.batch_size * config["tokens"], schedule.seed, tokenize_captions)
    draw = in_order(batches, workers)
    device = accelerator.device
    latents, labels = ([getattr(of, name).to(device) for of in sets] for name in ("latents", "labels"))

    model = torch.nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder.model})
    head = ObjectHead(pipeline.transformer, config["head_depth"])
    trained = torch.nn.ModuleDict({"model": model, "head": head})
    optimizers = make_optimizers(trained, schedule, exclude=OUTER_LAYERS)
    schedulers = [one_cycle(optimizer, schedule) for optimizer in optimizers]
    ema = EMAModel(model.parameters(), decay=config["ema_decay"], use_ema_warmup=True, foreach=True)
    trained, *movers = accelerator.prepare(trained, *optimizers, *schedulers)
    accelerator.register_for_checkpointing(ema)
    moved = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    gradients = hold_gradients(moved)

    def descend(
        grid: tuple[int, int], clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tokens, mask, named = rest
        torch._foreach_zero_(gradients)
        with accelerator.autocast():
            text = encode(pipeline, tokens, mask)
            noisy = torch.lerp(clean, noise, sigma[:, None, None])
            velocity = evaluate(model["transformer"], noisy, sigma, text, grid)
            naming = head.loss(named)
        loss = F.mse_loss(velocity, noise - clean)
        accelerator.backward(loss + config["head_weight"] * naming)
        return loss.detach(), naming.detach()

    recorded = [Recorded(partial(descend, of.grid)) for of in sets]

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(schedule.seed + index)
        batch = draw(index)
        rows = batch.rows.to(device)
        clean = latents[batch.chosen][rows].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = draw_sigmas(len(clean), config["sigma_mean"], config["sigma_deviation"], generator)
        tokens, mask = batch.tokens.to(device), batch.mask.to(device)
        loss, naming = recorded[batch.chosen](clean, noise, sigma, tokens, mask, labels[batch.chosen][rows])
        norm = torch.nn.utils.clip_grad_norm_(moved, 1.0)
        for mover in movers:
            mover.step()
        ema.step(model.parameters())
        return {"loss": loss, "naming": naming, "norm": norm}

    def sample(path: Path) -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        pipeline.save_pretrained(arguments.run / "pipeline")
        ema.restore(model.parameters())
        stage = StageSpec(name="base", steps=25, guidance_scale=3.0, sigma_start=1.0, sigma_end=0.0)
        sample_grid(model_config(arguments.run / "pipeline"), backend, [stage], path)

    train(accelerator, arguments.run, schedule, step, sample)


if __name__ == "__main__":
    main()
