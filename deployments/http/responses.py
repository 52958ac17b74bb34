"""Responses of the OpenAI Images API, extended by the seed, evaluations and timings of each image."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from deployments.http.resolve import Job
from deployments.router import DecodedImage
from stages.image import megapixels
from stages.spans import Span


def images_response(job: Job, images: Sequence[DecodedImage], content: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the response to a request that does not stream.

    Args:
        job: the request.
        images: its images.
        content: for each image, what its entry begins with: the file, or where it is.
    """
    data = [{**begin, **describe(image)} for begin, image in zip(content, images, strict=True)]
    return _warnings(job) | {
        "created": int(time.time()),
        "data": data,
        "size": job.size,
        "output_format": job.format,
        "background": "opaque",
        "usage": usage(images),
        "plan": job.plan.name,
        "seed": images[0].reply.seed,
        "nfe": sum(entry["nfe"] for entry in data),
        "megapixels": megapixels(job.size, len(images)),
    }


def stream_event(job: Job, image: DecodedImage, partial: int | None) -> dict[str, Any]:
    """Build an event of a streaming response: partial image number `partial`, or the final image if it is None."""
    event = {
        "type": "image_generation.completed" if partial is None else "image_generation.partial_image",
        "created_at": int(time.time()),
        "size": job.size,
        "output_format": job.format,
        "quality": "auto",
        "background": "opaque",
        **inline(image),
        **describe(image),
    }
    if partial is not None:
        return {**event, "partial_image_index": partial}
    return {**event, "usage": usage([image]), "plan": job.plan.name, **_warnings(job)}


def usage(images: Sequence[DecodedImage]) -> dict[str, Any]:
    """Count the model's tokens: text tokens of the prompts, which the images share, and latent tokens of the images."""
    text, latent = images[0].reply.text_tokens, sum(image.reply.image_tokens for image in images)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": latent,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": latent},
        "total_tokens": text + latent,
    }


def _warnings(job: Job) -> dict[str, Any]:
    return {"warnings": job.warnings} if job.warnings else {}


def inline(image: DecodedImage) -> dict[str, Any]:
    """Build the part of an entry of a response's `data` that holds the image's file."""
    return {"b64_json": base64.b64encode(image.data).decode()}


def describe(image: DecodedImage) -> dict[str, Any]:
    """Build the part of an entry of a response's `data` that says how the image was made."""
    return {
        "seed": image.reply.seed,
        "nfe": evaluations(image),
        "timings": [timing(span) for span in image.reply.spans],
    }


def evaluations(image: DecodedImage) -> float:
    """Return the network evaluations that an image took, in all its stages."""
    return sum(span.nfe for span in image.reply.spans)


def timing(span: Span) -> dict[str, Any]:
    """Describe a stage's work, with times in seconds since the epoch."""
    return {
        "stage": span.stage,
        "start": span.start,
        "end": span.end,
        "seconds": round(span.end - span.start, 6),
        "nfe": span.nfe,
    }
