"""The OpenAI Images API, with what a diffusion engine adds: schemas and errors.

https://platform.openai.com/docs/api-reference/images/create
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from deployments.decode import DecodedImage
from stages.decode import ImageFormat
from stages.model import parse_size
from stages.noise import MAX_SEED
from stages.packet import Span
from stages.plan import Plan

# Tells a plan's name from its stages before validation, so that errors are about the one that was meant.
_PlanOrName = Annotated[
    Annotated[str, Tag("name")] | Annotated[Plan, Tag("inline")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "inline"),
]
# Parts of pydantic's locations that clients did not write.
_NOT_FIELDS = {"body", "name", "inline", "float", "first_block", "taylorseer"}


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`.

    The last four fields are this engine's own. `seed` is the first image's, each further one adds one; `plan` is a
    preset's name or a plan's stages.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: Annotated[int, Field(ge=1, le=100)] = 95
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    user: str | None = None

    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    guidance_scale: Annotated[float, Field(ge=1.0, le=20.0)] | None = None
    plan: _PlanOrName | None = None


class APIError(Exception):
    """An answer that is not an image.

    Attributes:
        status: of HTTP.
        body: in the API's shape.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def from_validation(cls, errors: Sequence[Any]) -> APIError:
        """The first of pydantic's errors, under the field's name."""
        error = errors[0]
        parts = [str(part) for part in error["loc"] if part not in _NOT_FIELDS and "[" not in str(part)]
        codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
        param = ".".join(parts) or None
        return cls(400, codes.get(error["type"], "invalid_value"), f"{param or 'body'}: {error['msg']}", param)


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


def images_response(body: ImagesRequest, plan: Plan, size: str, images: Sequence[DecodedImage]) -> dict[str, Any]:
    """Answer to a request that does not stream."""
    width, height = parse_size(size)
    data = [image_data(image) for image in images]
    return {
        "created": int(time.time()),
        "data": data,
        "size": size,
        "output_format": body.output_format,
        "plan": plan.name,
        "seed": images[0].seed,
        "nfe": sum(entry["nfe"] for entry in data),
        "megapixels": width * height * len(images) / 1e6,
    }


def stream_event(body: ImagesRequest, size: str, image: DecodedImage, partial: int | None) -> dict[str, Any]:
    """An event of a request that streams: partial image number `partial`, or the last one."""
    event = {
        "type": "image_generation.completed" if partial is None else "image_generation.partial_image",
        "created_at": int(time.time()),
        "size": size,
        "output_format": body.output_format,
        "quality": "auto",
        "background": "opaque",
        **image_data(image),
    }
    return event if partial is None else {**event, "partial_image_index": partial}
