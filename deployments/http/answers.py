"""Answers of the OpenAI Images API, with what a diffusion engine adds: seed, evaluations and timings of each image."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from deployments.http.resolve import Job
from deployments.router import DecodedImage
from stages.image import parse_size
from stages.spans import Span


def images_response(job: Job, images: Sequence[DecodedImage]) -> dict[str, Any]:
    """Answer to a request that does not stream."""
    width, height = parse_size(job.size)
    data = [image_data(image) for image in images]
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
        "megapixels": width * height * len(images) / 1e6,
    }


def stream_event(job: Job, image: DecodedImage, partial: int | None) -> dict[str, Any]:
    """An event of a request that streams: partial image number `partial`, or the last one."""
    event = {
        "type": "image_generation.completed" if partial is None else "image_generation.partial_image",
        "created_at": int(time.time()),
        "size": job.size,
        "output_format": job.format,
        "quality": "auto",
        "background": "opaque",
        **image_data(image),
    }
    if partial is not None:
        return {**event, "partial_image_index": partial}
    return {**event, "usage": usage([image]), **_warnings(job)}


def usage(images: Sequence[DecodedImage]) -> dict[str, Any]:
    """Tokens as the model takes them: of text in the prompts, which the images share, and of latents in the images."""
    text, drawn = images[0].reply.text_tokens, sum(image.reply.image_tokens for image in images)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + drawn,
    }


def _warnings(job: Job) -> dict[str, Any]:
    return {"warnings": job.warnings} if job.warnings else {}


def image_data(image: DecodedImage) -> dict[str, Any]:
    """An entry of a response's `data`."""
    return {
        "b64_json": base64.b64encode(image.data).decode(),
        "seed": image.reply.seed,
        "nfe": sum(span.nfe for span in image.reply.spans),
        "timings": [timing(span) for span in image.reply.spans],
    }


def timing(span: Span) -> dict[str, Any]:
    """A stage's work, with times in seconds since the epoch."""
    return {
        "stage": span.stage,
        "start": span.start,
        "end": span.end,
        "seconds": round(span.end - span.start, 6),
        "nfe": span.nfe,
    }
