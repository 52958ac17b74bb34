"""Train the autoencoder: `python -m training.vae training/scenes.yaml RUN_DIRECTORY`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from stages.families.qwen_image.autoencoder import convolve_images
from training.loop import begin, one_cycle, train
from training.optimize import flatten_kernels, make_optimizers, restore_kernels
from training.scenes import Scene, examples, render, sample_scene

CROP = 64


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """RGB images as (B, 3, 1, H, W) float32 in -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, 1, H, W) in -1..1 as RGB images."""
    array = ((pixels.squeeze(2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row, with a gap of 2 pixels."""
    width, height = images[0].width + 2, images[0].height + 2
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKLQwenImage, seed: int, path: Path) -> None:
    """A sheet of 16 scenes of `seed`, those that `vae` makes of them below, as a PNG file."""
    truth = [image for image, _ in islice(examples(seed), 16)]
    decoded = to_images(vae.decode(vae.encode(to_pixels(truth).to(vae.device)).latent_dist.mode()).sample)
    grid(truth[:8] + decoded[:8] + truth[8:] + decoded[8:], 8).save(path)


def _crop(scene: Scene, image: Image.Image, rng: Random) -> Image.Image:
    """A square of side `CROP` around one of the objects: background alone teaches nothing."""
    thing = rng.choice(scene.objects)
    left = min(max(round(thing.x * image.width - rng.uniform(0.2, 0.8) * CROP), 0), image.width - CROP)
    top = min(max(round(thing.y * image.height - rng.uniform(0.2, 0.8) * CROP), 0), image.height - CROP)
    return image.crop((left, top, left + CROP, top + CROP))


def crops(seed: int, count: int) -> torch.Tensor:
    """(count, 3, 1, CROP, CROP) of new scenes."""
    rng = Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return to_pixels([_crop(scene, render(scene, rng), rng) for scene in scenes])


def detail(pixels: torch.Tensor) -> torch.Tensor:
    """What a 3x3 mean takes away: edges, stripes and hairs."""
    frames = pixels.squeeze(2)
    return frames - F.avg_pool2d(frames, 3, stride=1, padding=1)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLQwenImage, seed: int, count: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `count` scenes, for the VAE's config.

    The posterior's own deviation is counted in: channels that the autoencoder leaves unused have hardly any other,
    and dividing by that would blow their noise up.
    """
    pixels = to_pixels([image for image, _ in islice(examples(seed), count)])
    posteriors = [vae.encode(chunk).latent_dist for chunk in pixels.split(32)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    variances = torch.cat([posterior.var for posterior in posteriors])
    axes = (0, 2, 3, 4)
    return means.mean(axes).tolist(), (means.var(axes) + variances.mean(axes)).sqrt().tolist()


def main() -> None:
    arguments, config, schedule, accelerator = begin(__doc__, "vae", "run")
    vae = convolve_images(AutoencoderKLQwenImage(**config["model"]))
    with torch.no_grad():  # start with a narrow posterior: its noise would drown the first, small latents
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
        square = F.mse_loss(decoded, pixels)  # the median alone would leave small coloured things out
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
