"""How well images suit their prompts by public models, where no oracle knows what they should show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], float]
"""Mean score of images, each by the prompt at its place."""


def clip_scorer(source: str, device: str) -> Scorer:
    """CLIP score, Hessel et al. 2021 (arXiv 2104.08718): 100 max(cos, 0) of image and text, as torchmetrics scales it.

    Args:
        source: directory or repo id of a CLIP model, such as openai/clip-vit-large-patch14.
    """
    model, processor = CLIPModel.from_pretrained(source).to(device).eval(), AutoProcessor.from_pretrained(source)

    @torch.inference_mode()
    def score(image: Image.Image, prompt: str) -> float:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", padding=True, truncation=True)
        made = model(**inputs.to(device))
        return 100 * float(torch.cosine_similarity(made.image_embeds, made.text_embeds).clamp(min=0))

    return _mean_of(score)


def image_reward_scorer() -> Scorer:
    """ImageReward 1.0, Xu et al. 2023 (arXiv 2304.05977), by its own package `image-reward`."""
    model = import_module("ImageReward").load("ImageReward-v1.0")
    return _mean_of(lambda image, prompt: float(model.score(prompt, image)))


def hpsv2_scorer() -> Scorer:
    """Human Preference Score 2.1, Wu et al. 2023 (arXiv 2306.09341), by its own package `hpsv2`."""
    score = import_module("hpsv2").score
    return _mean_of(lambda image, prompt: float(score(image, prompt, hps_version="v2.1")[0]))


def _mean_of(score: Callable[[Image.Image, str], float]) -> Scorer:
    def scorer(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        return statistics.fmean(score(image, prompt) for image, prompt in zip(images, prompts, strict=True))

    return scorer
