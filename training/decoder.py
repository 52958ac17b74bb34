"""Fine-tune the autoencoder's decoder, so that it draws the texture that a reconstruction loss blurs.

`python -m training.decoder training/scenes.yaml VAE_DIRECTORY RUN_DIRECTORY`

A latent cannot encode the position of every hair, and the pixels' error is least for the mean over all positions, which
shows no hairs at all. The loss here also compares local contrast, which does not depend on their positions. The encoder
stays as it is, so models trained on its latents remain valid.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from stages.families.qwen_image.autoencoder import convolve_images
from training.lib.autoencoding import crops, draw_reconstructions
from training.lib.contrast import contrast
from training.lib.loop import begin, one_cycle, train
from training.lib.optimize import flatten_kernels, make_optimizers, restore_kernels


def main() -> None:
    """Train, and write the autoencoder as `vae` in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "decoder", "vae", "run")
    vae = AutoencoderKLQwenImage.from_pretrained(arguments.vae, dtype=torch.float32)
    convolve_images(vae).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    flatten_kernels(vae.decoder, fresh=False)
    deviation = torch.tensor(vae.config.latents_std, device=accelerator.device).view(1, -1, 1, 1, 1)
    optimizers = make_optimizers(vae.decoder, schedule)
    schedulers = [one_cycle(optimizer, schedule) for optimizer in optimizers]
    vae, *movers = accelerator.prepare(vae, *optimizers, *schedulers)

    def step(index: int) -> dict[str, torch.Tensor]:
        pixels = crops(schedule.seed + index, schedule.batch_size).to(accelerator.device)
        with accelerator.autocast():
            latents = vae.encode(pixels).latent_dist.mode()
            # Latents from the transformer are less exact than the encoder's.
            latents = latents + config["latent_noise"] * deviation * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        error = (decoded - pixels).abs().mean()
        square = F.mse_loss(decoded, pixels)
        blur = (contrast(decoded) - contrast(pixels)).abs().mean()
        accelerator.backward(error + square + config["contrast_weight"] * blur)
        for mover in movers:
            mover.step()
        vae.zero_grad()
        return {"error": error.detach(), "square": square.detach(), "contrast": blur.detach()}

    def sample(path: Path) -> None:
        draw_reconstructions(accelerator.unwrap_model(vae), schedule.seed - 1, path)

    train(accelerator, arguments.run, schedule, step, sample)
    vae = accelerator.unwrap_model(vae)
    restore_kernels(vae)
    vae.save_pretrained(arguments.run / "vae")


if __name__ == "__main__":
    main()
