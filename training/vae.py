"""Train the autoencoder: `python -m training.vae training/scenes.yaml RUN_DIRECTORY`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from scenes.examples import examples
from stages.families.qwen_image.autoencoder import convolve_images
from training.lib.autoencoding import crops, draw_reconstructions
from training.lib.images import to_pixels
from training.lib.loop import begin, one_cycle, train
from training.lib.optimize import flatten_kernels, make_optimizers, restore_kernels


def detail(pixels: torch.Tensor) -> torch.Tensor:
    """Return what a 3x3 mean removes from `pixels` (batch, 3, 1, height, width): edges, stripes and hairs."""
    frames = pixels.squeeze(2)
    return frames - F.avg_pool2d(frames, 3, stride=1, padding=1)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLQwenImage, seed: int, count: int = 256) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of each latent channel over `count` scenes, for the VAE's config.

    The deviation includes the posterior's. Channels that the autoencoder does not use have hardly any other, and
    dividing by the means' deviation alone would amplify their noise.
    """
    pixels = to_pixels([image for image, _ in islice(examples(seed), count)])
    posteriors = [vae.encode(chunk).latent_dist for chunk in pixels.split(32)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    variances = torch.cat([posterior.var for posterior in posteriors])
    axes = (0, 2, 3, 4)
    return means.mean(axes).tolist(), (means.var(axes) + variances.mean(axes)).sqrt().tolist()


def main() -> None:
    """Train, and write the autoencoder as `vae` in the run's directory."""
    arguments, config, schedule, accelerator = begin(__doc__, "vae", "run")
    vae = convolve_images(AutoencoderKLQwenImage(**config["model"]))
    with torch.no_grad():  # a narrow posterior at first, whose noise does not drown the small latents
        vae.quant_conv.bias[vae.z_dim :] = -4.0
    flatten_kernels(vae, fresh=True)
    optimizers = make_optimizers(vae, schedule)
    schedulers = [one_cycle(optimizer, schedule) for optimizer in optimizers]
    vae, *movers = accelerator.prepare(vae, *optimizers, *schedulers)

    def step(index: int) -> dict[str, torch.Tensor]:
        pixels = crops(schedule.seed + index, schedule.batch_size).to(accelerator.device)
        with accelerator.autocast():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        error = (decoded - pixels).abs().mean()
        blur = (detail(decoded) - detail(pixels)).abs().mean()
        square = F.mse_loss(decoded, pixels)  # the absolute error alone would ignore small coloured areas
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        accelerator.backward(error + blur + square + config["kl_weight"] * kl)
        for mover in movers:
            mover.step()
        vae.zero_grad()
        return {"error": error.detach(), "detail": blur.detach(), "kl": kl.detach()}

    def sample(path: Path) -> None:
        draw_reconstructions(accelerator.unwrap_model(vae), schedule.seed - 1, path)

    train(accelerator, arguments.run, schedule, step, sample)
    vae = accelerator.unwrap_model(vae)
    restore_kernels(vae)
    mean, std = measure_latents(vae, schedule.seed - 2)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(arguments.run / "vae")


if __name__ == "__main__":
    main()
