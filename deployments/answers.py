"""Answers of the OpenAI Images API, with what a diffusion engine adds: seed, evaluations and timings of each image."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from deployments.decode import DecodedImage
from deployments.resolve import Job
from stages.model import parse_size
from stages.packet import Span


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
        "plan": job.plan.name,
        "seed": images[0].seed,
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
    return event | (_warnings(job) if partial is None else {"partial_image_index": partial})


def _warnings(job: Job) -> dict[str, Any]:
    return {"warnings": job.warnings} if job.warnings else {}


def image_data(image: DecodedImage) -> dict[str, Any]:
    """An entry of a response's `data`."""
    return {
        "b64_json": base64.b64encode(image.data).decode(),
        "seed": image.seed,
        "nfe": sum(span.nfe for span in image.spans),
        "timings": [timing(span) for span in image.spans],
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
