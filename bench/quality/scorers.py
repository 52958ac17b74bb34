"""Scores of how well images match their prompts, by public models, for prompts that the oracle cannot judge."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], float]
"""Mean score of images against prompts, pair by pair."""


def clip_scorer(source: str, device: str) -> Scorer:
    """Load the CLIP score, Hessel et al. 2021 (arXiv 2104.08718).

    A pair's score is 100 max(cos, 0) of the image's and the text's embeddings, the scale of torchmetrics.

    Args:
        source: directory or repo id of a CLIP model, such as openai/clip-vit-large-patch14.
        device: torch's name of the device to run it on.
    """
    model, processor = CLIPModel.from_pretrained(source).to(device).eval(), AutoProcessor.from_pretrained(source)

    @torch.inference_mode()
    def score(image: Image.Image, prompt: str) -> float:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", padding=True, truncation=True)
        made = model(**inputs.to(device))
        return 100 * float(torch.cosine_similarity(made.image_embeds, made.text_embeds).clamp(min=0))

    return _mean_of(score)


def image_reward_scorer() -> Scorer:
    """Load ImageReward 1.0, Xu et al. 2023 (arXiv 2304.05977), from the package `image-reward`."""
    model = import_module("ImageReward").load("ImageReward-v1.0")
    return _mean_of(lambda image, prompt: float(model.score(prompt, image)))


def hpsv2_scorer() -> Scorer:
    """Load Human Preference Score 2.1, Wu et al. 2023 (arXiv 2306.09341), from the package `hpsv2`."""
    score = import_module("hpsv2").score
    return _mean_of(lambda image, prompt: float(score(image, prompt, hps_version="v2.1")[0]))


def _mean_of(score: Callable[[Image.Image, str], float]) -> Scorer:
    def scorer(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        return statistics.fmean(score(image, prompt) for image, prompt in zip(images, prompts, strict=True))

    return scorer
