"""Responses of the OpenAI Images API, extended by the seed, evaluations and timings of each image."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic describes no other before Python 3.12

from deployments.http.resolve import Job
from deployments.router import DecodedImage
from stages.image import ImageFormat, megapixels
from stages.spans import Span

# JSON Schema of each event of a stream.
EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}


class Timing(TypedDict):
    """A stage's work on an image; times are in seconds since the epoch."""

    stage: str
    start: float
    end: float
    seconds: float
    nfe: float


class Description(TypedDict):
    """How an image was made."""

    seed: int
    nfe: float
    timings: list[Timing]


class ImageEntry(Description):
    """An image, as `b64_json` or as the `url` of a job's."""

    b64_json: NotRequired[str]
    url: NotRequired[str]


class TokenDetails(TypedDict):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(TypedDict):
    """Tokens of the model: text tokens of the prompts, which the images share, and latent tokens of the images."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesResponse(TypedDict):
    """Images of a request."""

    created: int
    data: list[ImageEntry]
    size: str
    output_format: ImageFormat
    background: str
    usage: Usage
    plan: str
    seed: int
    nfe: float
    megapixels: float
    warnings: NotRequired[list[str]]


class ModelResponse(TypedDict):
    """A model, with the sizes that it draws."""

    id: str
    object: str
    created: int
    owned_by: str
    aliases: Sequence[str]
    sizes: Sequence[str]


class ModelsResponse(TypedDict):
    """The models that are served."""

    object: str
    data: list[ModelResponse]


class PlansResponse(TypedDict):
    """The plans that a request may name, and the one that it gets by default."""

    object: str
    data: list[dict[str, Any]]
    default: str


def images_response(job: Job, images: Sequence[DecodedImage], content: Sequence[Mapping[str, str]]) -> ImagesResponse:
    """Build the response to a request that does not stream.

    Args:
        job: the request.
        images: its images.
        content: for each image, the file or where it is.
    """
    data: list[ImageEntry] = [
        {**begin, **describe(image)}  # type: ignore[typeddict-item]
        for begin, image in zip(content, images, strict=True)
    ]
    response: ImagesResponse = {
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
    if job.warnings:
        response["warnings"] = job.warnings
    return response


def stream_event(job: Job, image: DecodedImage, partial: int | None) -> dict[str, Any]:
    """Build an event of a streaming response: partial image number `partial`, or the final image if it is None."""
    event: dict[str, Any] = {
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
    warnings = {"warnings": job.warnings} if job.warnings else {}
    return {**event, "usage": usage([image]), "plan": job.plan.name, **warnings}


def usage(images: Sequence[DecodedImage]) -> Usage:
    """Count the model's tokens: text tokens of the prompts, which the images share, and latent tokens of the images."""
    text, latent = images[0].reply.text_tokens, sum(image.reply.image_tokens for image in images)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": latent,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": latent},
        "total_tokens": text + latent,
    }


def inline(image: DecodedImage) -> dict[str, str]:
    """Build the part of an entry of a response's `data` that holds the image's file."""
    return {"b64_json": base64.b64encode(image.data).decode()}


def describe(image: DecodedImage) -> Description:
    """Build the part of an entry of a response's `data` that says how the image was made."""
    return {
        "seed": image.reply.seed,
        "nfe": evaluations(image),
        "timings": [timing(span) for span in image.reply.spans],
    }


def evaluations(image: DecodedImage) -> float:
    """Return the network evaluations that an image took, in all its stages."""
    return sum(span.nfe for span in image.reply.spans)


def timing(span: Span) -> Timing:
    """Describe a stage's work, with times in seconds since the epoch."""
    return {
        "stage": span.stage,
        "start": span.start,
        "end": span.end,
        "seconds": round(span.end - span.start, 6),
        "nfe": span.nfe,
    }
